"""How GGUF says a rotary position: keys for how many channels turn and how they are stretched, or a tensor of factors.

| what is stretched | in the file | here |
| --- | --- | --- |
| nothing | `rope.scaling.type` none or absent | no scaling |
| positions | type linear, `rope.scaling.factor` | `Linear` |
| slow pairs (YaRN) | type yarn, factor, `rope.scaling.original_context_length` | `YaRN` with its usual constants |
| each pair by a factor of its own | the tensor `rope_freqs.weight` | `Llama3`, or else `LongRoPE` |

Llama 3.1 and later are of the last kind: llama.cpp evaluates the formula once, when it converts. Factors that the formula
gives are read as the formula, which other formats have words for.
"""

from collections.abc import Mapping
from typing import Any

import torch

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.model import Model
from headspring.models.position.rotary import RoPE
from headspring.models.position.scaling import Linear, Llama3, LongRoPE, Scaling, YaRN, unscaled

TURNED, TYPE = "rope.dimension_count", "rope.scaling.type"
FACTOR, ORIGINAL = "rope.scaling.factor", "rope.scaling.original_context_length"
KEYS = (TURNED, TYPE, FACTOR, ORIGINAL)
Factors = tuple[float, ...]


def with_rotation(model: Any, settings: Mapping[str, Any], factors: Factors | None) -> Model:
    """`model`, whose positions have a base and nothing else, with what `settings` and the factors say beside it.

    Raises `UserError` for a stretching that is not supported.
    """
    changed: dict[Any, Any] = {}
    try:
        for block in model.layers:
            changed[block] = changed.get(block) or _turned(block, settings, factors, model)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"its metadata says no rotary position: {' '.join(str(error).split())[:160]}") from None
    return model.model_copy(update={"layers": tuple(changed[block] for block in model.layers)})


def _turned(block: Any, settings: Mapping[str, Any], factors: Factors | None, model: Any) -> Any:
    attention = block.mixer.f
    channels = attention.head_dim or model.width // attention.heads
    rope = attention.position.model_copy(
        update={
            "fraction": settings.get(TURNED, channels) / channels,
            "scaling": _scaling(settings, factors, attention.position.theta, model.context),
        }
    )
    if rope.dims(channels) != settings.get(TURNED, channels):
        raise UserError(f"its metadata: {TURNED} = {settings[TURNED]} of heads of {channels} channels is not supported")
    mixer = block.mixer.model_copy(update={"f": attention.model_copy(update={"position": rope})})
    return block.model_copy(update={"mixer": mixer})


def _scaling(settings: Mapping[str, Any], factors: Factors | None, theta: float, context: int) -> Scaling | None:
    kind = settings.get(TYPE, "none")
    if factors is not None and kind == "none":
        formula = Llama3(factor=round(max(1.0, *factors), 3))  # that of the slowest pair, which is stretched whole
        expected = factors_of(formula, theta, 2 * len(factors))
        if torch.allclose(torch.tensor(expected), torch.tensor(factors), rtol=1e-4):
            return formula
        return LongRoPE(factor=1.0, original_context=max(context, 2), short=factors, long=factors)
    if factors is None and kind == "none":
        return None
    if factors is None and kind == "linear":
        return Linear(factor=settings.get(FACTOR, 1.0))
    if factors is None and kind == "yarn":
        return YaRN(factor=settings.get(FACTOR, 1.0), original_context=settings.get(ORIGINAL, context))
    beside = " beside rope_freqs.weight" if factors is not None else ""
    raise UserError(f"its metadata: {TYPE} = {kind!r}{beside} is not supported; none, linear and yarn are")


def rotation_of(attention: Attention, width: int) -> tuple[dict[str, Any], Factors | None]:
    """The settings and the factors that say a position, as far as there are words for it."""
    rope, channels = attention.position, attention.head_dim or width // attention.heads
    if not isinstance(rope, RoPE):
        return {TURNED: channels}, None
    settings: dict[str, Any] = {TURNED: rope.dims(channels)}
    scaling = rope.scaling
    if isinstance(scaling, Linear):
        settings |= {TYPE: "linear", FACTOR: scaling.factor}
    elif isinstance(scaling, YaRN):
        settings |= {TYPE: "yarn", FACTOR: scaling.factor, ORIGINAL: scaling.original_context}
    elif isinstance(scaling, Llama3):
        return settings, factors_of(scaling, rope.theta, rope.dims(channels))
    elif isinstance(scaling, LongRoPE):
        return settings, scaling.long
    return settings, None


def factors_of(scaling: Scaling, theta: float, dims: int) -> Factors:
    """How many times slower than without the scaling each pair turns."""
    lengths = torch.zeros((), dtype=torch.int64)
    return tuple((unscaled(theta, dims, lengths.device) / scaling.frequencies(theta, dims, lengths)).tolist())


def without_scaling(model: Any) -> Model:
    """`model` with positions that every dialect has words for: all channels turn, nothing is stretched."""
    layers = []
    for block in model.layers:
        attention = block.mixer.f
        if isinstance(attention, Attention) and isinstance(attention.position, RoPE):
            plain = attention.model_copy(update={"position": RoPE(theta=attention.position.theta)})
            block = block.model_copy(update={"mixer": block.mixer.model_copy(update={"f": plain})})
        layers.append(block)
    return model.model_copy(update={"layers": tuple(layers)})
