"""What a format has no words for: say a model in it, read that back, and compare field by field."""

from collections.abc import Mapping
from typing import Any, Protocol

from headspring.artifacts.errors import UserError
from headspring.models.dialects.registry import WrongModel
from headspring.models.model import Model

STRUCTURE = 1000  # what a part of another kind counts: such an architecture is never the nearest


class Format(Protocol):
    """An architecture of some format: what its words mean, and which words say a model."""

    def read(self, config: Mapping[str, Any], /) -> Model: ...
    def write(self, model: Model, /) -> dict[str, Any]: ...


def losses(form: Format, model: Model) -> list[str]:
    """The fields of `model` that do not survive `form`, each with both values; [] where the form expresses it."""
    try:
        back = form.read(form.write(model))
    except UserError as error:
        return [str(error)]
    before, after = (_fields(explicit(value)) for value in (model, back))
    different = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return [f"{name} is {_shown(before, name)} and would become {_shown(after, name)}" for name in different]


def distance(form: Format, model: Model) -> int:
    """How much is lost: a number of fields, more than that where a part is of another kind, and most where the model is."""
    try:
        form.write(model)
    except WrongModel:
        return 2 * STRUCTURE
    except UserError:
        return STRUCTURE
    return len(losses(form, model))


def explicit(model: Model) -> Any:
    """The content of a value, with what follows from other fields written out: two that are equal here are one function."""
    return _explicit(model.model_dump(mode="json"), model)


def _explicit(value: Any, model: Model) -> Any:
    if isinstance(value, list):
        return [_explicit(child, model) for child in value]
    if not isinstance(value, dict):
        return value
    value = {key: _explicit(child, model) for key, child in value.items()}
    if value.get("kind") in ("attention", "cross_attention"):
        value["kv_heads"] = value["kv_heads"] or value["heads"]
        value["head_dim"] = value["head_dim"] or model.width // value["heads"]
        value["scale"] = value["scale"] or value["head_dim"] ** -0.5
    if value.get("kind") in ("causal", "full") and (value["window"] or 0) >= model.context:
        value["window"] = None  # a window that no sequence is longer than
    return value


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
