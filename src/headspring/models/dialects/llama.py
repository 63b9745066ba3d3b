"""The Llama line of `transformers`: Llama, Mistral, Qwen2, Qwen3 and Phi-3, as one table of names and five small differences.

| family | biases on q, k, v | QK-norm | tensors |
| --- | --- | --- | --- |
| Llama (arXiv 2302.13971), Mistral (2310.06825) | no | no | one a matrix |
| Qwen2 (2407.10671) | yes | no | one a matrix |
| Qwen3 (2505.09388) | no | per head, before the rotation | one a matrix |
| Phi-3 (2404.14219) | no | no | q, k, v fused; gate and up fused |

All rotate the halves (c, c + C/2) of a head, as `RoPE` does: nothing is permuted. (Meta's own Llama files pair neighbours;
`transformers` permutes them when it converts, and those are the files that are read here.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.block import Block, Branch, repeat
from headspring.models.decoder import Decoder
from headspring.models.dialects.rules import Rule
from headspring.models.feedforward import SwiGLU
from headspring.models.norm import RMSNorm
from headspring.models.position import RoPE

THEIRS, OURS = "model.layers.{i}.", "layers.{i}."


def _renamed(theirs: str, ours: str) -> Rule:
    return Rule(THEIRS + theirs, OURS + ours)


def _fused(theirs: str, *ours: str) -> Rule:
    return Rule(THEIRS + theirs, *(OURS + name for name in ours))


STEM = (
    Rule("model.embed_tokens.weight", "embed.weight"),
    _renamed("input_layernorm.weight", "mixer.pre.weight"),
    _renamed("self_attn.o_proj.weight", "mixer.f.out.weight"),
    _renamed("post_attention_layernorm.weight", "feedforward.pre.weight"),
    _renamed("mlp.down_proj.weight", "feedforward.f.out.weight"),
    Rule("model.norm.weight", "norm.weight"),
)
SEPARATE = (
    *(_renamed(f"self_attn.{x}_proj.weight", f"mixer.f.{x}.weight") for x in "qkv"),
    *(_renamed(f"mlp.{x}_proj.weight", f"feedforward.f.{x}.weight") for x in ("gate", "up")),
)
FUSED = (
    _fused("self_attn.qkv_proj.weight", *(f"mixer.f.{x}.weight" for x in "qkv")),
    _fused("mlp.gate_up_proj.weight", "feedforward.f.gate.weight", "feedforward.f.up.weight"),
)
BIASES = tuple(_renamed(f"self_attn.{x}_proj.bias", f"mixer.f.{x}.bias") for x in "qkv")
QK_NORMS = tuple(_renamed(f"self_attn.{x}_norm.weight", f"mixer.f.{x}_norm.weight") for x in "qk")
HEAD = (Rule("lm_head.weight", "head.weight"),)


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture of `transformers`.

    `defaults` is what its config class assumes of a key that config.json leaves out; `fixed` the only value of a key with
    which our decoder is the same function.
    """

    architecture: str
    model_type: str
    body: tuple[Rule, ...]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    bias: bool = False
    qk_norm: bool = False

    def rules(self, tied: bool) -> tuple[Rule, ...]:
        return self.body if tied else (*self.body, *HEAD)

    def decoder(self, config: Mapping[str, Any]) -> Decoder:
        """The decoder that `config` (the content of config.json) describes. Raises `UserError` where it is another function."""
        config = {"tie_word_embeddings": False, **self.defaults, **config}
        try:
            self._refuse(config)
            norm = RMSNorm(epsilon=config["rms_norm_eps"])
            width, heads = config["hidden_size"], config["num_attention_heads"]
            kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
            attention = Attention(
                heads=heads,
                kv_heads=None if kv_heads == heads else kv_heads,
                head_dim=None if head_dim is not None and head_dim * heads == width else head_dim,
                position=RoPE(theta=_theta(config)),
                qk_norm=norm if self.qk_norm else None,
                bias=self.bias,
            )
            feedforward = Branch(f=SwiGLU(hidden=config["intermediate_size"]), pre=norm)
            block = Block(mixer=Branch(f=attention, pre=norm), feedforward=feedforward)
            return Decoder(
                vocab=config["vocab_size"],
                width=width,
                layers=repeat(config["num_hidden_layers"], block),
                context=config["max_position_embeddings"],
                norm=norm,
                tied=config["tie_word_embeddings"],
            )
        except KeyError as error:
            raise UserError(f"config.json does not say {error}, which a {self.architecture} needs") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "config"
            raise UserError(f"config.json describes no {self.architecture}: {field}: {first['msg']}") from None
        except TypeError as error:
            raise UserError(f"config.json describes no {self.architecture}: {error}") from None

    def config(self, decoder: Decoder) -> dict[str, Any]:
        """What config.json says of `decoder`, as far as the format has words for it (its first layer speaks for all)."""
        mixer, feedforward = decoder.layers[0].mixer, decoder.layers[0].feedforward
        attention = mixer.f
        assert isinstance(attention, Attention)
        theta = getattr(attention.position, "theta", RoPE().theta)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "intermediate_size": getattr(feedforward.f, "hidden", 1),
            "num_hidden_layers": len(decoder.layers),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads or attention.heads,
            "head_dim": attention.head_dim or decoder.width // attention.heads,
            "max_position_embeddings": decoder.context,
            "rms_norm_eps": decoder.norm.epsilon,
            "tie_word_embeddings": decoder.tied,
            "rope_theta": theta,  # transformers before 5, and most other readers
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "rope_scaling": None,
            "sliding_window": None,
            "use_cache": True,
            **self.fixed,
        }

    def _refuse(self, config: Mapping[str, Any]) -> None:
        for key, only in self.fixed.items():
            if config.get(key, only) != only:
                raise UserError(f"config.json: {key} = {config[key]!r} is not supported for {self.architecture}, only {only!r}")
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if window is not None and window < config["max_position_embeddings"]:
            raise UserError(f"config.json: sliding_window = {window} is in use; windowed attention is not supported")
        if set(config.get("layer_types") or ()) - {"full_attention"}:
            raise UserError(f"config.json: layer_types = {config['layer_types']}; only full_attention is supported")
        if config.get("quantization_config"):
            raise UserError("config.json: quantization_config: quantized weights are not supported; take the original model")


def _theta(config: Mapping[str, Any]) -> float:
    """The rotary base, from `rope_parameters` (transformers 5) or `rope_theta` (before it). Scaled rotations are refused."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unknown = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or unknown:
            raise UserError(f"config.json: {key} = {dict(rope)} is not supported, only the default rotation")
    rope = config.get("rope_parameters") or {}
    if {rope.get("partial_rotary_factor", 1.0), config.get("partial_rotary_factor", 1.0)} - {None, 1.0}:
        raise UserError("config.json: partial_rotary_factor is not supported: every channel of a head is rotated")
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


NO_BIAS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        STEM + SEPARATE,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "use_sliding_window": False},
        NO_BIAS,
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        STEM + SEPARATE + BIASES,
        {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "use_sliding_window": False},
        {"hidden_act": "silu"},
        bias=True,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        STEM + SEPARATE + QK_NORMS,
        {
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "use_sliding_window": False,
        },
        {"hidden_act": "silu", "attention_bias": False},
        qk_norm=True,
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        STEM + SEPARATE,
        {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
        {"hidden_act": "silu"},
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        STEM + FUSED,
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        {"hidden_act": "silu"},
    ),
)
