"""A recipe's text as a tree of plain values in which every key knows where it was written.

PyYAML composes the text into nodes that carry line numbers; we walk the nodes ourselves, because its constructor drops
the lines and lets a repeated key win silently. Scalars follow YAML 1.2's core schema instead of PyYAML's 1.1: `3e-4` is
a number, `no` is a word, `1:30` is not ninety. An override (`pretrain.steps=200`) is one more edit of the tree and is
named as the origin of what it set. What it gives up: YAML merge keys (`<<`) and custom tags, which are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from headspring.artifacts.errors import UserError

Key = str | int
Route = tuple[Key, ...]  # ("pretrain", "optimizer", "learning_rate"); list items by index


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+.0123456789")),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML: `200`, `3e-4`, `[a, b]`, `~/my/folder`."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: only plain values


@dataclass
class Source:
    """`tree` and, for each route into it, where it was written: `file.yaml:12` or `override 'a.b=3'`."""

    name: str
    tree: dict[str, Any]
    origins: dict[Route, str] = field(default_factory=dict)

    def origin(self, route: Route) -> str:
        """Where `route`, or the nearest part of it that exists, was written."""
        for length in range(len(route), 0, -1):
            if route[:length] in self.origins:
                return self.origins[route[:length]]
        return self.name

    def error(self, route: Route, message: str) -> UserError:
        """`recipes/x.yaml:12: pretrain.stesp: MESSAGE`"""
        return UserError(f"{self.origin(route)}: {dotted(route)}: {message}" if route else f"{self.name}: {message}")

    def override(self, assignment: str, value: Any = None, *, parse: bool = True) -> None:
        """Apply `a.b=text`; with `parse=False` set `a.b` to `value`. Raises `UserError` where that leads nowhere."""
        name, equals, text = assignment.partition("=")
        if parse and not equals:
            raise UserError(f"override {assignment!r}: expected key=value, such as pretrain.steps=200")
        if parse:
            try:
                value = parse_value(text)
            except yaml.YAMLError as error:
                problem = getattr(error, "problem", None) or error
                raise UserError(f"override {assignment!r}: the value is not YAML ({problem}); quote it") from None
        self._set(f"override {(assignment if parse else f'{name}={value}')!r}", name, value)

    def _set(self, origin: str, name: str, value: Any) -> None:
        route: list[Key] = []
        cursor: Any = self.tree
        *parents, last = name.split(".")
        for part in parents:
            key = _key(cursor, part)
            if isinstance(cursor, dict) and cursor.get(key) is None:
                cursor[key] = {}
            cursor = _child(cursor, key, origin)
            route.append(key)
        key = _key(cursor, last)
        if not isinstance(cursor, dict):
            _child(cursor, key, origin)
        cursor[key] = value
        target = (*route, key)
        self.origins = {known: where for known, where in self.origins.items() if known[: len(target)] != target}
        self.origins[target] = origin


def read_source(path: Path) -> Source:
    """Parse a YAML file. Raises `UserError` for what cannot be read, with the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is a mapping of stages, such as `data:` and `pretrain:`")
    source = Source(str(path), {})
    source.tree = _construct(node, (), source, _Loader(""), ())
    return source


def dotted(route: Route) -> str:
    return ".".join(str(key) for key in route)


def _construct(node: yaml.Node, route: Route, source: Source, loader: _Loader, above: tuple[yaml.Node, ...]) -> Any:
    if any(node is parent for parent in above):
        raise source.error(route, "an alias that contains itself")
    inside = (*above, node)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            where = f"{source.name}:{key_node.start_mark.line + 1}"
            if name in result:
                raise UserError(f"{where}: {dotted((*route, name))}: this key stands twice in the same mapping")
            source.origins[(*route, name)] = where
            result[name] = _construct(value_node, (*route, name), source, loader, inside)
        return result
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            source.origins[(*route, index)] = f"{source.name}:{item.start_mark.line + 1}"
        return [_construct(item, (*route, i), source, loader, inside) for i, item in enumerate(node.value)]
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError):
        raise source.error(route, f"cannot read this value ({node.tag})") from None


def _key(cursor: Any, part: str) -> Key:
    return int(part) if isinstance(cursor, list) and part.isdigit() else part


def _child(cursor: Any, key: Key, origin: str) -> Any:
    if isinstance(cursor, Mapping):
        return cursor[key]
    if isinstance(cursor, list):
        if isinstance(key, int) and key < len(cursor):
            return cursor[key]
        raise UserError(f"{origin}: {key!r} is not an index of a list of {len(cursor)}")
    raise UserError(f"{origin}: {key!r} lies inside {cursor!r}, which holds no keys")
