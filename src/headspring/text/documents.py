"""The document: the noun that everything shares.

A document is a string and the place it came from. Everything that follows (cleaning, splitting, packing, conversations,
preference pairs) keeps the document's `id`, so that any token of any stage leads back to a file and a byte span.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Kind = Literal["prose", "code"]


@dataclass(frozen=True)
class Document:
    """Text with its provenance.

    `path`, `start`, `end` name the file (or URL) and the byte span [start, end) the text was read from. Where `verbatim`
    is true the span's bytes are exactly `text` in UTF-8, so byte k of the text is byte `start + k` of the file.
    `group` names what must not be split between training and test: by default the file. `synthetic` text was made by a
    template or a model and says so wherever it goes.
    """

    text: str
    source: str
    kind: Kind
    path: str
    start: int = 0
    end: int = 0
    verbatim: bool = False
    language: str | None = None
    synthetic: bool = False
    group: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits that depend on the origin and the text."""
        key = f"{self.source}\0{self.path}\0{self.start}\0{self.end}\0{self.text}"
        return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    @property
    def split_group(self) -> str:
        """The key whose hash decides the split, before near-duplicates join groups together."""
        return self.group or self.path
