"""Hugging Face `datasets`: a data set's rows as documents, from the hub or a local folder.

Streaming by default, so that a corpus larger than the disk can be cut short with `max_documents`. The library is an
optional extra; without it the error says how to install it.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.text.documents import Document, Kind
from headspring.text.sources.base import Reading, SourceConfig
from headspring.text.sources.pieces import split_string


class HuggingFaceDataset(SourceConfig):
    """Rows of a Hugging Face data set, one document a row.

    `dataset`: a hub name, a local folder, or a builder such as "json" with `data_files`. `config`, `split`, `revision`
    and `streaming` are those of `datasets.load_dataset`. `text_field` holds the text, `metadata_fields` are kept.
    """

    kind: Literal["datasets"] = "datasets"
    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: list[str] | None = None
    streaming: bool = True
    text_field: str = "text"
    metadata_fields: list[str] = Field(default=[])
    document_kind: Kind = "prose"
    max_document_bytes: int = Field(default=1 << 20, ge=1024)

    def read(self, name: str, reading: Reading) -> Iterator[Document]:
        where = f"datasets:{self.dataset}" + (f"/{self.config}" if self.config else "") + f":{self.split}"
        where += f"@{self.revision}" if self.revision else ""
        reading.opened(name, where)
        for row, values in enumerate(self._rows(where)):
            text = values.get(self.text_field)
            if text is None and self.text_field in values:
                reading.count(name, "rows_without_text")
                continue
            if not isinstance(text, str):
                fields = ", ".join(values)
                raise UserError(f"{where}: no text in field {self.text_field!r} (it has: {fields}); set `text_field`")
            metadata = {"row": row} | {key: values.get(key) for key in self.metadata_fields}
            for part, piece in enumerate(split_string(text, self.max_document_bytes)):
                extra = {"part": part} if part else {}
                group = f"{where}#{row}"
                yield Document(piece, name, self.document_kind, where, group=group, metadata=metadata | extra)

    def _rows(self, where: str) -> Iterator[dict[str, Any]]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise UserError("source `datasets` needs the library: pip install 'headspring[datasets]'") from None
        try:
            yield from load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision,
                data_files=self.data_files, streaming=self.streaming,
            )  # fmt: skip
        except Exception as error:  # the library raises some dozen types, its own and those of its network clients
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            raise UserError(f"{where}: cannot be loaded ({reason}); check name and split") from error
