"""Reading the source as syntax trees: what the rules have in common."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "headspring"


@dataclass(frozen=True)
class Module:
    """One file. `path` is relative to the package: "training/loop.py"."""

    path: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The top-level folder or file: "training", or "__init__" for the package's own."""
        return self.path.split("/")[0].removesuffix(".py")

    def at(self, node: ast.AST, message: str) -> str:
        """A violation, with its place."""
        return f"{self.path}:{getattr(node, 'lineno', 0)}: {message}"

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        """Every call and the text of what is called, such as "torch.load" or "loss.backward"."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield node, ast.unparse(node.func)


def modules(root: Path) -> Iterator[Module]:
    """Every module of the package under `root` (the folder that holds `headspring/`)."""
    package = root / PACKAGE
    for file in sorted(package.rglob("*.py")):
        yield Module(file.relative_to(package).as_posix(), ast.parse(file.read_text(encoding="utf-8"), str(file)))
