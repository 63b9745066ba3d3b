"""Mamba and Mamba-2, as `transformers` writes them: renamings only, for the projections are fused in ours too.

Their configs know no longest sequence, and neither do the models. Ours is written down as `max_position_embeddings`, which
`transformers` keeps and does not read; a file without it may be read a million tokens far. Settings of how weights were drawn
(`time_step_min` and the like) say nothing about the function and are not kept.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

from headspring.artifacts.errors import UserError
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.dialects.registry import Dialect, Settings, dialect
from headspring.models.dialects.rules import Rule, expand
from headspring.models.mamba import Mamba
from headspring.models.mamba2 import Mamba2
from headspring.models.mixer import Mixer
from headspring.models.model import Model
from headspring.models.norm import RMSNorm

UNBOUNDED = 2**20
UNLIMITED = ([0, math.inf], [0, {"__float__": "Infinity"}])  # of Δ; the second is how version 5 writes it


def layer(theirs: str, ours: str) -> Rule:
    """A rule of every layer."""
    return Rule("backbone.layers.{i}." + theirs, "layers.{i}.mixer." + ours)


def same(*names: str) -> tuple[Rule, ...]:
    """Parameters of a mixer that are called alike."""
    return tuple(layer(f"mixer.{name}", f"f.{name}") for name in names)


STEM = (
    Rule("backbone.embeddings.weight", "embed.weight"),
    layer("norm.weight", "pre.weight"),
    layer("mixer.conv1d.weight", "f.conv.weight"),
    layer("mixer.out_proj.weight", "f.out.weight"),
    *same("in_proj.weight", "A_log", "D"),
    Rule("backbone.norm_f.weight", "norm.weight"),
)
BIASES = (*same("in_proj.bias"), layer("mixer.out_proj.bias", "f.out.bias"))
CONVOLUTION_BIAS = (layer("mixer.conv1d.bias", "f.conv.bias"),)
HEAD = (Rule("lm_head.weight", "head.weight"),)


class StateSpace(Dialect):
    """What both have in common; `body` is what a mixer has beside the `STEM`."""

    prefix = "backbone."
    fixed: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}
    body: ClassVar[tuple[Rule, ...]]
    mixer: ClassVar[type[Mamba] | type[Mamba2]]

    def read_mixer(self, config: Settings, norm: RMSNorm) -> Mixer:
        raise NotImplementedError

    def write_mixer(self, mixer: Any, width: int) -> dict[str, Any]:
        """What the config says of the mixer beside what both have."""
        raise NotImplementedError

    def model(self, config: Settings) -> Decoder:
        norm = RMSNorm(epsilon=config["layer_norm_epsilon"])
        block = Block(mixer=Branch(f=self.read_mixer(config, norm), pre=norm))
        return Decoder(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=repeat(config.count("num_hidden_layers"), block),
            context=config["max_position_embeddings"],
            norm=norm,
            tied=config["tie_word_embeddings"],
        )

    def config(self, model: Model) -> dict[str, Any]:
        """The first layer speaks for all."""
        model = self.part(model, Decoder, "the model")
        mixer = self.part(model.layers[0].mixer.f, self.mixer, "layers.0.mixer.f")
        return {
            "vocab_size": model.vocab,
            "hidden_size": model.width,
            "num_hidden_layers": len(model.layers),
            "max_position_embeddings": model.context,
            "layer_norm_epsilon": self.part(model.norm, RMSNorm, "norm").epsilon,
            "tie_word_embeddings": model.tied,
            "state_size": mixer.state,
            "expand": mixer.expand,
            "conv_kernel": mixer.conv,
            "use_bias": mixer.bias,
            "use_conv_bias": mixer.conv_bias,
            **self.write_mixer(mixer, model.width),
        }

    def rules(self, model: Model) -> Iterable[Rule]:
        model = self.part(model, Decoder, "the model")
        mixer = self.part(model.layers[0].mixer.f, self.mixer, "layers.0.mixer.f")
        table = (*STEM, *self.body, *(BIASES if mixer.bias else ()), *(CONVOLUTION_BIAS if mixer.conv_bias else ()))
        return expand((*table, *(() if model.tied else HEAD)), len(model.layers))

    def copies(self, model: Model) -> dict[str, str]:
        assert isinstance(model, Decoder)
        return {"lm_head.weight": "backbone.embeddings.weight"} if model.tied else {}


COMMON = {
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": UNBOUNDED,
}


@dialect
class MambaForCausalLM(StateSpace):
    """Mamba (arXiv 2312.00752)."""

    architecture, model_type = "MambaForCausalLM", "mamba"
    defaults = COMMON | {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16,
                         "time_step_rank": "auto", "tie_word_embeddings": True}  # fmt: skip
    body = same("x_proj.weight", "dt_proj.weight", "dt_proj.bias")
    mixer = Mamba

    def read_mixer(self, config: Settings, norm: RMSNorm) -> Mamba:
        rank, usual = config["time_step_rank"], math.ceil(config["hidden_size"] / 16)
        return Mamba(
            state=config["state_size"],
            expand=config["expand"],
            conv=config["conv_kernel"],
            rank=None if rank in ("auto", usual) else rank,
            bias=config["use_bias"],
            conv_bias=config["use_conv_bias"],
        )

    def write_mixer(self, mixer: Mamba, width: int) -> dict[str, Any]:
        return {"time_step_rank": mixer.rank or math.ceil(width / 16), "intermediate_size": mixer.expand * width}


@dialect
class Mamba2ForCausalLM(StateSpace):
    """Mamba-2 (arXiv 2405.21060). The limits that a config may set to Δ hold in one of their two forms only: refused."""

    architecture, model_type = "Mamba2ForCausalLM", "mamba2"
    defaults = COMMON | {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 128, "num_heads": 128,
                         "head_dim": 64, "n_groups": 8, "chunk_size": 256, "tie_word_embeddings": False}  # fmt: skip
    body = same("dt_bias", "norm.weight")
    mixer = Mamba2

    def read_mixer(self, config: Settings, norm: RMSNorm) -> Mamba2:
        heads, inner = config["num_heads"], config["expand"] * config["hidden_size"]
        if heads * config["head_dim"] != inner:
            product = f"num_heads · head_dim = {heads} · {config['head_dim']}"
            raise UserError(f"config.json: {product} is not expand · hidden_size = {inner}")
        limits = config.get("time_step_limit")
        if limits is not None and list(limits) not in UNLIMITED:
            raise UserError(f"config.json: time_step_limit = {limits} is not supported, only [0, Infinity]")
        return Mamba2(
            state=config["state_size"],
            head_dim=config["head_dim"],
            expand=config["expand"],
            groups=config["n_groups"],
            conv=config["conv_kernel"],
            bias=config["use_bias"],
            conv_bias=config["use_conv_bias"],
            epsilon=norm.epsilon,
            chunk=config["chunk_size"],
        )

    def write_mixer(self, mixer: Mamba2, width: int) -> dict[str, Any]:
        return {
            "num_heads": mixer.expand * width // mixer.head_dim,
            "head_dim": mixer.head_dim,
            "n_groups": mixer.groups,
            "chunk_size": mixer.chunk,
        }
