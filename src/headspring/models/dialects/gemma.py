"""Gemma 2 (arXiv 2408.00118) and Gemma 3 (2503.19786), text: norms on both sides of each branch, gains stored minus one.

Embeddings are multiplied by √width, the scores' scale is a setting of its own, and most layers see a window. Gemma 2 bounds
scores and logits; Gemma 3 normalises queries and keys instead, and its layers with a window rotate by another base.
"""

from collections.abc import Iterable
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch
from headspring.models.decoder import Decoder
from headspring.models.dialects.decoders import FULL, SLIDING, read_activation, read_layer_types, windows_of, write_activation
from headspring.models.dialects.llama_line import GATED, OUTPUT, PROJECTIONS, QK_NORMS, LlamaLine, layer
from headspring.models.dialects.registry import Settings, dialect
from headspring.models.dialects.rotary import rope_of, write_words
from headspring.models.dialects.rules import Rule
from headspring.models.embedding import Embed, Head
from headspring.models.feedforward import FeedForward, Gated
from headspring.models.mask import Causal
from headspring.models.model import Model
from headspring.models.norm import RMSNorm
from headspring.models.position import RoPE

SANDWICH = (
    layer("input_layernorm.weight", "mixer.pre.weight"),
    layer("post_attention_layernorm.weight", "mixer.post.weight"),
    layer("pre_feedforward_layernorm.weight", "feedforward.pre.weight"),
    layer("post_feedforward_layernorm.weight", "feedforward.post.weight"),
)
LOCAL, GLOBAL = 10_000.0, 1_000_000.0  # rotary bases of Gemma 3


class Gemma(LlamaLine):
    """What the two have in common. `every`: the distance between layers without a window, where no list of types says it."""

    every = 2
    defaults = {
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    fixed = {"attention_bias": False}

    def model(self, config: Settings) -> Decoder:
        if config.get("use_bidirectional_attention"):
            raise UserError("config.json: use_bidirectional_attention is not supported: a decoder sees no later tokens")
        return super().model(config)

    def norm(self, config: Settings) -> RMSNorm:
        return RMSNorm(epsilon=config["rms_norm_eps"], plus_one=True)

    def embed(self, config: Settings) -> Embed:
        return Embed(scale=config["hidden_size"] ** 0.5)

    def head_value(self, config: Settings) -> Head:
        return Head(softcap=config.get("final_logit_softcapping"))

    def windows(self, config: Settings) -> list[int | None]:
        layers = config.count("num_hidden_layers")
        every = config.get("sliding_window_pattern") or self.every
        types = read_layer_types(config, [SLIDING if (index + 1) % every else FULL for index in range(layers)])
        return [config["sliding_window"] if kind == SLIDING else None for kind in types]

    def block(self, config: Settings, index: int, window: int | None) -> Block:
        norm = self.norm(config)
        attention, feedforward = self.attention(config, window), self.feedforward(config, index)
        return Block(mixer=Branch(f=attention, pre=norm, post=norm), feedforward=Branch(f=feedforward, pre=norm, post=norm))

    def attention(self, config: Settings, window: int | None) -> Attention:
        changes = {"scale": config["query_pre_attn_scalar"] ** -0.5, "softcap": config.get("attn_logit_softcapping")}
        return super().attention(config, window).model_copy(update=changes)

    def feedforward(self, config: Settings, index: int) -> FeedForward:
        return Gated(hidden=config["intermediate_size"], activation=read_activation(config, "hidden_activation"))

    def config(self, model: Model) -> dict[str, Any]:
        decoder, attention, _ = self.first(model, Gated)
        channels = attention.head_dim or decoder.width // attention.heads
        scale = channels**-0.5 if attention.scale is None else attention.scale
        return {
            **super().config(model),
            "query_pre_attn_scalar": _scalar(scale),
            "attn_logit_softcapping": attention.softcap,
            "final_logit_softcapping": decoder.head.softcap,
            "use_bidirectional_attention": False,
        }

    def windows_config(self, windows: list[int | None]) -> dict[str, Any]:
        sizes = [window for window in windows if window is not None]
        types = [FULL if window is None else SLIDING for window in windows]
        return {"sliding_window": sizes[0] if sizes else 4096, "layer_types": types}

    def feedforward_config(self, model: Decoder) -> dict[str, Any]:
        feedforward = self.first(model, Gated)[2]
        name = write_activation(feedforward.activation)
        return {"intermediate_size": feedforward.hidden, "hidden_activation": name, "hidden_act": name}

    def table(self, block: Block) -> Iterable[Rule]:
        qk_norms = QK_NORMS if self.qk_norm else ()
        return (*SANDWICH, *PROJECTIONS, *OUTPUT, *qk_norms, *GATED)


def _scalar(scale: float) -> int | float:
    """The number whose square root divides the scores: whole, where it is one (its config class wants it so)."""
    scalar = scale**-2
    return round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar


@dialect
class Gemma2(Gemma):
    architecture, model_type = "Gemma2ForCausalLM", "gemma2"
    defaults = Gemma.defaults | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}


@dialect
class Gemma3(Gemma):
    architecture, model_type = "Gemma3ForCausalLM", "gemma3_text"
    every, qk_norm = 6, True
    defaults = Gemma.defaults | {"max_position_embeddings": 131072}

    def rope(self, config: Settings, window: int | None) -> RoPE:
        """Both dictionaries of transformers 5, or the keys before it: a scaling is for the layers without a window."""
        kind, old = (FULL, "rope_theta") if window is None else (SLIDING, "rope_local_base_freq")
        words = dict((config.get("rope_parameters") or {}).get(kind) or {})
        if window is None:
            words |= config.get("rope_scaling") or {}
        words.setdefault("rope_theta", config.get(old) or (GLOBAL if window is None else LOCAL))
        return rope_of(words, config)

    def config(self, model: Model) -> dict[str, Any]:
        said = super().config(model)
        decoder = self.first(model, Gated)[0]
        ropes = {FULL: RoPE(theta=GLOBAL), SLIDING: RoPE(theta=LOCAL)}
        for block in decoder.layers:
            attention = block.mixer.f
            if isinstance(attention, Attention) and isinstance(attention.position, RoPE):
                ropes[_kind(attention, decoder)] = attention.position
        return {
            **said,
            "max_position_embeddings": decoder.context,
            "rope_theta": ropes[FULL].theta,
            "rope_local_base_freq": ropes[SLIDING].theta,
            "rope_scaling": None,
            "rope_parameters": {kind: write_words(rope) for kind, rope in ropes.items()},
        }


def _kind(attention: Attention, decoder: Decoder) -> str:
    windowed = isinstance(attention.mask, Causal) and attention.mask.window is not None
    return SLIDING if windowed and any(windows_of(decoder)) else FULL
