"""Short doctests that stand on their own: one expression, one line of output, and the lines it needs.

An example is kept when its expression uses only builtins and names that earlier examples of the same docstring define
by importing one of `PURE_MODULES` or by assigning; those earlier lines, and no others, are its setup. Nothing runs
here: whether the documented output is true is found out by execution in the sandbox, in evaluation.
"""

import ast
import builtins
import doctest
from collections.abc import Iterator
from dataclasses import dataclass

_BUILTINS = frozenset(dir(builtins)) - {
    "_",
    "input",
    "open",
    "exec",
    "eval",
    "breakpoint",
    "exit",
    "quit",
    "print",
    "help",
}
# Standard library modules whose results depend on nothing but the arguments.
_PURE = """
    array ast base64 binascii bisect calendar cmath collections copy dataclasses datetime decimal difflib enum fractions
    functools hashlib heapq html ipaddress itertools json keyword math numbers operator re reprlib shlex statistics
    string struct textwrap types typing unicodedata urllib zlib
"""
PURE_MODULES = frozenset(_PURE.split())
_UNSTABLE = ("...", " at 0x", "object at", "<", ">>>")  # output that depends on the machine or is not a value
_UNDERSTOOD = (ast.Import, ast.ImportFrom, ast.Assign, ast.AugAssign, ast.Expr)
_IMPORTS = (ast.Import, ast.ImportFrom)
_PARSER = doctest.DocTestParser()


@dataclass(frozen=True)
class Example:
    """`expression` prints `output` after `setup` (source lines, possibly empty) ran."""

    setup: str
    expression: str
    output: str


def examples(docstring: str, max_expression: int = 80, max_output: int = 40, max_setup: int = 200) -> Iterator[Example]:
    """The self-contained one-line examples of a docstring. Limits are in characters."""
    if ">>>" not in docstring:
        return
    try:
        found = _PARSER.get_examples(docstring)
    except ValueError:  # inconsistent indentation: not a doctest that Python would run
        return
    history: list[ast.stmt] = []  # understood lines, in order
    known = set(_BUILTINS)  # names that these lines and Python itself define
    for example in found:
        statement = _single_statement(example.source)
        source, output = example.source.strip(), example.want.strip()
        if not isinstance(statement, _UNDERSTOOD) or example.exc_msg is not None:
            history.clear()
            known = set(_BUILTINS)
        elif not _allowed(statement) or not _free_names(statement) <= known:
            known -= _bound_names(statement) - _BUILTINS
        else:
            setup = _setup(statement, history)
            short = len(source) <= max_expression and 0 < len(output) <= max_output and len(setup) <= max_setup
            stable = not any(mark in output for mark in _UNSTABLE) and not example.options
            if isinstance(statement, ast.Expr) and short and stable and "\n" not in source + output:
                yield Example(setup, source, output)
            history.append(statement)
            known |= _bound_names(statement)


def _single_statement(source: str) -> ast.stmt | None:
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    return body[0] if len(body) == 1 else None


def _setup(statement: ast.stmt, history: list[ast.stmt]) -> str:
    """The lines of `history` that `statement` needs, in order. A bare expression on a needed object may change it."""
    modules = {name for earlier in history if isinstance(earlier, _IMPORTS) for name in _bound_names(earlier)}
    needed, lines = _free_names(statement) - _BUILTINS, []
    for earlier in reversed(history):
        free = _free_names(earlier) - _BUILTINS
        if _bound_names(earlier) & needed or (isinstance(earlier, ast.Expr) and free & needed - modules):
            lines.append(ast.unparse(earlier))
            needed = (needed - _bound_names(earlier) if isinstance(earlier, _IMPORTS) else needed) | free
    return "\n".join(reversed(lines))


def _free_names(node: ast.AST) -> set[str]:
    """Names a statement reads, less those its own comprehensions and lambdas bind."""
    names = [item for item in ast.walk(node) if isinstance(item, ast.Name)]
    changed = {node.target.id} if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) else set()
    inner = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
    for item in ast.walk(node):
        if isinstance(item, ast.comprehension):
            inner |= {name.id for name in ast.walk(item.target) if isinstance(name, ast.Name)}
    return {item.id for item in names if isinstance(item.ctx, ast.Load)} - inner | changed


def _bound_names(node: ast.stmt) -> set[str]:
    if isinstance(node, _IMPORTS):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}


def _allowed(node: ast.stmt) -> bool:
    """Whether a line is no import, or imports a pure module."""
    if isinstance(node, ast.Import):
        return all(alias.name.partition(".")[0] in PURE_MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        top = (node.module or "").partition(".")[0]
        return not node.level and top in PURE_MODULES and all(alias.name != "*" for alias in node.names)
    return True
