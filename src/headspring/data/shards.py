"""Token shards: the corpus as flat arrays of token ids, and for every token the document and bytes it came from.

A folder holds, for each split and source, `tokens.bin` (uint16, or uint32 for vocabularies above 65,536), `spans.bin`
(uint32 pairs: the byte span of each token in its document's text), `documents.parquet` (id, token_start, token_end,
bytes); and once `duplicates.parquet` (removed id → survivor id) and `shards.json`, the index with counts and the hash
of every file. A document is `[bos] + tokens + [eos]` where the tokenizer has them; control tokens have an empty span.

Why flat arrays: a sample is one slice of a memory map, and the inverse is a binary search. The index is written last,
so a folder without it is a folder that was never finished. What it gives up: spans take four times the space of the
tokens; that is the price of an exact answer to "where was this seen?", which cannot be added later.
"""

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from headspring.artifacts import CorruptArtifact, UserError, Value
from headspring.artifacts.files import read_json, sha256_file, write_json
from headspring.artifacts.progress import task
from headspring.data.store import KEEP, SPLITS, read_rows, survivors

INDEX = "shards.json"
FILES = ("tokens.bin", "spans.bin", "documents.parquet")
DUPLICATES = "duplicates.parquet"
FORMAT = 1
AGAIN = "run the tokens stage again"


class TokensConfig(Value):
    """`batch_bytes`: text encoded at a time; what bounds the memory of the stage."""

    batch_bytes: int = Field(default=4 << 20, ge=1)


@dataclass(frozen=True)
class DocumentTable:
    """The documents of a split and source in stream order; d is tokens `token_start[d]` … `token_end[d]` − 1."""

    ids: np.ndarray  # (D,) bytes, ASCII
    token_start: np.ndarray  # (D,) int64
    token_end: np.ndarray  # (D,) int64
    bytes: np.ndarray  # (D,) int64, of the text in UTF-8

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids, kind="stable")

    def find(self, document_id: str) -> list[int]:
        """The documents that have this id: none, one, or several where the same file was read twice."""
        key = document_id.encode()
        low = np.searchsorted(self.ids, key, side="left", sorter=self._order)
        high = np.searchsorted(self.ids, key, side="right", sorter=self._order)
        return sorted(self._order[low:high].tolist())


