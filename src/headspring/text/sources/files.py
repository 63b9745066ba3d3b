"""Files: local paths, folders, globs and every URL that fsspec understands (`hf://`, `s3://`, `https://`, …).

Text and code come verbatim, one document a file (long files in pieces, see `pieces.py`), so that byte k of the text is
byte `start + k` of the file. JSON Lines and Parquet come one document a row. `.gz`, `.bz2`, `.xz` and `.zst` are
decompressed on the way; their spans count decompressed bytes. In a folder, hidden files are left alone and binary files
are skipped and counted; a binary file that is named directly is an error, for then somebody expected text in it.
"""

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.text.documents import Document, Kind
from headspring.text.sources.base import Reading, SourceConfig
from headspring.text.sources.locate import File, failures, first_line, locate
from headspring.text.sources.pieces import BinaryFile, read_pieces, split_string

COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
CODE = """
    .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hpp .cu .java .kt .scala .js .jsx .mjs .ts .tsx .go .rs .rb .php .pl .pm
    .swift .m .mm .cs .fs .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .lua .r .jl .sh .bash .zsh .fish .ps1 .bat
    .sql .html .htm .css .scss .xml .json .yaml .yml .toml .ini .cfg .csv .tsv .cmake .mk .gradle .proto .tf .vue .zig
    .nim .v .vhdl .sv .asm .s .f .f90 .for .pas .d .dart .groovy .tex .bib .diff .patch
"""
CODE_EXTENSIONS = frozenset(CODE.split())
ROW_EXTENSIONS = {".jsonl", ".ndjson", ".parquet"}


class Files(SourceConfig):
    """Text from files.

    `paths`: files, folders, globs or URLs. `text_field`: the column of JSON Lines and Parquet that holds the text.
    `document_kind`: "prose" or "code" instead of judging by the extension. `extensions`: only these, in folders and
    globs. `exclude`: globs of paths to leave out. `errors: replace` accepts invalid UTF-8. `max_document_bytes`: longer
    documents are cut into several, which the split may separate. Raises `UserError` for what is missing, unreadable,
    binary or not UTF-8.
    """

    kind: Literal["files"] = "files"
    paths: list[str] = Field(min_length=1)
    text_field: str = "text"
    document_kind: Kind | None = None
    extensions: list[str] | None = None
    exclude: list[str] = Field(default=[])
    errors: Literal["strict", "replace"] = "strict"
    max_document_bytes: int = Field(default=1 << 16, ge=1024)

    def read(self, name: str, reading: Reading) -> Iterator[Document]:
        for path in self.paths:
            for file in locate(path, self.extensions, self.exclude):
                reading.opened(name, file.name)
                try:
                    yield from self._read_file(file, name, reading)
                except BinaryFile:
                    if file.named:
                        raise UserError(f"{file.name}: binary file (it has NUL bytes); give text files") from None
                    reading.count(name, "binary_files_skipped")
                except UserError:
                    raise
                except (*failures(file.name), EOFError, pa.ArrowInvalid) as error:
                    raise UserError(f"{file.name}: cannot be read ({first_line(error)}); fix or exclude it") from error

    def _read_file(self, file: File, name: str, reading: Reading) -> Iterator[Document]:
        extension = extension_of(file.name)
        if extension == ".parquet":
            yield from self._rows(_parquet_rows(file, self.text_field), file, name)
            return
        with fsspec.core.OpenFile(file.system, file.path, "rb", compression=compression_of(file.name)) as opened:
            if extension in ROW_EXTENSIONS:
                yield from self._rows(_json_rows(opened, file.name, self.text_field), file, name)
                return
            kind = self.document_kind or kind_of(extension)
            for piece in read_pieces(opened, file.name, self.max_document_bytes, self.errors):
                # The pieces of a long file are units of the split of their own: a corpus may be one large file.
                group = f"{file.name}#{piece.start}" if piece.start > self.max_document_bytes // 2 else ""
                span = (piece.start, piece.end)
                yield Document(piece.text, name, kind, file.name, *span, verbatim=piece.exact, group=group)

    def _rows(self, rows: Iterator[tuple[int, int, int, dict[str, Any]]], file: File, name: str) -> Iterator[Document]:
        for row, start, end, values in rows:
            text = values.pop(self.text_field)
            metadata = {"row": row} | {key: value for key, value in values.items() if _is_plain(value)}
            language = values["language"] if isinstance(values.get("language"), str) else None
            for part, piece in enumerate(split_string(text, self.max_document_bytes)):
                yield Document(
                    piece, name, self.document_kind or "prose", file.name, start, end, language=language,
                    group=f"{file.name}#{row}", metadata=metadata | ({"part": part} if part else {}),
                )  # fmt: skip


def extension_of(name: str) -> str:
    """The lower-case extension, not counting that of a compression."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def compression_of(name: str) -> str | None:
    """fsspec's name for the file's compression."""
    return "infer" if PurePosixPath(name.lower()).suffix in COMPRESSIONS else None


def kind_of(extension: str) -> Kind:
    """Code by extension; everything else is prose."""
    return "code" if extension in CODE_EXTENSIONS else "prose"


def _json_rows(file: BinaryIO, name: str, text_field: str) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """(row, start, end, values) of each line that is not blank; the span is the line's, without its end."""
    position = 0
    for row, line in enumerate(file):
        start, position = position, position + len(line)
        content = line.strip()
        if not content:
            continue
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            what = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            raise UserError(f"{name}: line {row + 1} (byte {start}) is {what}; fix or remove it") from None
        if not isinstance(values, dict) or not isinstance(values.get(text_field), str):
            keys = ", ".join(list(values)[:8]) if isinstance(values, dict) else type(values).__name__
            problem = f"line {row + 1} has no text in field {text_field!r} (it has: {keys})"
            raise UserError(f"{name}: {problem}; set `text_field`")
        yield row, start, start + len(line.rstrip(b"\r\n")), values


def _parquet_rows(file: File, text_field: str) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """(row, 0, 0, values): a compressed column has no byte span; `metadata.row` says where the text was."""
    with file.system.open(file.path, "rb") as opened:
        table = pq.ParquetFile(opened)
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(f"{file.name}: no column {text_field!r} (it has: {', '.join(names[:8])}); set `text_field`")
        row = 0
        for batch in table.iter_batches(batch_size=512):
            for values in batch.to_pylist():
                if isinstance(values[text_field], str):  # a null has no text
                    yield row, 0, 0, values
                elif values[text_field] is not None:
                    raise UserError(f"{file.name}: column {text_field!r} does not hold strings; set `text_field`")
                row += 1


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
