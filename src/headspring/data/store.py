"""The document store: one Parquet file with a row for every document ever read, kept or not.

Nothing is deleted by a cleaning rule: a row says what was decided (`decision`), why (`reason`), how the document scored
on each rule (`score.*`) and, for a duplicate, which document stands for it (`survivor`). Whoever wants to know why a
text is missing from the training data asks the table; whoever trains reads the rows whose decision is `keep`.

Parquet (zstd, row groups of about 16 MB) because every tool reads it, DuckDB and polars included. What it gives up:
single rows are not cheap to fetch; readers here stream row groups in file order.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from headspring.artifacts.errors import CorruptArtifact, UserError
from headspring.artifacts.files import open_atomic
from headspring.text.documents import Document, Kind

DOCUMENTS = "documents.parquet"
SPLITS = ("train", "validation", "test")
KEEP = "keep"
DUPLICATES = ("exact_duplicate", "near_duplicate")
ROW_GROUP_BYTES = 16 << 20
ROW_GROUP_ROWS = 8192

FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("text", pa.large_string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("path", pa.string(), nullable=False),
    pa.field("start", pa.int64(), nullable=False),
    pa.field("end", pa.int64(), nullable=False),
    pa.field("verbatim", pa.bool_(), nullable=False),
    pa.field("language", pa.string()),
    pa.field("synthetic", pa.bool_(), nullable=False),
    pa.field("group", pa.string(), nullable=False),
    pa.field("metadata", pa.string(), nullable=False),
    pa.field("split", pa.string()),
    pa.field("decision", pa.string(), nullable=False),
    pa.field("reason", pa.string(), nullable=False),
    pa.field("cluster", pa.string()),
    pa.field("survivor", pa.string()),
]
DOCUMENT_COLUMNS = [field.name for field in FIELDS[:12]]


@dataclass
class Row:
    """A document and what was decided about it.

    `split` is None for what was removed. `cluster` is the id of the cluster's survivor for every member of a duplicate
    cluster, the survivor included; `survivor` is set for removed duplicates only.
    """

    document: Document
    split: str | None = "train"
    decision: str = KEEP
    reason: str = ""
    cluster: str | None = None
    survivor: str | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        return self.decision == KEEP


def schema(scores: Sequence[str] = ()) -> pa.Schema:
    """The table's schema with one float32 column `score.<rule>` for each rule name; null where a rule did not run."""
    return pa.schema([*FIELDS, *(pa.field(f"score.{name}", pa.float32()) for name in scores)])


def write_documents(rows: Iterable[Row | Document], folder: Path, scores: Sequence[str] | None = None) -> Path:
    """Stream `rows` into `folder/documents.parquet`, whole or not at all. Returns the file's path.

    A bare `Document` counts as kept for training. `scores` names the score columns; by default the first row's.
    At most one row group of text is held in memory.
    """
    stream = (row if isinstance(row, Row) else Row(row) for row in rows)
    first = next(stream, None)
    names = list(scores if scores is not None else (first.scores if first else ()))
    table_schema = schema(names)
    path = Path(folder) / DOCUMENTS
    everything = chain([first], stream) if first else iter(())
    with open_atomic(path) as file, pq.ParquetWriter(file, table_schema, compression="zstd") as writer:
        for group in _row_groups(everything):
            writer.write_table(pa.Table.from_pylist([encode(row, names) for row in group], table_schema))
    return path


def read_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every row of the table as a dictionary, in file order; `columns` restricts what is read.

    Raises `UserError` where the file is missing and `CorruptArtifact` where it is not a document table."""
    path = Path(folder) / DOCUMENTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the data stage first")
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=list(columns) if columns is not None else None):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptArtifact(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def read_documents(folder: Path, split: str | None = None, source: str | None = None) -> Iterator[Document]:
    """The kept documents in file order, optionally those of one split ("train", "validation", "test") or one source."""
    if split is not None and split not in SPLITS:
        raise UserError(f"no split named {split!r}; there are {', '.join(SPLITS)}")
    for row in read_rows(folder, [*DOCUMENT_COLUMNS, "split", "decision"]):
        wanted = row["decision"] == KEEP and split in (None, row["split"]) and source in (None, row["source"])
        if wanted:
            yield decode(row)


def survivors(folder: Path) -> dict[str, str]:
    """Id of every removed duplicate → id of the kept document that stands for it.

    A file that was read twice has the same id twice and needs no entry."""
    rows = read_rows(folder, ["id", "survivor"])
    return {row["id"]: row["survivor"] for row in rows if row["survivor"] not in (None, row["id"])}


def decode(row: dict[str, Any]) -> Document:
    """The document in a row read with at least the columns `DOCUMENT_COLUMNS`."""
    values = {name: row[name] for name in DOCUMENT_COLUMNS if name != "id"}
    values["metadata"] = json.loads(row["metadata"])
    values["kind"] = cast(Kind, row["kind"])
    return Document(**values)


def encode(row: Row, scores: Sequence[str]) -> dict[str, Any]:
    """The row as the table stores it."""
    document = row.document
    values: dict[str, Any] = {name: getattr(document, name) for name in DOCUMENT_COLUMNS}
    values["metadata"] = json.dumps(document.metadata, ensure_ascii=False, sort_keys=True)
    values |= {name: getattr(row, name) for name in ("split", "decision", "reason", "cluster", "survivor")}
    values |= {f"score.{name}": row.scores.get(name) for name in scores}
    return values


def _row_groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row.document.text)
        if size >= ROW_GROUP_BYTES or len(group) >= ROW_GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group
