"""The commands and the Python that the documentation shows.

A fenced block of language `sh` holds commands, one a line (a backslash continues it). One of language `python` is
compiled, and run where the line `<!-- run -->` stands above it. `<!-- not run: reason -->` above a shell block exempts
it from being run, not from being checked: its verbs and make targets must exist.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>run|not run: [^>]+?) -->\n+)?"
    r"(?P<indent> *)```(?P<language>sh|python)\n(?P<body>.*?)^(?P=indent)```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    mark: str  # "", "run" or "not run: why"
    body: str

    @property
    def commands(self) -> list[str]:
        joined = self.body.replace("\\\n", " ")
        lines = (line.split(" #")[0].strip() for line in joined.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks(text: str, page: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body"))
        indent = len(match["indent"])
        body = "".join(line[indent:] for line in match["body"].splitlines(keepends=True))
        found.append(Block(page, line, match["language"], match["mark"] or "", body))
    return found


def all_blocks(language: str) -> list[Block]:
    pages = [(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))) for page in PAGES]
    return [block for text, page in pages for block in blocks(text, page) if block.language == language]
