"""How GGUF says what `config.json` and its tensors say: one table of tensor names an architecture, one of keys for all.

| architecture | what is in such files | rotary pairs | tensors |
| --- | --- | --- | --- |
| llama | Llama, Mistral, SmolLM and their kin | neighbours | one a matrix |
| qwen2 | Qwen2 | halves | one a matrix, biases on q, k, v |
| qwen3 | Qwen3 | halves | one a matrix, norms on q, k |
| phi3 | Phi-3 | halves | q, k, v fused; gate and up fused |
| llama with `expert_count` | Mixtral | neighbours | as llama; of experts one tensor for each of gate, up and down |
| qwen3moe | Qwen3-MoE | halves | as qwen3 and as above |

llama.cpp rotates neighbouring channels (2c, 2c + 1) of a head in files of architecture llama, and the halves (c, c + C/2)
in the others. `RoPE` rotates halves, so that the rows of q and k of the first kind change places (`moves.Pairs`).

The settings go through the vocabulary of `transformers`, whose dialects already know what they mean: a key here is
another name for one there. What a file sets beyond the keys below is refused, as it may be another function.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from headspring.artifacts.errors import UserError
from headspring.models.decoder import Decoder
from headspring.models.dialects.gguf.rotary import KEYS as ROTATION
from headspring.models.dialects.gguf.rotary import rotation_of, with_rotation, without_scaling
from headspring.models.dialects.moves import Pairs
from headspring.models.dialects.registry import by_name
from headspring.models.dialects.rules import Rule, expand
from headspring.models.model import Model

ARCHITECTURE = "general.architecture"
# Not keys of the format, where tensors say it: a tied model is one without `output.weight`, the factors are `rope_freqs`.
TIED, FACTORS = "tied", "factors"
KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
# Of mixtures of experts. Their readers divide the weights of the chosen experts by their sum, and no key says otherwise.
MIXTURE_KEYS = {
    "MixtralForCausalLM": {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "Qwen3MoeForCausalLM": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
}
NORMALISED = {"Qwen3MoeForCausalLM": {"norm_topk_prob": True}}
EXPERT_COUNT = "expert_count"
# Keys that are read beside the table, and what they must be to change nothing.
NEUTRAL: dict[str, Any] = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0}
VALUE_LENGTH = "attention.value_length"
PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
THETA = 10_000.0  # what llama.cpp takes where a file has no rope.freq_base


@dataclass(frozen=True, eq=False)
class GgufFamily:
    """One value of `general.architecture`. `huggingface` is the architecture that says the same in `transformers`;
    `paired` whether the rows of q and k stand in pairs; `stretched` whether its readers know rotary factors."""

    architecture: str
    huggingface: str
    body: tuple[Rule, ...]
    paired: bool = False
    stretched: bool = False

    @property
    def keys(self) -> dict[str, str]:
        """Keys of the format and what they are called in `config.json`."""
        return KEYS | MIXTURE_KEYS.get(self.huggingface, {})

    def describes(self, metadata: Mapping[str, Any]) -> bool:
        """Whether files with such metadata are of this family: a name may stand for a dense model and for a mixture."""
        experts = bool(metadata.get(f"{self.architecture}.{EXPERT_COUNT}", 0))
        return metadata.get(ARCHITECTURE) == self.architecture and experts == (self.huggingface in MIXTURE_KEYS)

    def rules(self, model: Any) -> Iterator[Rule]:
        """The table for this model, layer by layer."""
        for rule in expand(self.body if model.tied else (*self.body, HEAD), len(model.layers)):
            attention = model.layers[0].mixer.f
            heads = {"q": attention.heads, "k": attention.kv_heads or attention.heads}.get(rule.ours[0].split(".")[-2])
            rotated = attention.position.rotated(attention.head_dim or model.width // attention.heads)
            yield Rule(rule.theirs, *rule.ours, move=Pairs(heads, rotated)) if self.paired and heads else rule

    def read(self, metadata: Mapping[str, Any], most: int | None = None) -> Model:
        """The model that `metadata`, with `TIED` and `FACTORS` added to it, describes; `most` is a bound on its layers.

        Raises `UserError` where it is another function than ours.
        """
        prefix = f"{self.architecture}."
        settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        config = {theirs: _scalar(key, settings[key]) for key, theirs in self.keys.items() if key in settings}
        config |= NORMALISED.get(self.huggingface, {})
        config.setdefault("rope_theta", THETA)
        config["tie_word_embeddings"] = metadata[TIED]
        config["use_sliding_window"] = "sliding_window" in config
        config.setdefault("sliding_window", None)
        heads, width = config.get("num_attention_heads"), config.get("hidden_size")
        if heads and width:  # the format's defaults, where a class of transformers has others
            config.setdefault("head_dim", width // heads)
            config.setdefault("num_key_value_heads", heads)
        _refuse(settings, config, self.keys)
        try:
            return with_rotation(by_name(self.huggingface).read(config, most), settings, metadata.get(FACTORS))
        except UserError as error:
            raise UserError(_translated(str(error))) from None

    def write(self, model: Model) -> dict[str, Any]:
        """The metadata that describes `model`, as far as the format has words for it, `TIED` and `FACTORS`.

        Raises `UserError` where parts are of another kind.
        """
        if not isinstance(model, Decoder):
            raise UserError(f"the model is a {type(model).__name__}, and GGUF ({self.architecture}) has a Decoder there")
        config = by_name(self.huggingface).write(without_scaling(model))
        said = {key: config[theirs] for key, theirs in self.keys.items() if config.get(theirs) is not None}
        attention: Any = model.layers[0].mixer.f
        rotation, factors = rotation_of(attention, model.width)
        said |= {VALUE_LENGTH: config["head_dim"], **rotation}
        numbers = {f"{self.architecture}.{key}": _stored(value) for key, value in said.items()}
        known = {} if factors is None or not self.stretched else {FACTORS: tuple(map(_stored, factors))}
        return {ARCHITECTURE: self.architecture, **numbers, TIED: model.tied, **known}


def _translated(message: str) -> str:
    """An error that speaks of config.json, in the words of GGUF."""
    keys = {theirs: key for key, theirs in KEYS.items()}
    words = re.sub(r"\w+", lambda word: keys.get(word[0], word[0]), message)
    return words.replace("config.json", "its metadata")


def _scalar(key: str, value: Any) -> Any:
    """A setting of the whole model, a number; given for each layer (an array), it must be the same for all."""
    if isinstance(value, np.ndarray) and key in PER_LAYER and len(value):
        if (value != value[0]).any():
            raise UserError(f"its metadata: {key} differs from layer to layer, which is not supported")
        value = value[0].item()
    if not isinstance(value, int | float):
        raise UserError(f"its metadata: {key} is no number")
    return value


def _refuse(settings: Mapping[str, Any], config: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Raise `UserError` for settings under which the model would be another function."""
    unknown = sorted(settings.keys() - keys.keys() - NEUTRAL.keys() - {VALUE_LENGTH, *ROTATION})
    if unknown:
        raise UserError(f"its metadata: the setting {unknown[0]!r} is not supported")
    for key, only in NEUTRAL.items():
        if key not in keys and settings.get(key, only) != only:
            raise UserError(f"its metadata: {key} = {settings[key]!r} is not supported, only {only!r}")
    channels = config.get("head_dim")
    if settings.get(VALUE_LENGTH, channels) != channels:
        raise UserError(f"its metadata: {VALUE_LENGTH} = {settings[VALUE_LENGTH]} beside keys of {channels} is not supported")


