"""From a stage's keys to its config, and from pydantic's errors to one line a user can act on.

pydantic reports a location through the *types* (with the tags of unions in it); the user wants a place in the *file*
and the nearest valid key. So the location is walked twice: along the values, which drops the tags, and along the types,
which finds the fields that could have stood there.
"""

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value, Variant
from headspring.line.source import Route, Source

Config = TypeVar("Config", bound=Value)


def validate(config: type[Config], values: Any, route: Route, source: Source) -> Config:
    """`values` as a `config`. Raises `UserError` with file, line, dotted key and what would have been valid."""
    try:
        return config.model_validate(values)
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda problem: _rank(problem, values), reverse=True)
        raise _describe(problems[0], config, values, route, source) from None
    except UserError as error:  # a config's own validator knows more than pydantic
        raise source.error(route, str(error)) from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or the valid names where none is near."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid here: {', '.join(names)}" if names else ""


def _rank(problem: Mapping[str, Any], values: Any) -> tuple[bool, int]:
    """A union reports every branch; what the user meant is the branch that got furthest, unknown keys first."""
    return problem["type"] == "extra_forbidden", len(_places(problem["loc"], values, problem["type"]))


def _describe(problem: Any, config: type[BaseModel], values: Any, route: Route, source: Source) -> UserError:
    location, kind, context = problem["loc"], problem["type"], problem.get("ctx", {})
    place = (*route, *_places(location, values, kind))
    if kind == "extra_forbidden":
        hint = nearest(str(location[-1]), _valid_keys(config, location[:-1], values))
        return source.error(place, f"unknown key{hint}")
    if kind == "missing":
        return source.error(place, "this key is required")
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    if kind == "union_tag_invalid":
        expected = re.findall(r"'([^']*)'", context["expected_tags"])
        discriminator = context["discriminator"].strip("'")
        hint = nearest(context["tag"], expected)
        return source.error((*place, discriminator), f"unknown {discriminator} {context['tag']!r}{hint}")
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", context["expected"])
        return source.error(place, f"unknown value {given!r}{nearest(str(given), expected)}")
    if kind in ("value_error", "kind_missing", "kind_unknown"):  # a config's own words
        return source.error(place, message)
    shown = repr(given) if isinstance(given, str | int | float | bool | None) else f"a {_yaml_type(given)}"
    message = message[:1].lower() + message[1:]
    return source.error(place, message if shown in message else f"{message}, not {shown}")


def _places(location: Sequence[str | int], values: Any, kind: str) -> Route:
    """`location` without what is not a key of `values` (tags of unions, names of types)."""
    route: list[str | int] = []
    for index, key in enumerate(location):
        indexed = isinstance(values, list) and isinstance(key, int)
        if indexed or (isinstance(values, Mapping) and key in values):
            values = values[key]
        elif not (kind == "missing" and index == len(location) - 1):
            continue
        route.append(key)
    return tuple(route)


def _valid_keys(config: type[BaseModel], location: Sequence[str | int], values: Any) -> list[str]:
    """The names of the fields that could stand at `location` inside `config`, given what `values` chose on the way there."""
    reached: list[Any] = [config]
    for key in location:
        reached = [below for annotation in reached for below in _step(annotation, key)] or reached
        if _places([key], values, ""):
            values = values[key]
        reached = [chosen for annotation in reached for chosen in _chosen(annotation, values)]
    return [name for annotation in reached for model in _models(annotation) for name in _names(model)]


def _chosen(annotation: Any, values: Any) -> Iterator[Any]:
    """A family of values is the member that `kind` names; anything else is itself."""
    for part in _alternatives(annotation):
        kinds = part.kinds if isinstance(part, type) and issubclass(part, Variant) else {}
        said = values.get("kind", part.default_kind) if kinds and isinstance(values, Mapping) else None
        if not kinds:
            yield part
        elif said in kinds:
            yield kinds[str(said)]


def _step(annotation: Any, key: str | int) -> Iterator[Any]:
    for part in _alternatives(annotation):
        origin, arguments = get_origin(part), get_args(part)
        if isinstance(part, type) and issubclass(part, BaseModel):
            fields = {field.alias or name: field.annotation for name, field in part.model_fields.items()}
            if key in fields:
                yield fields[str(key)]
            elif key == part.__name__ or key in _tags(part):
                yield part
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            yield arguments[-1]
        elif isinstance(origin, type) and issubclass(origin, Sequence) and isinstance(key, int):
            yield arguments[0]


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    else:
        yield annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for part in _alternatives(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


def _names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield field.alias or name


def _tags(model: type[BaseModel]) -> set[Any]:
    """The values of the model's `kind`, pydantic's tag in a discriminated union."""
    field = model.model_fields.get("kind")
    return set(get_args(field.annotation)) if field else set()


def _yaml_type(value: Any) -> str:
    return "mapping" if isinstance(value, Mapping) else "list" if isinstance(value, Sequence) else type(value).__name__
