"""What the families that descend from Llama have in common: RMSNorm before each branch, rotary positions, a gated
feed-forward part, and one set of names. Each family says where it differs by overriding a method."""

from collections.abc import Iterable
from typing import Any, ClassVar

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch
from headspring.models.decoder import Decoder
from headspring.models.dialects.decoders import (
    FULL,
    SLIDING,
    DecoderDialect,
    layer_rule,
    read_layer_types,
    windows_of,
)
from headspring.models.dialects.registry import Settings
from headspring.models.dialects.rotary import read_context, read_rope, write_rope
from headspring.models.dialects.rules import Rule
from headspring.models.embedding import Embed, Head
from headspring.models.feedforward import FeedForward, SwiGLU
from headspring.models.mask import Causal
from headspring.models.model import Model
from headspring.models.norm import RMSNorm

LAYER = "model.layers.{i}."


def layer(theirs: str, *ours: str, **move: Any) -> Rule:
    """A rule of every layer."""
    return layer_rule(LAYER + theirs, *ours, **move)


NORMS = (
    layer("input_layernorm.weight", "mixer.pre.weight"),
    layer("post_attention_layernorm.weight", "feedforward.pre.weight"),
)
PROJECTIONS = tuple(layer(f"self_attn.{x}_proj.weight", f"mixer.f.{x}.weight") for x in "qkv")
OUTPUT = (layer("self_attn.o_proj.weight", "mixer.f.out.weight"),)
QKV_BIASES = tuple(layer(f"self_attn.{x}_proj.bias", f"mixer.f.{x}.bias") for x in "qkv")
OUTPUT_BIAS = (layer("self_attn.o_proj.bias", "mixer.f.out.bias"),)
QK_NORMS = tuple(layer(f"self_attn.{x}_norm.weight", f"mixer.f.{x}_norm.weight") for x in "qk")
DOWN = (layer("mlp.down_proj.weight", "feedforward.f.out.weight"),)
GATED = (*(layer(f"mlp.{x}_proj.weight", f"feedforward.f.{x}.weight") for x in ("gate", "up")), *DOWN)


class LlamaLine(DecoderDialect):
    """`qk_norm`: queries and keys are normalised, head by head. `theta` and `fraction`: the rotary base, and the rotated part
    of a head, that its config class assumes (None: it has no word for a part)."""

    embedding = "model.embed_tokens.weight"
    prefix = "model."
    ends = (Rule("model.norm.weight", "norm.weight"),)
    bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    theta: ClassVar[float] = 10_000.0
    fraction: ClassVar[float | None] = None

    def model(self, config: Settings) -> Decoder:
        windows = self.windows(config)
        return Decoder(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=tuple(self.block(config, index, window) for index, window in enumerate(windows)),
            context=read_context(config, self.rope(config, None)),
            norm=self.norm(config),
            tied=config.get("tie_word_embeddings", False),
            embed=self.embed(config),
            head=self.head_value(config),
        )

    # ---- the parts, from a config

    def norm(self, config: Settings) -> RMSNorm:
        return RMSNorm(epsilon=config["rms_norm_eps"])

    def embed(self, config: Settings) -> Embed:
        return Embed()

    def head_value(self, config: Settings) -> Head:
        return Head()

    def windows(self, config: Settings) -> list[int | None]:
        """How far each layer sees."""
        if set(config.get("layer_types") or ()) - {FULL} or config.get("sliding_window"):
            raise UserError(f"config.json: windowed attention is not supported for {self.architecture}")
        return [None] * config.count("num_hidden_layers")

    def block(self, config: Settings, index: int, window: int | None) -> Block:
        norm = self.norm(config)
        feedforward = Branch(f=self.feedforward(config, index), pre=norm)
        return Block(mixer=Branch(f=self.attention(config, window), pre=norm), feedforward=feedforward)

    def attention(self, config: Settings, window: int | None) -> Attention:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
        return Attention(
            heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            head_dim=None if head_dim is not None and head_dim * heads == width else head_dim,
            position=self.rope(config, window),
            mask=Causal(window=window),
            qk_norm=self.norm(config) if self.qk_norm else None,
            bias=self.bias or bool(config.get("attention_bias")),
            out_bias=bool(config.get("attention_bias")),
        )

    def rope(self, config: Settings, window: int | None) -> Any:
        return read_rope(config, self.theta, self.fraction)

    def feedforward(self, config: Settings, index: int) -> FeedForward:
        return SwiGLU(hidden=config["intermediate_size"], bias=bool(config.get("mlp_bias")))

    # ---- and back

    def config(self, model: Model) -> dict[str, Any]:
        decoder, attention, _ = self.first(model, FeedForward)
        norm = self.part(decoder.norm, RMSNorm, "norm")
        return {
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "num_hidden_layers": len(decoder.layers),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads or attention.heads,
            "head_dim": attention.head_dim or decoder.width // attention.heads,
            "rms_norm_eps": norm.epsilon,
            "tie_word_embeddings": decoder.tied,
            "use_cache": True,
            **write_rope(attention.position, decoder.context),
            **self.windows_config(windows_of(decoder)),
            **self.feedforward_config(decoder),
        }

    def windows_config(self, windows: list[int | None]) -> dict[str, Any]:
        return {"sliding_window": None}

    def feedforward_config(self, model: Decoder) -> dict[str, Any]:
        feedforward = self.first(model, SwiGLU)[2]
        return {"intermediate_size": feedforward.hidden}

    # ---- tensors

    def table(self, block: Block) -> Iterable[Rule]:
        attention = block.mixer.f
        assert isinstance(attention, Attention)
        yield from (*NORMS, *PROJECTIONS, *OUTPUT)
        yield from QKV_BIASES if attention.bias else ()
        yield from OUTPUT_BIAS if attention.out_bias else ()
        yield from QK_NORMS if attention.qk_norm else ()
        yield from self.feedforward_table(block)

    def feedforward_table(self, block: Block) -> Iterable[Rule]:
        assert block.feedforward is not None and isinstance(block.feedforward.f, SwiGLU)
        yield from GATED
        if block.feedforward.f.bias:
            yield from (layer(f"mlp.{x}_proj.bias", f"feedforward.f.{x}.bias") for x in ("gate", "up"))
            yield layer("mlp.down_proj.bias", "feedforward.f.out.bias")


class OneWindow(LlamaLine):
    """One `sliding_window` for all layers."""

    def windows(self, config: Settings) -> list[int | None]:
        window = config.get("sliding_window")
        if window is not None and window >= config["max_position_embeddings"]:
            window = None
        return [window] * config.count("num_hidden_layers")

    def windows_config(self, windows: list[int | None]) -> dict[str, Any]:
        return {"sliding_window": windows[0]}


class WindowByLayer(LlamaLine):
    """`layer_types` names the layers that have the window; older files say from which layer on."""

    def windows(self, config: Settings) -> list[int | None]:
        window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
        first, layers = config.get("max_window_layers", 28), config.count("num_hidden_layers")
        types = read_layer_types(config, [SLIDING if i >= first else FULL for i in range(layers)])
        return [window if kind == SLIDING else None for kind in types]

    def windows_config(self, windows: list[int | None]) -> dict[str, Any]:
        sizes = [window for window in windows if window is not None]
        return {
            "sliding_window": sizes[0] if sizes else None,
            "use_sliding_window": bool(sizes),
            "max_window_layers": windows.index(sizes[0]) if sizes else len(windows),
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }
