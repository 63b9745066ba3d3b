"""The contestants of the two tokenizing rows of benchmarks/data.py: encoding in memory, and token shards on disk.

All use one vocabulary, trained here by `headspring` on the benchmark's own text: `tokenizers` gets the `tokenizer.json`,
`tiktoken` the same tokens as ranks. Control tokens are left out of what is compared; everything else must be equal, id by id.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from headspring.artifacts import progress
from headspring.data.shards import TokensConfig, TokenShards, write_tokens
from headspring.data.store import Row, write_documents
from headspring.text.documents import Document
from headspring.tokenization import Tokenizer, TokenizerConfig, train_tokenizer

Ids = np.ndarray  # (n,) of all documents, one after the other, without control tokens
VOCAB = 4096


class World:
    """The tokenizer, and the texts where each contestant reads them."""

    def __init__(self, texts: list[str], folder: Path):
        self.texts, self.folder = texts, folder
        self.tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=VOCAB))
        self.tokenizer.save(folder / "tokenizer")
        documents = [Document(text, "b", "prose", str(number)) for number, text in enumerate(texts)]
        write_documents([Row(document, "train") for document in documents], folder / "data", scores=())

    @property
    def json(self) -> str:
        return str(self.folder / "tokenizer" / "tokenizer.json")

    def plain(self, ids: np.ndarray) -> Ids:
        return ids[~np.isin(ids, list(self.tokenizer.control_ids))].astype(np.int64)


def joined(rows: list[Any]) -> Ids:
    return np.concatenate([np.asarray(row, np.int64) for row in rows])


def headspring_encoding(world: World) -> Callable[[], Callable[[], Ids]]:
    tokenizer = Tokenizer.load(world.folder / "tokenizer")

    def run() -> Callable[[], Ids]:
        rows = tokenizer.encode_batch(world.texts)
        return lambda: joined(rows)

    return run


def tokenizers_encoding(world: World) -> Callable[[], Callable[[], Ids]]:
    """Used plainly: `encode_batch`, then the ids."""
    from tokenizers import Tokenizer as Library

    library = Library.from_file(world.json)

    def run() -> Callable[[], Ids]:
        rows = [encoding.ids for encoding in library.encode_batch(world.texts, add_special_tokens=False)]
        return lambda: joined(rows)

    return run


def tokenizers_fast_encoding(world: World) -> Callable[[], Callable[[], Ids]]:
    """Its best flag: no offsets."""
    from tokenizers import Tokenizer as Library

    library = Library.from_file(world.json)

    def run() -> Callable[[], Ids]:
        rows = [encoding.ids for encoding in library.encode_batch_fast(world.texts, add_special_tokens=False)]
        return lambda: joined(rows)

    return run


def tiktoken_encoding(world: World) -> Callable[[], Callable[[], Ids]]:
    import tiktoken

    vocab, control = world.tokenizer.description["model"]["vocab"], world.tokenizer.control
    ranks = {world.tokenizer.token_bytes(i): i for token, i in vocab.items() if token not in control}
    pattern = world.tokenizer.description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    encoding = tiktoken.Encoding("benchmark", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def run() -> Callable[[], Ids]:
        rows = [encoding.encode_ordinary(text) for text in world.texts]
        return lambda: joined(rows)

    return run


def headspring_shards(world: World) -> Callable[[], Callable[[], Ids]]:
    """From the documents' table to shards with spans, hashed and synced to disk."""
    tokenizer = Tokenizer.load(world.folder / "tokenizer")

    def run() -> Callable[[], Ids]:
        folder = Path(tempfile.mkdtemp(dir=world.folder))
        with progress.quiet():
            write_tokens(TokensConfig(), world.folder / "data", tokenizer, folder)
        return lambda: world.plain(TokenShards(folder).tokens("train", "b"))

    return run


def tokenizers_shards(world: World) -> Callable[[], Callable[[], Ids]]:
    """What a plain script does: encode everything, write 16-bit ids to a file. No spans, no index, no hashes."""
    from tokenizers import Tokenizer as Library

    library = Library.from_file(world.json)

    def run() -> Callable[[], Ids]:
        path = Path(tempfile.mkdtemp(dir=world.folder)) / "tokens.bin"
        with open(path, "wb") as file:
            for encoding in library.encode_batch_fast(world.texts, add_special_tokens=True):
                file.write(np.asarray(encoding.ids, np.uint16).tobytes())
        return lambda: world.plain(np.fromfile(path, np.uint16))

    return run


def datatrove_shards(world: World) -> Callable[[], Callable[[], Ids]]:
    """Its tokenizing step, without shuffling; the loader's index is written, spans are not."""
    import spacy  # noqa: F401 - imported by datatrove when the first document comes
    from datatrove.data import Document as Page
    from datatrove.pipeline.tokens import DocumentTokenizer

    def pages() -> Iterator[Any]:
        return (Page(text=text, id=str(number)) for number, text in enumerate(world.texts))

    def run() -> Callable[[], Ids]:
        folder = tempfile.mkdtemp(dir=world.folder)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            step = DocumentTokenizer(folder, tokenizer_name_or_path=world.json, eos_token="<|eos|>", shuffle_documents=False)
            step.run(pages(), 0, 1)
        (path,) = Path(folder).glob("*.ds")
        return lambda: world.plain(np.fromfile(path, np.uint16))

    return run


ENCODING = {
    "headspring": headspring_encoding,
    "tokenizers": tokenizers_encoding,
    "tokenizers, fast": tokenizers_fast_encoding,
    "tiktoken": tiktoken_encoding,
}
SHARDS = {"headspring": headspring_shards, "tokenizers": tokenizers_shards, "datatrove": datatrove_shards}