def write_tokens(config: TokensConfig, data_folder: Path, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Encode every kept document of `data_folder` into token shards at `folder`, in one pass and bounded memory.

    Returns documents, tokens, bytes and bytes per token: in all, and for each split and source. Documents that yield no
    token at all (empty text, a tokenizer without control tokens) are left out and counted as `empty`.
    Raises `UserError` where no document was kept."""
    folder, data_folder = Path(folder), Path(data_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # an old index must never describe new files
    started, empty = time.perf_counter(), 0
    writers: dict[tuple[str, str], _Writer] = {}
    kept = sum(row["decision"] == KEEP for row in read_rows(data_folder, ["decision"]))
    with ExitStack() as stack, task("documents to tokens", total=kept) as running:
        for batch in _batches(data_folder, config.batch_bytes):
            encoded = tokenizer.encode_batch_with_spans([row["text"] for row in batch])
            for row, (ids, spans) in zip(batch, encoded):
                place = (row["split"], row["source"])
                if place not in writers:
                    writers[place] = stack.enter_context(_Writer(folder, *place, tokenizer))
                empty += not writers[place].add(row["id"], ids, spans, len(row["text"].encode()))
                running.advance()
    counts = {place: writer.counts for place, writer in sorted(writers.items()) if writer.counts["tokens"]}
    if not counts:
        raise UserError(f"{data_folder}: no document was kept, so there is nothing to tokenize; see its report.json")
    _write_duplicates(folder, survivors(data_folder))
    write_json(folder / INDEX, _index(folder, counts, tokenizer))
    return _metrics(counts, empty, time.perf_counter() - started)


class TokenShards:
    """Reads a folder made by `write_tokens`, memory-mapped. Opening checks files' sizes, `verify` their hashes.

    Raises `UserError` where `folder` holds no shards, `CorruptArtifact`, naming the file, where one is damaged."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise UserError(f"{self.folder}: no {INDEX}, so no finished token shards; run the tokens stage first")
        try:
            index = read_json(self.folder / INDEX)
            if index["format"] != FORMAT:
                raise UserError(f"{self.folder}: shards of format {index['format']}, not {FORMAT}; {AGAIN}")
            self.dtype = np.dtype(index["dtype"])
            self.vocab_size: int = index["vocab_size"]
            self.tokenizer_sha256: str = index["tokenizer_sha256"]
            self.control: dict[str, int | None] = index["control"]  # "bos", "eos", "pad" → id
            self._counts: dict[str, dict[str, dict[str, Any]]] = index["splits"]
            self._files: dict[str, dict[str, Any]] = index["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtifact(f"{self.folder / INDEX}: not an index of token shards ({error!r}); {AGAIN}") from error
        self._open: dict[tuple[str, str, str], Any] = {}
        for name, recorded in self._files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != recorded["bytes"]:
                size = f"{path.stat().st_size:,} bytes" if path.is_file() else "missing"
                raise CorruptArtifact(f"{path}: {size}, {INDEX} records {recorded['bytes']:,}; {AGAIN}")

    def __reduce__(self):
        return TokenShards, (self.folder,)  # a worker process maps the files itself

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if split in self._counts)

    def sources(self, split: str) -> tuple[str, ...]:
        """The sources that have tokens in `split`, by name."""
        return tuple(self._counts.get(split, ()))

    def num_tokens(self, split: str, source: str | None = None) -> int:
        """Tokens, control tokens included; of all sources where `source` is None."""
        return self._sum(split, source, "tokens")

    def num_documents(self, split: str, source: str | None = None) -> int:
        return self._sum(split, source, "documents")

    def bytes(self, split: str, source: str | None = None) -> int:
        """Bytes of text in UTF-8; of all sources where `source` is None."""
        return self._sum(split, source, "bytes")

    def tokens(self, split: str, source: str) -> np.memmap:
        """(N,) uint16 or uint32: all documents of a source, one after the other."""
        return self._map(split, source, "tokens", self.dtype, (-1,))

    def spans(self, split: str, source: str) -> np.memmap:
        """(N, 2) uint32: the bytes [start, end) of its document's text that each token stands for."""
        return self._map(split, source, "spans", np.dtype("<u4"), (-1, 2))

    def documents(self, split: str, source: str) -> DocumentTable:
        """The documents of a source, in the order of its tokens."""
        key = (split, source, "documents")
        if key not in self._open:
            columns = _read_parquet(self._path(split, source, "documents.parquet"))
            ids, *rest = (columns[name].to_numpy() for name in ("id", "token_start", "token_end", "bytes"))
            self._open[key] = DocumentTable(ids.astype(np.bytes_), *rest)
        return self._open[key]

    def document_at(self, split: str, source: str, token: int) -> str:
        """The id of the document that token `token` of a source's stream belongs to."""
        if not 0 <= token < self.num_tokens(split, source):
            raise IndexError(f"token {token} of {self.num_tokens(split, source)} in {split}/{source}")
        documents = self.documents(split, source)
        return documents.ids[np.searchsorted(documents.token_start, token, side="right") - 1].decode()

    def find(self, document_id: str) -> list[tuple[str, str, int]]:
        """(split, source, number in `documents`) of a document, or of the survivor of a removed duplicate."""
        document_id = self.duplicates.get(document_id, document_id)
        places = [(split, source) for split in self.splits for source in self.sources(split)]
        return [(*place, number) for place in places for number in self.documents(*place).find(document_id)]

    @cached_property
    def duplicates(self) -> dict[str, str]:
        """Removed duplicate's id → id of the document that was kept in its place."""
        columns = _read_parquet(self.folder / DUPLICATES)
        return dict(zip(columns["id"].to_pylist(), columns["survivor"].to_pylist()))

    def verify(self) -> None:
        """Read every file and raise `CorruptArtifact`, naming the first whose hash is not the recorded one."""
        for name, recorded in self._files.items():
            if sha256_file(self.folder / name) != recorded["sha256"]:
                raise CorruptArtifact(f"{self.folder / name}: content differs from its hash in {INDEX}; {AGAIN}")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `UserError` unless `tokenizer` is the one that made these shards."""
        if tokenizer_sha256(tokenizer) != self.tokenizer_sha256:
            raise UserError(f"{self.folder}: made with another tokenizer; {AGAIN}")

    def _sum(self, split: str, source: str | None, what: str) -> int:
        sources = self._counts.get(split, {})
        return sum(counts[what] for name, counts in sources.items() if source in (None, name))

    def _path(self, split: str, source: str, name: str) -> Path:
        if source not in self.sources(split):
            there = ", ".join(self.sources(split)) or "none"
            raise UserError(f"{self.folder}: the {split} split has no source '{source}'; it has {there}")
        return self.folder / _folder(split, source) / name

    def _map(self, split: str, source: str, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        key = (split, source, name)
        if key not in self._open:
            self._open[key] = np.memmap(self._path(split, source, f"{name}.bin"), dtype, "r").reshape(shape)
        return self._open[key]


class _Writer:
    """Appends documents to one split and source; on leaving, the files are complete and on disk."""

    def __init__(self, folder: Path, split: str, source: str, tokenizer: Any):
        self.folder = folder / _folder(split, source)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dtype = _dtype(tokenizer.vocab_size)
        self.bos, self.eos = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}
        self._table: dict[str, list[Any]] = {"id": [], "token_start": [], "token_end": [], "bytes": []}
        self._tokens: IO[bytes] = open(self.folder / "tokens.bin", "wb")  # noqa: SIM115 (closed in __exit__)
        self._spans: IO[bytes] = open(self.folder / "spans.bin", "wb")  # noqa: SIM115

    def add(self, document_id: str, ids: np.ndarray, spans: np.ndarray, size: int) -> bool:
        """Append `[bos] + ids + [eos]`; False where that is nothing at all. `size` is the text's length in bytes."""
        if size >= 1 << 32:
            raise UserError(f"document {document_id} has {size:,} bytes, more than a span holds; split it")
        length = len(self.bos) + len(ids) + len(self.eos)
        if length == 0:
            return False
        self._tokens.write(np.concatenate([self.bos, ids, self.eos]).astype(self.dtype).tobytes())
        before, after = np.zeros((len(self.bos), 2)), np.full((len(self.eos), 2), size)
        self._spans.write(np.concatenate([before, np.reshape(spans, (-1, 2)), after]).astype("<u4").tobytes())
        start = self.counts["tokens"]
        for name, value in zip(self._table, (document_id, start, start + length, size)):
            self._table[name].append(value)
        for name, value in zip(self.counts, (1, length, size)):
            self.counts[name] += value
        return True

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *failure: Any) -> None:
        for file in (self._tokens, self._spans):
            with file:
                file.flush()
                os.fsync(file.fileno())
        types = {name: pa.string() if name == "id" else pa.int64() for name in self._table}
        table = pa.table(self._table, schema=pa.schema(types))
        pq.write_table(table, self.folder / "documents.parquet", compression="zstd")


