"""What a format has no words for: say a decoder in it, read that back, and compare field by field."""

from typing import Any

from headspring.artifacts.errors import UserError
from headspring.models.attention import Attention
from headspring.models.decoder import Decoder
from headspring.models.dialects.llama import Family


def losses(family: Family, decoder: Decoder) -> list[str]:
    """The fields of `decoder` that do not survive `family`, each with both values; [] where the family expresses it."""
    attention = decoder.layers[0].mixer.f
    if family.model_type == "llama" and isinstance(attention, Attention) and decoder.width % attention.heads:
        return [f"width ({decoder.width}) is no multiple of heads ({attention.heads})"]  # its config class refuses that
    try:
        back = family.decoder(family.config(decoder))
    except UserError as error:
        return [str(error)]
    before, after = (_fields(explicit(value).model_dump(mode="json")) for value in (decoder, back))
    different = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return [f"{name} is {_shown(before, name)} and would become {_shown(after, name)}" for name in different]


def explicit(decoder: Decoder) -> Decoder:
    """The same decoder, with the defaults that depend on other fields written out."""
    layers = []
    for block in decoder.layers:
        attention = block.mixer.f
        assert isinstance(attention, Attention)
        channels = attention.head_dim or decoder.width // attention.heads
        sizes = {"kv_heads": attention.kv_heads or attention.heads, "head_dim": channels}
        mixer = block.mixer.model_copy(update={"f": attention.model_copy(update=sizes)})
        layers.append(block.model_copy(update={"mixer": mixer}))
    return decoder.model_copy(update={"layers": tuple(layers)})


def _fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested JSON value by dotted name."""
    if not isinstance(value, dict | list):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    fields: dict[str, Any] = {}
    for key, child in items:
        fields |= _fields(child, f"{prefix}.{key}".lstrip("."))
    return fields


def _shown(fields: dict[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"
