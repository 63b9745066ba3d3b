"""The embedded default: text that lies on every machine that has Python and torch.

- `stdlib`: the standard library's own source, verbatim, without its tests. About 10 MB of code.
- `topics`: the language reference that `help()` shows, one document a topic. About 0.5 MB of English.
- `docstrings`: docstrings of installed packages, with name, signature and byte span. About 14 MB of technical English
  in the packages that torch brings.

Files are parsed with `ast` and never imported: reading a package runs none of its code. Paths are recorded relative to
the library or package ("stdlib:json/decoder.py"), so that a corpus has the same hash wherever Python is installed.
A docstring shares its file's group, so that no split separates it from the source it stands in.
"""

import ast
import importlib.util
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.text.documents import Document
from headspring.text.sources.base import Profile, Reading, SourceConfig, shuffled

STANDARD_LIBRARY = "stdlib"
TESTS = frozenset({"test", "tests", "testing", "idle_test", "__pycache__", "site-packages", "dist-packages"})
# idlelib and turtledemo are applications; pydoc_data is the text of `topics` in another form; _bundled holds wheels.
NOT_LIBRARY = TESTS | {"idlelib", "turtledemo", "pydoc_data", "_bundled", "lib-dynload"}
MACHINE_SPECIFIC = ("_sysconfigdata", "_sysconfig_vars")  # written when Python was built
UTF8_BOM = b"\xef\xbb\xbf"

Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class StandardLibrary(SourceConfig):
    """The source files of this Python's standard library: verbatim code, one document a file.

    `modules` restricts it to those top-level modules or packages, such as `[json, statistics]`."""

    kind: Literal["stdlib"] = "stdlib"
    modules: list[str] | None = None

    def read(self, name: str, reading: Reading) -> Iterator[Document]:
        for path, file in python_files(STANDARD_LIBRARY):
            if self.modules is not None and file.parts[0].removesuffix(".py") not in self.modules:
                continue
            content = path.read_bytes()
            start = len(UTF8_BOM) if content.startswith(UTF8_BOM) else 0
            try:
                text = content[start:].decode("utf-8")
            except UnicodeDecodeError:
                reading.count(name, "files_not_utf8")  # a few files of old releases declare another encoding
                continue
            where = f"{STANDARD_LIBRARY}:{file.as_posix()}"
            reading.opened(name, where)
            yield Document(text, name, "code", where, start, len(content), verbatim=True)


class Topics(SourceConfig):
    """Python's language reference as `pydoc_data.topics` holds it: English prose, one document a topic."""

    kind: Literal["topics"] = "topics"

    def read(self, name: str, reading: Reading) -> Iterator[Document]:
        file = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
        if not file.is_file():
            reading.count(name, "topics_missing")  # slim distributions leave the module out
            return
        content = file.read_bytes()
        where = f"{STANDARD_LIBRARY}:pydoc_data/topics.py"
        reading.opened(name, where)
        line_starts = _line_starts(content)
        for table in (node for node in ast.walk(ast.parse(content)) if isinstance(node, ast.Dict)):
            for key, value in zip(table.keys, table.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    start, end = _span(value, line_starts)
                    text, topic = value.value.strip("\n"), str(key.value)
                    group = f"{where}#{topic}"
                    yield Document(text, name, "prose", where, start, end, group=group, metadata={"topic": topic})

    def default_profile(self, document: Document) -> Profile:
        return "docstring"


class Docstrings(SourceConfig):
    """Docstrings of installed packages, examples (doctests) included: prose, one document a docstring.

    `packages` are import names, or "stdlib". `max_bytes` bounds the text taken from each package; files are then
    visited in the order of their hashes, so that the sample spreads over the package. `min_characters` leaves out
    what is too short to say anything. A document's metadata holds `name` (qualified), `object` (module, class or
    function) and `signature` (None for modules). Raises `UserError` for a package that is not installed.
    """

    kind: Literal["docstrings"] = "docstrings"
    packages: list[str] = Field(default=["torch", "sympy", "networkx", "numpy"], min_length=1)
    max_bytes: int | None = Field(default=2_000_000, gt=0)
    min_characters: int = Field(default=40, ge=1)

    def read(self, name: str, reading: Reading) -> Iterator[Document]:
        for package in self.packages:
            taken = 0
            for path, file in python_files(package):
                where = f"{package}:{file.as_posix()}"
                for document in self._read_file(path, where, name, reading):
                    taken += len(document.text.encode("utf-8", "surrogatepass"))
                    if self.max_bytes is not None and taken > self.max_bytes:
                        break
                    yield document
                if self.max_bytes is not None and taken > self.max_bytes:
                    break

    def default_profile(self, document: Document) -> Profile:
        return "docstring"

    def _read_file(self, path: Path, where: str, name: str, reading: Reading) -> Iterator[Document]:
        content = path.read_bytes()
        if b'"""' not in content and b"'''" not in content:
            return  # parsing is most of the work, and a one-line docstring is too short anyway
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):
            reading.count(name, "files_not_python")  # templates and files for other versions of Python
            return
        reading.opened(name, where)
        line_starts = _line_starts(content)
        for owner, qualified in _owners(tree, module_name(where)):
            literal = owner.body[0].value if owner.body and isinstance(owner.body[0], ast.Expr) else None
            if not isinstance(literal, ast.Constant) or not isinstance(literal.value, str):
                continue
            text = inspect.cleandoc(literal.value)
            if len(text) >= self.min_characters and not _has_surrogate(text):
                start, end = _span(literal, line_starts)
                metadata = {"name": qualified, "object": _object(owner), "signature": signature(owner)}
                yield Document(text, name, "prose", where, start, end, metadata=metadata)


