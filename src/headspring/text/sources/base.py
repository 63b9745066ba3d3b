"""What every source of documents has in common: a typed config that can read itself.

A source is a `Value` with a `kind` tag and one method, `read(name, reading)`, that yields documents in an order which
depends on the config and the files alone. What it skipped on the way it counts in `reading.counts`, so that the data
report can say so: nothing disappears silently.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from headspring.artifacts.value import Value
from headspring.text.documents import Document

Profile = Literal["prose", "web", "docstring", "code", "none"]
Generate = Callable[[Sequence[str]], Sequence[str]]  # prompts → one text for each
Bound = tuple[float | None, float | None]


@dataclass
class Reading:
    """One reading of all sources: what they may use, and where they count what they skipped."""

    seed: int = 0
    generate: Generate | None = None
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # source → what → how often
    files: dict[str, set[str]] = field(default_factory=dict)  # source → files opened

    def count(self, source: str, what: str, amount: int = 1) -> None:
        self.counts.setdefault(source, Counter())[what] += amount

    def opened(self, source: str, path: str) -> None:
        self.files.setdefault(source, set()).add(path)


class SourceConfig(Value):
    """Base of every source.

    `profile` names the set of cleaning rules; None takes the source's own default. `rules` changes single thresholds of
    it: rule name → [minimum, maximum], either may be null, or null to switch the rule off.
    `max_documents` stops the source after that many documents.
    """

    profile: Profile | None = None
    rules: dict[str, Bound | None] = Field(default_factory=dict)
    max_documents: int | None = Field(default=None, gt=0)

    def read(self, name: str, reading: Reading) -> Iterator[Document]:
        """Yield this source's documents; `name` becomes their `source`."""
        raise NotImplementedError

    def default_profile(self, document: Document) -> Profile:
        """The cleaning profile of one document where the config names none."""
        return "code" if document.kind == "code" else "prose"


def shuffled(names: Sequence[str]) -> list[str]:
    """`names` in the order of their hashes: the same everywhere, and without the alphabet's bias when cut short."""
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest())
