"""How config.json says a rotary position: one reading and one writing for all dialects that rotate.

transformers 5 has one dictionary, `rope_parameters`; before it there were `rope_theta`, `partial_rotary_factor` and, for a
stretched rotation, `rope_scaling`. Files of both ages are read, and what is written has both spellings.
"""

from collections.abc import Callable, Mapping
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.position import DynamicNTK, Linear, Llama3, LongRoPE, Position, RoPE, Scaling, YaRN

Words = Mapping[str, Any]
ORIGINAL = "original_max_position_embeddings"
# Keys that any rotation may have; the others belong to one kind.
PLAIN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
KINDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    "llama3": {"factor", ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", ORIGINAL, "short_factor", "long_factor", "attention_factor"},
}
OLD_NAMES = {"su": "longrope"}


def read_rope(config: Words, theta: float = 10_000.0, fraction: float | None = None) -> RoPE:
    """The position that a config describes. `theta` and `fraction` are the defaults of its class; most have no `fraction`
    and turn whole heads, whatever the config says of it.

    Raises `UserError` for a rotation that is not supported.
    """
    words = config.get("rope_scaling") or config.get("rope_parameters") or {}
    said = {
        "rope_theta": config.get("rope_theta") or theta,
        **{key: value for key, value in words.items() if value is not None},
    }
    own = config.get("partial_rotary_factor")
    said.setdefault("partial_rotary_factor", (1.0 if fraction is None else fraction) if own is None else own)
    if fraction is None and said["partial_rotary_factor"] != 1.0:
        share = said["partial_rotary_factor"]
        raise UserError(f"config.json: partial_rotary_factor = {share} is not supported here: the family turns whole heads")
    return rope_of(said, config)


def rope_of(words: Words, config: Words) -> RoPE:
    """The position that one dictionary describes, in a model of this config."""
    kind = words.get("rope_type", words.get("type", "default"))
    kind = OLD_NAMES.get(kind, kind)
    if kind not in KINDS:
        raise UserError(f"config.json: rope_type {kind!r} is not supported; those that are: {', '.join(KINDS)}")
    unknown = sorted(set(words) - PLAIN - KINDS[kind])
    if unknown:
        raise UserError(f"config.json: {unknown[0]!r} is no setting of a rotation of type {kind!r}")
    scaling = None if kind == "default" else READ[kind](words, config)
    return RoPE(theta=float(words["rope_theta"]), fraction=words.get("partial_rotary_factor", 1.0), scaling=scaling)


def _original(words: Words, config: Words) -> int:
    """The context of training: what the config says outside the dictionary goes first, as in `transformers`."""
    return config.get(ORIGINAL) or words.get(ORIGINAL) or config["max_position_embeddings"]


def _yarn(words: Words, config: Words) -> Scaling:
    original = _original(words, config)
    return YaRN(
        factor=words.get("factor") or config["max_position_embeddings"] / original,
        original_context=original,
        beta_fast=words.get("beta_fast") or 32.0,
        beta_slow=words.get("beta_slow") or 1.0,
        attention_factor=words.get("attention_factor"),
        mscale=words.get("mscale"),
        mscale_all_dim=words.get("mscale_all_dim"),
        truncate=words.get("truncate", True),
    )


def _llama3(words: Words, config: Words) -> Scaling:
    return Llama3(
        factor=words["factor"],
        low_frequency_factor=words["low_freq_factor"],
        high_frequency_factor=words["high_freq_factor"],
        original_context=_original(words, config),
    )


def _longrope(words: Words, config: Words) -> Scaling:
    original = _original(words, config)
    return LongRoPE(
        factor=words.get("factor") or config["max_position_embeddings"] / original,
        original_context=original,
        short=words["short_factor"],
        long=words["long_factor"],
        attention_factor=words.get("attention_factor"),
    )


READ: dict[str, Callable[[Words, Words], Scaling]] = {
    "linear": lambda words, config: Linear(factor=words["factor"]),
    "dynamic": lambda words, config: DynamicNTK(factor=words["factor"], original_context=config["max_position_embeddings"]),
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def read_context(config: Words, rope: RoPE) -> int:
    """The longest sequence. A dynamic rotation is there to go beyond `max_position_embeddings`, up to `factor` times it."""
    longest = config["max_position_embeddings"]
    return int(longest * rope.scaling.factor) if isinstance(rope.scaling, DynamicNTK) else longest


def write_rope(position: Position, context: int) -> dict[str, Any]:
    """The keys that describe a rotary position, in both spellings (of another kind: those of the default one), and the
    context that goes with it."""
    rope = position if isinstance(position, RoPE) else RoPE()
    words = write_words(rope)
    scaling = rope.scaling
    said: dict[str, Any] = {
        "max_position_embeddings": scaling.original_context if isinstance(scaling, DynamicNTK) else context,
        "rope_theta": rope.theta,  # transformers before 5, and most other readers
        "rope_parameters": words,
        "rope_scaling": None if scaling is None else words,
    }
    if rope.fraction != 1.0:
        said["partial_rotary_factor"] = rope.fraction
    if isinstance(scaling, LongRoPE):
        said[ORIGINAL] = scaling.original_context
    return said


def write_words(rope: RoPE) -> dict[str, Any]:
    """The dictionary of one rotation, as `rope_parameters` has it."""
    words: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        words["partial_rotary_factor"] = rope.fraction
    return words if rope.scaling is None else {**words, **_scaling_words(rope.scaling)}


def _scaling_words(scaling: Scaling) -> dict[str, Any]:
    match scaling:
        case Linear():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicNTK():
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case YaRN():
            keys = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
            words = {key: value for key in keys if (value := getattr(scaling, key)) is not None}
            truncate = {} if scaling.truncate else {"truncate": False}
            return {"rope_type": "yarn", ORIGINAL: scaling.original_context, **words, **truncate}
        case Llama3():
            words = {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
            return {"rope_type": "llama3", "factor": scaling.factor, ORIGINAL: scaling.original_context, **words}
        case LongRoPE():
            factors = {"short_factor": list(scaling.short), "long_factor": list(scaling.long), "factor": scaling.factor}
            own = {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
            return {"rope_type": "longrope", ORIGINAL: scaling.original_context, **factors, **own}
        case _:
            raise UserError(f"a rotation stretched by {scaling.kind!r} has no words in config.json")
