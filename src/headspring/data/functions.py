"""What can be read off a Python function without running it: the facts that questions are made of.

A module is parsed with `ast`, never imported. Every function short enough to stand in a prompt becomes a `Function`:
its own source text (docstring taken out, indentation removed) and the facts a reader could find in that text. The byte
span leads back to the document. Names, defaults and expressions are slices of the source, not `ast.unparse` output, so
that an answer is always written the way the prompt writes it. What this gives up: documents that do not parse (Python
2, fragments of a file) yield nothing, and a fact spread over several lines is left out.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


@dataclass(frozen=True)
class Function:
    """One function of a document. `byte_start`, `byte_end`: its bytes in the document's UTF-8 text."""

    name: str
    source: str  # without docstring and decorators, dedented
    header: str  # `def name(...):`, or "" where it does not fit on one line
    parameters: tuple[str, ...]  # in order, `*args` and `**kwargs` with their stars
    defaults: tuple[tuple[str, str], ...]  # (parameter, default as written)
    returned: str  # the only returned expression, or ""
    raised: str  # the only exception class raised, or ""
    local_names: tuple[str, ...]  # identifiers of the body that are not parameters
    summary: str  # first line of the docstring, or ""
    byte_start: int
    byte_end: int


class SourceText:
    """A module's text with `ast` positions (1-based lines, UTF-8 byte columns) turned into byte offsets."""

    def __init__(self, text: str):
        self.bytes = text.encode("utf-8", "surrogatepass")
        lines = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", self.bytes)  # the line breaks of Python's own parser
        self.line_starts = [0, *accumulate(map(len, lines))]

    def start(self, node: ast.stmt | ast.expr) -> int:
        return self.line_starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.stmt | ast.expr) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None  # true for everything `ast.parse` made
        return self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def slice(self, node: ast.stmt | ast.expr) -> str:
        return self.bytes[self.start(node) : self.end(node)].decode("utf-8", "surrogatepass")

    def line_slice(self, node: ast.expr) -> str:
        """The node's text, or "" where it takes more than one line."""
        return self.slice(node) if node.lineno == node.end_lineno else ""


def parse(text: str) -> ast.Module | None:
    """The module's tree, or None where the text is not Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources are not our user's concern
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def functions(text: str, max_source_characters: int) -> Iterator[Function]:
    """The functions and methods of a module whose source (docstring removed) is at most that long, in order."""
    tree = parse(text)
    if tree is None:
        return
    source = SourceText(text)
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode):
            found = _function(node, source, max_source_characters)
            if found is not None:
                yield found


def docstrings(text: str) -> Iterator[tuple[str, int, int]]:
    """Every docstring of a module with the byte span of its literal."""
    tree = parse(text)
    if tree is None:
        return
    source = SourceText(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            literal = _docstring_node(node)
            content = ast.get_docstring(node)
            if literal is not None and content:
                yield content, source.start(literal), source.end(literal)


def _function(node: FunctionNode, source: SourceText, limit: int) -> Function | None:
    text = _without_docstring(node, source)
    if text is None or len(text) > limit or "\x0c" in text:
        return None
    parameters, defaults = _parameters(node.args, source)
    names = {name.lstrip("*") for name in parameters}
    inside = [item for statement in node.body for item in _own_nodes(statement)]
    identifiers = {item.id for item in inside if isinstance(item, ast.Name)}
    return Function(
        name=node.name,
        source=text,
        header=_header(node, text),
        parameters=tuple(parameters),
        defaults=tuple(defaults),
        returned=_returned(inside, source),
        raised=_raised(inside),
        local_names=tuple(sorted(identifiers - names - {node.name})),
        summary=_summary(ast.get_docstring(node)),
        byte_start=source.start(node),
        byte_end=source.end(node),
    )


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and what is below it, without the inside of nested functions and classes."""
    yield node
    if not isinstance(node, _NESTED):
        for child in ast.iter_child_nodes(node):
            yield from _own_nodes(child)


def _docstring_node(node: ast.Module | ast.ClassDef | FunctionNode) -> ast.stmt | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first
    return None


def _without_docstring(node: FunctionNode, source: SourceText) -> str | None:
    """The function's text without its docstring; None where nothing would be left or the docstring shares a line."""
    start, end = source.start(node), source.end(node)
    line_start = source.line_starts[node.lineno - 1]
    indent = b" " * (start - line_start)  # so that dedent sees the first line as deep as the others
    literal = _docstring_node(node)
    if literal is None:
        whole = source.bytes[start:end]
    else:
        if len(node.body) == 1 or literal.lineno == node.lineno or node.body[1].lineno == literal.end_lineno:
            return None
        before = source.bytes[start : source.line_starts[literal.lineno - 1]]
        after = source.bytes[source.line_starts[literal.end_lineno or 0] : end]
        whole = before + after.lstrip(b"\r\n")
    text = (indent + whole).decode("utf-8", "surrogatepass").replace("\r\n", "\n")
    return textwrap.dedent(text.expandtabs(8)).strip()


def _header(node: FunctionNode, text: str) -> str:
    first = text.partition("\n")[0].rstrip()
    return first if first.endswith(":") and node.body[0].lineno > node.lineno and "#" not in first else ""


def _parameters(arguments: ast.arguments, source: SourceText) -> tuple[list[str], list[tuple[str, str]]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    given = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    pairs = [*zip(positional, given), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    names = [item.arg for item in positional]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [item.arg for item in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    defaults = [(item.arg, source.line_slice(value)) for item, value in pairs if value is not None]
    return names, [(name, value) for name, value in defaults if value]


def _returned(inside: list[ast.AST], source: SourceText) -> str:
    if any(isinstance(item, (ast.Yield, ast.YieldFrom)) for item in inside):
        return ""
    returns = [item for item in inside if isinstance(item, ast.Return)]
    return source.line_slice(returns[0].value) if len(returns) == 1 and returns[0].value is not None else ""


def _raised(inside: list[ast.AST]) -> str:
    classes = set()
    for item in inside:
        if isinstance(item, ast.Raise) and item.exc is not None:
            target = item.exc.func if isinstance(item.exc, ast.Call) else item.exc
            if not isinstance(target, ast.Name) or not target.id[0].isupper():
                return ""  # a variable or an attribute: no class to name
            classes.add(target.id)
    return classes.pop() if len(classes) == 1 else ""


def _summary(docstring: str | None) -> str:
    """The docstring's first line where it is one sentence of prose."""
    first, _, rest = (docstring or "").strip().partition("\n")
    first, below = first.strip(), rest.partition("\n")[0].strip()
    return first if len(first.split()) >= 3 and first.isascii() and not below else ""