def _stored(value: Any) -> Any:
    """A number as it comes back from the file, where a float is a float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# ---- the tables


def _layer(theirs: str, *ours: str) -> Rule:
    return Rule("blk.{i}." + theirs, *("layers.{i}." + name for name in ours))


STEM = (
    Rule("token_embd.weight", "embed.weight"),
    Rule("output_norm.weight", "norm.weight"),
    _layer("attn_norm.weight", "mixer.pre.weight"),
    _layer("attn_output.weight", "mixer.f.out.weight"),
    _layer("ffn_norm.weight", "feedforward.pre.weight"),
)
SEPARATE = tuple(_layer(f"attn_{x}.weight", f"mixer.f.{x}.weight") for x in "qkv")
DOWN = (_layer("ffn_down.weight", "feedforward.f.out.weight"),)
GATED = (
    *DOWN,
    *(_layer(f"ffn_{x}.weight", f"feedforward.f.{x}.weight") for x in ("gate", "up")),
)
FUSED = (
    _layer("attn_qkv.weight", *(f"mixer.f.{x}.weight" for x in "qkv")),
    _layer("ffn_up.weight", "feedforward.f.gate.weight", "feedforward.f.up.weight"),
)
BIASES = tuple(_layer(f"attn_{x}.bias", f"mixer.f.{x}.bias") for x in "qkv")
MIXTURE = (
    _layer("ffn_gate_inp.weight", "feedforward.f.router.weight"),
    *(_layer(f"ffn_{x}_exps.weight", f"feedforward.f.experts.{x}") for x in ("gate", "up")),
    _layer("ffn_down_exps.weight", "feedforward.f.experts.out"),
)
HEAD = Rule("output.weight", "head.weight")
QK_NORMS = tuple(_layer(f"attn_{x}_norm.weight", f"mixer.f.{x}_norm.weight") for x in "qk")

GGUF_FAMILIES = (
    GgufFamily("llama", "LlamaForCausalLM", STEM + SEPARATE + GATED, paired=True, stretched=True),
    GgufFamily("llama", "MixtralForCausalLM", STEM + SEPARATE + MIXTURE, paired=True, stretched=True),
    GgufFamily("qwen2", "Qwen2ForCausalLM", STEM + SEPARATE + BIASES + GATED),
    GgufFamily("qwen3", "Qwen3ForCausalLM", STEM + SEPARATE + QK_NORMS + GATED),
    GgufFamily("qwen3moe", "Qwen3MoeForCausalLM", STEM + SEPARATE + QK_NORMS + MIXTURE),
    GgufFamily("phi3", "Phi3ForCausalLM", STEM + FUSED + DOWN),
)
