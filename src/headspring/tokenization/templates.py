"""Chat templates that came with a model: Jinja, which is a program, run as one that nobody has read.

A template sees the conversation and nothing else (Jinja's immutable sandbox: no attribute that leads out, no import, no file),
and it has a budget: time, characters written, and the size of what one operation makes. Time is checked at every line of
the template's compiled code by a trace function of this thread alone, so that an endless loop ends, which a check between the
pieces that a template writes would not do. Traced code runs some ten times slower; a template takes a millisecond.

What it gives up: one operation of C code that is slow without being large is waited for.
"""

import json
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from headspring.artifacts import UserError

SECONDS, CHARACTERS = 2.0, 8 << 20  # of one rendering
LARGEST = 1 << 20  # items or digits that one operation may make
WIDENING_METHODS = ("ljust", "rjust", "center", "zfill", "format", "format_map", "expandtabs", "translate")
WIDENING = ("center", "format", "wordwrap", "batch", "slice")  # filters that make much out of little


class TooLong(Exception):
    """A template went beyond its budget."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own, without operations that make much out of little."""

    intercepted_binops = frozenset({"*", "**", "%", "//"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        for name in WIDENING:
            del self.filters[name]
        del self.globals["lipsum"]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and _size(left) * _size(right) > LARGEST:
            raise SecurityError("a product in the template is too large")
        if operator == "**" and (abs(left) > LARGEST or abs(right) > 64):
            raise SecurityError("a power in the template is too large")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("the template formats strings by %, which is not allowed")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in WIDENING_METHODS)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja's own gives strings a `format` of their own, before anybody is asked whether that is safe."""


def _size(value: Any) -> int:
    """Items of a sequence, or a number that may multiply one."""
    return abs(value) if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 1


def run_template(source: str, names: Mapping[str, Any], seconds: float = SECONDS, characters: int = CHARACTERS) -> str:
    """What the template writes with these names. Raises `UserError` where it fails, refuses or goes beyond its budget."""
    environment = Sandbox()
    environment.globals.update(raise_exception=_refuse, strftime_now=time.strftime)
    environment.filters["tojson"] = _json
    deadline = time.monotonic() + seconds
    previous = sys.gettrace()
    try:
        template = environment.from_string(source)
        sys.settrace(_watch(deadline, f"the tokenizer's chat template takes more than {seconds:g} s for this conversation"))
        parts, size = [], 0
        for part in template.generate(dict(names)):
            parts.append(part)
            size += len(part)
            if size > characters:
                raise TooLong(f"the tokenizer's chat template writes more than {characters} characters")
        return "".join(parts)
    except TooLong as error:
        raise UserError(str(error)) from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(f"the tokenizer's chat template fails: {str(error)[:200]}") from error
    finally:
        sys.settrace(previous)


def _watch(deadline: float, message: str) -> Any:
    """A trace function that ends whatever runs after the deadline."""

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise TooLong(message)
        return watch

    return watch


def _refuse(message: str) -> None:
    raise UserError(f"the tokenizer's chat template refuses this conversation: {str(message)[:200]}")


def _json(value: Any, indent: int | None = None) -> str:
    """As `transformers` writes it into templates: plain, and not escaped for web pages."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