def tokenizer_sha256(tokenizer: Any) -> str:
    """The hash of the `tokenizer.json` that `tokenizer.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return sha256_file(Path(folder) / "tokenizer.json")


def _batches(data_folder: Path, batch_bytes: int) -> Iterator[list[dict[str, Any]]]:
    """Kept rows of all splits in file order, about `batch_bytes` of text at a time."""
    rows: Iterable[dict[str, Any]] = read_rows(data_folder, ["id", "text", "source", "split", "decision"])
    batch, size = [], 0
    for row in rows:
        if row["decision"] != KEEP:
            continue
        batch.append(row)
        size += len(row["text"])
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _index(folder: Path, counts: dict[tuple[str, str], dict[str, int]], tokenizer: Any) -> dict[str, Any]:
    names = [f"{_folder(*place)}/{name}" for place in counts for name in FILES]
    splits: dict[str, dict[str, dict[str, int]]] = {}
    for (split, source), count in counts.items():
        splits.setdefault(split, {})[source] = count
    return {
        "format": FORMAT,
        "dtype": _dtype(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "control": {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id},
        "splits": splits,
        "files": {name: _describe(folder / name) for name in [*names, DUPLICATES]},
    }


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _metrics(counts: dict[tuple[str, str], dict[str, int]], empty: int, seconds: float) -> dict[str, Any]:
    total = {what: sum(count[what] for count in counts.values()) for what in ("documents", "tokens", "bytes")}
    splits: dict[str, dict[str, dict[str, float]]] = {}
    for (split, source), count in counts.items():
        splits.setdefault(split, {})[source] = {**count, "bytes_per_token": count["bytes"] / count["tokens"]}
    ratios = {"bytes_per_token": total["bytes"] / total["tokens"], "bytes_per_second": total["bytes"] / seconds}
    return {**total, **ratios, "empty": empty, "splits": splits}


def _write_duplicates(folder: Path, duplicates: dict[str, str]) -> None:
    columns = {"id": list(duplicates), "survivor": list(duplicates.values())}
    schema = pa.schema({"id": pa.string(), "survivor": pa.string()})
    pq.write_table(pa.table(columns, schema=schema), folder / DUPLICATES, compression="zstd")


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptArtifact(f"{path}: not a readable Parquet file; {AGAIN}") from error


def _folder(split: str, source: str) -> str:
    """Where a source lies; its name is quoted, so that it can neither leave the folder nor meet another's."""
    return f"{split}/{quote(source, safe='').replace('.', '%2E')}"


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
