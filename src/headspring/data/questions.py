"""Questions about one function that its own text answers, in the kinds a model of a few million parameters can learn.

They are open-book: the function stands in the prompt, the answer can be found (or counted) in it, so that what training
raises is the skill of reading and of stopping, not memory, and so that it can be measured on functions never seen. Each
kind has one checkable answer and several phrasings; the function comes first and the question last, next to the answer.
`summary` is the exception in form: four docstrings, one of them this function's, chosen by likelihood. `expression`
asks what Python prints for a small expression over words of the function; true doctests are rare in a standard library
(about twenty that stand on their own), so that a rate of right outputs needs these beside them, under their own name.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from keyword import iskeyword
from typing import Literal

from headspring.data.functions import Function

Check = Literal["exact", "set", "choice", "contains", "parses", "doctest"]
Kind = Literal[
    "name", "parameters", "parameter_count", "has_parameter", "default", "returns", "raises", "signature",
    "docstring", "summary", "write", "doctest", "expression",
]  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What is asked and the answer. An empty answer never occurs."""

    prompt: str
    answer: str
    expression: str = ""


TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "name": (
        "{source}\n\nWhat is the name of this function?",
        "{source}\n\nGive the name of the function.",
        "{source}\n\nHow is this function called?",
    ),
    "parameters": (
        "{source}\n\nWhich parameters does this function take?",
        "{source}\n\nList the parameters of the function.",
        "{source}\n\nWhat are the parameters?",
    ),
    "parameter_count": (
        "{source}\n\nHow many parameters does this function take?",
        "{source}\n\nCount the parameters of the function.",
    ),
    "has_parameter": (
        "{source}\n\nDoes this function take a parameter named {name}?",
        "{source}\n\nIs {name} a parameter of the function?",
    ),
    "default": (
        "{source}\n\nWhat is the default value of {name}?",
        "{source}\n\nWhich default does the parameter {name} have?",
    ),
    "returns": (
        "{source}\n\nWhat does this function return?",
        "{source}\n\nWhich expression is returned?",
        "{source}\n\nGive the returned expression.",
    ),
    "raises": (
        "{source}\n\nWhich exception does this function raise?",
        "{source}\n\nName the exception class that is raised.",
    ),
    "signature": (
        "{source}\n\nWrite the first line of this function.",
        "{source}\n\nRepeat the line that defines the function.",
    ),
    "docstring": (
        '{header}\n    """{summary}"""\n\nWhat does this function do?',
        '{header}\n    """{summary}"""\n\nRepeat the docstring.',
    ),
    "summary": (
        "{source}\n\nWhat does this function do?",
        "{source}\n\nDescribe the function in one line.",
        "{source}\n\nWrite a docstring for the function.",
    ),
    "write": (
        '{header}\n    """{summary}"""\n\nWrite this function.',
        '{header}\n    """{summary}"""\n\nComplete the function.',
    ),
    "doctest": (
        "{setup}>>> {expression}\n\nWhat does Python print?",
        "{setup}>>> {expression}\n\nGive the output.",
    ),
    "expression": (
        ">>> {expression}\n\nWhat does Python print?",
        ">>> {expression}\n\nGive the output.",
    ),
}

CHECKS: dict[Kind, Check] = {
    "name": "exact",
    "parameters": "set",
    "parameter_count": "exact",
    "has_parameter": "exact",
    "default": "exact",
    "returns": "exact",
    "raises": "exact",
    "signature": "exact",
    "docstring": "exact",
    "summary": "choice",
    "write": "parses",
    "doctest": "doctest",
    "expression": "doctest",
}


def ask(kind: Kind, function: Function, rng: random.Random, max_answer: int, max_written: int) -> Question | None:
    """A question of that kind, or None where the function has no answer to it.

    `max_answer` bounds the answer's characters, `max_written` those of a function to be written."""
    built = _BUILDERS[kind](function, rng)
    if built is None:
        return None
    answer, fields = built
    if not answer or len(answer) > (max_written if kind == "write" else max_answer):
        return None
    values = {"source": function.source, "header": function.header, "summary": function.summary, **fields}
    return Question(rng.choice(TEMPLATES[kind]).format(**values), answer, fields.get("expression", ""))


Built = tuple[str, dict[str, str]] | None  # the answer, and what else the template names


def _name(function: Function, rng: random.Random) -> Built:
    return function.name, {}


def _parameters(function: Function, rng: random.Random) -> Built:
    return ", ".join(function.parameters) or "none", {}


def _parameter_count(function: Function, rng: random.Random) -> Built:
    return str(len(function.parameters)), {}


def _has_parameter(function: Function, rng: random.Random) -> Built:
    """Yes and no equally often: the coin is tossed first, and a function without a fitting name is not asked."""
    yes = rng.random() < 0.5
    parameters = [name.lstrip("*") for name in function.parameters if name not in ("self", "cls")]
    names = parameters if yes else list(function.local_names)
    return ("yes" if yes else "no", {"name": rng.choice(names)}) if names else None


def _default(function: Function, rng: random.Random) -> Built:
    if not function.defaults:
        return None
    name, value = rng.choice(function.defaults)
    return value, {"name": name}


def _returns(function: Function, rng: random.Random) -> Built:
    return function.returned, {}


def _raises(function: Function, rng: random.Random) -> Built:
    return function.raised, {}


def _signature(function: Function, rng: random.Random) -> Built:
    return function.header, {}


def _docstring(function: Function, rng: random.Random) -> Built:
    return (function.summary, {}) if function.header else None


def _summary(function: Function, rng: random.Random) -> Built:
    return function.summary, {}


def _write(function: Function, rng: random.Random) -> Built:
    return (function.source, {}) if function.header and function.summary else None


def _expression(function: Function, rng: random.Random) -> Built:
    words = {name.strip("*_") for name in (function.name, *function.parameters, *function.local_names)}
    usable = sorted(word for word in words if 2 <= len(word) <= 12 and word.isascii() and word.isidentifier())
    if len(usable) < 3:
        return None
    first, second, third = rng.sample(usable, 3)
    index, number = rng.randrange(3), rng.randrange(2, 20)
    expression, value = rng.choice(
        (
            (f"{first!r} + {second!r}", first + second),
            (f"[{first!r}, {second!r}, {third!r}][{index}]", [first, second, third][index]),
            (
                f"{first!r} in [{second!r}, {first!r}]" if index else f"{third!r} in [{second!r}, {first!r}]",
                bool(index),
            ),
            (f"{first!r}.upper()", first.upper()),
            (f"{first!r}[0]", first[0]),
            (f"[{first!r}] + [{second!r}]", [first, second]),
            (f"'-'.join([{first!r}, {second!r}])", f"{first}-{second}"),
            (f"'{first} {second}'.split()", [first, second]),
            (f"len([{first!r}, {second!r}, {third!r}][{index}:])", 3 - index),
            (f"{number} + {index}", number + index),
            (f"{number} < {number + 1 - index}", index == 0),
            (f"dict({first}={number})[{first!r}]", number),
        )
    )
    return (repr(value), {"expression": expression}) if not iskeyword(first) else None


_BUILDERS: dict[Kind, Callable[[Function, random.Random], Built]] = {
    "name": _name,
    "parameters": _parameters,
    "parameter_count": _parameter_count,
    "has_parameter": _has_parameter,
    "default": _default,
    "returns": _returns,
    "raises": _raises,
    "signature": _signature,
    "docstring": _docstring,
    "summary": _summary,
    "write": _write,
    "expression": _expression,
}
