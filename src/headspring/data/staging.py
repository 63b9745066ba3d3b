"""Documents on their way through the data stage: on disk, memory-mapped, with random access by number.

Reading and cleaning stream through here into an Arrow file; deduplication and decontamination look single texts up
again; at the end the decisions are joined to the rows, batch by batch, and written as `documents.parquet`. So memory
holds what is *known* about each document (some hundred bytes) and never the texts, whatever the corpus's size. The
price is the corpus once more on disk, uncompressed, for as long as the stage runs.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headspring.artifacts.files import open_atomic
from headspring.data.store import DOCUMENTS, Row, encode, schema

BATCH_ROWS = 1024
BATCH_BYTES = 8 << 20
DECIDED = ("split", "decision", "reason", "cluster", "survivor")


@dataclass
class Decisions:
    """The final value of every column in `DECIDED`, one entry a document, in reading order."""

    split: list[str | None]
    decision: list[str]
    reason: list[str]
    cluster: list[str | None]
    survivor: list[str | None]


class Staging:
    """Append rows, `seal`, look texts up, `write`. A context manager: the file is gone afterwards."""

    def __init__(self, folder: Path, scores: Sequence[str]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.scores = folder / ".staging.arrow", list(scores)
        self.schema = schema(self.scores)
        self._writer = pa.ipc.new_file(str(self.path), self.schema)
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._batches: list[pa.RecordBatch] = []
        self._starts: list[int] = []

    def append(self, row: Row) -> None:
        self._pending.append(encode(row, self.scores))
        self._pending_bytes += len(row.document.text)
        if len(self._pending) >= BATCH_ROWS or self._pending_bytes >= BATCH_BYTES:
            self._flush()

    def seal(self) -> None:
        """No more rows; from here on texts can be read."""
        self._flush()
        self._writer.close()
        self._map = pa.memory_map(str(self.path))
        reader = pa.ipc.open_file(self._map)
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        total = 0
        for batch in self._batches:
            self._starts.append(total)
            total += batch.num_rows

    def value(self, column: str, index: int) -> Any:
        """One cell of document number `index`."""
        number = bisect_right(self._starts, index) - 1
        return self._batches[number].column(column)[index - self._starts[number]].as_py()

    def text(self, index: int) -> str:
        return self.value("text", index)

    def write(self, folder: Path, decisions: Decisions) -> None:
        """`folder/documents.parquet`, the staged rows with their decisions, whole or not at all."""
        with open_atomic(folder / DOCUMENTS) as file, pq.ParquetWriter(file, self.schema, compression="zstd") as writer:
            for group in self._groups():
                writer.write_table(pa.Table.from_batches([self._decided(number, decisions) for number in group]))

    def _groups(self) -> Iterator[list[int]]:
        """Batches that make one row group: about 8,192 rows or 16 MB."""
        group: list[int] = []
        rows = size = 0
        for number, batch in enumerate(self._batches):
            group.append(number)
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows >= 8 * BATCH_ROWS or size >= 2 * BATCH_BYTES:
                yield group
                group, rows, size = [], 0, 0
        if group:
            yield group

    def _decided(self, number: int, decisions: Decisions) -> pa.RecordBatch:
        batch, start = self._batches[number], self._starts[number]
        for name in DECIDED:
            values = getattr(decisions, name)[start : start + batch.num_rows]
            column = self.schema.get_field_index(name)
            batch = batch.set_column(column, self.schema.field(name), pa.array(values, pa.string()))
        return batch

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, self.schema))
            self._pending, self._pending_bytes = [], 0

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
        self._batches = []
        self.path.unlink(missing_ok=True)
