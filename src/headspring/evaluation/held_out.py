"""Which documents a measurement is made on: the same ones for every model, baseline and run of the same data.

The choice depends on the documents' ids alone, not on a seed, so that a model's bits per byte and those of `xz` are
about the same bytes. `fingerprint` goes into the metrics of both; where it differs, the numbers must not be compared.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from headspring.artifacts import UserError, Value
from headspring.data.store import read_documents
from headspring.text.documents import Document

Split = Literal["train", "validation", "test"]


class HeldOut(Value):
    """The documents of `split`, or as many of them as fit in `max_bytes` of UTF-8 text (null: all of them)."""

    split: Split = "test"
    max_bytes: int | None = Field(default=1_000_000, gt=0)


def held_out(data_folder: Path, config: HeldOut) -> list[Document]:
    """The chosen documents in file order. Raises `UserError` where the split has no text."""
    documents = [document for document in read_documents(data_folder, split=config.split) if document.text]
    if not documents:
        raise UserError(f"{data_folder}: the {config.split} split is empty, so nothing can be measured; enlarge its share")
    if config.max_bytes is None:
        return documents
    chosen, total = set[int](), 0
    order = sorted(range(len(documents)), key=lambda index: documents[index].id)  # an id is a hash: a random order
    for index in order:
        size = num_bytes(documents[index])
        if not chosen or total + size <= config.max_bytes:
            chosen.add(index)
            total += size
    return [documents[index] for index in sorted(chosen)]


def num_bytes(document: Document) -> int:
    """The length of the text in UTF-8."""
    return len(document.text.encode())


def fingerprint(documents: Sequence[Document]) -> str:
    """16 hexadecimal digits that name this list of documents."""
    return hashlib.blake2b("".join(document.id for document in documents).encode(), digest_size=8).hexdigest()


def by_source(documents: Sequence[Document], bits: Sequence[float]) -> dict[str, float]:
    """Bits per byte in all ("all") and for each source, from the bits each document costs."""
    sums: dict[str, tuple[float, int]] = {}
    for document, cost in zip(documents, bits, strict=True):
        for name in ("all", document.source):
            total, size = sums.get(name, (0.0, 0))
            sums[name] = (total + cost, size + num_bytes(document))
    return {name: total / size for name, (total, size) in sums.items()}
