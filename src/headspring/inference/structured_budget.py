"""What a specification of structured output may cost, checked before anything parses it.

Schemas, patterns and grammars come from strangers. Their compilers recurse over what is nested, write repeats out, and count
neither in time; so both are counted here, in one pass over the text or the values and without recursion.
"""

import json
import re
from typing import TYPE_CHECKING, Any

from pydantic import Field

from headspring.artifacts import UserError, Value

if TYPE_CHECKING:
    from headspring.inference.structured import Structured

REPEAT = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")


class Budget(Value):
    """What a specification may cost: its own size, the levels and values in it, and its compilation."""

    bytes: int = Field(65_536, gt=0, description="of the specification, in UTF-8")
    depth: int = Field(32, gt=0, description="levels of nesting: of the schema's JSON, or of brackets")
    nodes: int = Field(8_192, gt=0, description="values in the schema, or choices")
    symbols: int = Field(100_000, gt=0, description="size of the grammar that it becomes, of patterns with repeats written out")
    seconds: float = Field(5.0, gt=0, description="of compilation, the first mask included")


def check_size(spec: "Structured", budget: Budget) -> None:
    """Raise `UserError` for a specification beyond its budget."""
    if spec.json_schema is not None:
        nodes, depth = extent(spec.json_schema)
        _at_most(nodes, budget.nodes, "values")  # before it is written down, which recurses
        _at_most(depth, budget.depth, "levels of nesting")
        size = len(json.dumps(spec.json_schema).encode())
    else:
        texts = spec.choice or (spec.regex or spec.grammar or "",)
        _at_most(len(texts), budget.nodes, "choices")
        size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
        _at_most(0 if spec.choice else nesting(texts[0]), budget.depth, "levels of nesting")
    _at_most(size, budget.bytes, "bytes")
    for pattern in patterns(spec):
        _at_most(written_out(pattern), budget.symbols, "symbols when its repeats are written out")


def _at_most(found: int, limit: int, what: str) -> None:
    if found > limit:
        raise UserError(f"this structured output has {found:,} {what}, and {limit:,} are allowed; make it smaller")


def extent(value: Any) -> tuple[int, int]:
    """How many values are in a JSON value, itself included, and how deep it is; without recursion."""
    nodes = deepest = 0
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        one, depth = waiting.pop()
        nodes, deepest = nodes + 1, max(deepest, depth)
        inside = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        waiting += [(child, depth + 1) for child in inside]
    return nodes, deepest


def patterns(spec: "Structured") -> list[str]:
    """All texts of a specification in which `{n}` may mean a repeat."""
    if spec.json_schema is None:
        return [text for text in (spec.regex, spec.grammar) if text is not None]
    found: list[str] = []
    waiting: list[Any] = [spec.json_schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            found += [text for text in (one.get("pattern"), *(one.get("patternProperties") or ())) if isinstance(text, str)]
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return found


def written_out(pattern: str) -> int:
    """About how many symbols a pattern has with `(ab){3}` as `ababab`; repeats inside repeats multiply, which no limit of the
    parser counts in time."""
    sizes, last, place, in_class = [0], 0, 0, False
    while place < len(pattern):
        character = pattern[place]
        repeat = REPEAT.match(pattern, place) if character == "{" and not in_class else None
        place = repeat.end() if repeat else place + (2 if character == "\\" else 1)
        if repeat:
            times = int(repeat[2] or repeat[1])
            sizes[-1], last = sizes[-1] + last * max(times - 1, 0), last * times
        elif character == "(" and not in_class:
            sizes.append(0)
            last = 0
        elif character == ")" and not in_class and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        else:
            in_class = character == "[" or (in_class and character != "]")
            sizes[-1], last = sizes[-1] + 1, 1
    return sum(sizes)


def nesting(text: str) -> int:
    """How deep brackets are nested in a text, those in its quotes included."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= depth > 0
    return deepest