def python_files(package: str) -> list[tuple[Path, Path]]:
    """(absolute path, path relative to the package's folder) of a package's own `.py` files, without its tests.

    The standard library comes in alphabetical order, a package in the order of `shuffled`. Raises `UserError` where the
    package is not installed or has no Python source."""
    if package == STANDARD_LIBRARY:
        root, excluded = Path(sysconfig.get_paths()["stdlib"]), NOT_LIBRARY
    else:
        root, excluded = _package_folder(package), TESTS
    relative = [path.relative_to(root) for path in root.rglob("*.py") if path.is_file()]
    names = [path.as_posix() for path in relative if _is_library(path, excluded)]
    if not names:
        raise UserError(f"{package}: no Python source in {root}; name another package")
    ordered = sorted(names) if package == STANDARD_LIBRARY else shuffled(names)
    return [(root / name, Path(name)) for name in ordered]


def module_name(where: str) -> str:
    """`"sympy:core/add.py"` → `"sympy.core.add"`; the standard library's modules have no prefix."""
    package, _, file = where.partition(":")
    parts = file.removesuffix(".py").split("/")
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if package == STANDARD_LIBRARY else [package, *parts])


def signature(owner: Owner) -> str | None:
    """`name(arguments) -> returns` as the source writes it; of a class, its `__init__`'s. None where there is none."""
    if isinstance(owner, ast.Module):
        return None
    if isinstance(owner, ast.ClassDef):
        functions = [node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        return f"{owner.name}({ast.unparse(functions[0].args)})" if functions else None
    returns = f" -> {ast.unparse(owner.returns)}" if owner.returns else ""
    return f"{owner.name}({ast.unparse(owner.args)}){returns}"


def _package_folder(package: str) -> Path:
    try:
        # Only top-level names: finding "a.b" would import "a", and reading must run no foreign code.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise UserError(f"docstrings: package {package!r} is not installed; install it or remove it from `packages`")
    return Path(locations[0])


def _is_library(path: Path, excluded: frozenset[str]) -> bool:
    if path.name.startswith(MACHINE_SPECIFIC) or path.parts[0].startswith("config-"):
        return False
    return excluded.isdisjoint(path.parts) and not path.name.startswith("test_") and path.name != "conftest.py"


def _owners(tree: ast.Module, module: str) -> Iterator[tuple[Owner, str]]:
    """Everything that can own a docstring, with its qualified name, in order of appearance."""
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, name = stack.pop()
        if isinstance(node, Owner):
            yield node, name
        for child in reversed(list(ast.iter_child_nodes(node))):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((child, f"{name}.{child.name}"))
            elif isinstance(child, ast.stmt | ast.excepthandler):
                stack.append((child, name))


def _object(owner: Owner) -> str:
    if isinstance(owner, ast.Module):
        return "module"
    return "class" if isinstance(owner, ast.ClassDef) else "function"


def _line_starts(content: bytes) -> list[int]:
    """Byte offset at which each line starts, by the line ends that Python's parser counts."""
    starts, position = [0], 0
    for line in content.splitlines(keepends=True):  # of bytes: splits at \n, \r and \r\n only
        position += len(line)
        starts.append(position)
    return starts


def _span(node: ast.expr, line_starts: list[int]) -> tuple[int, int]:
    """The node's byte span in the file; the parser's columns are UTF-8 bytes already."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    return line_starts[node.lineno - 1] + node.col_offset, line_starts[node.end_lineno - 1] + node.end_col_offset


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else False
