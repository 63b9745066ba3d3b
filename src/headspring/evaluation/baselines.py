"""What held-out text costs without a neural network: `xz -9`, `zstd -19`, and a 5-gram model over our own tokens.

All are bits per byte of the same documents that the model is evaluated on (`held_out.py`).
- `xz`, `zstd`: the documents concatenated, one stream; by source, one stream a source. Nothing is known beforehand,
  which is unfair to them: the model has read the training text.
- `xz_primed`, `zstd_primed`: they may see the training text first. xz: size of (training + held-out) − size of
  (training), with a dictionary that holds all of it. zstd: the training text as a raw dictionary.
- `kneser_ney_5gram`: modified Kneser–Ney (`models.ngram.kneser_ney`) trained on the tokens of the training split, scored as the
  model is: bos given, every token and the eos predicted.
"""

import lzma
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from pydantic import Field

from headspring.artifacts import UserError, Value
from headspring.artifacts.files import write_json
from headspring.artifacts.progress import task
from headspring.data.shards import TokenShards
from headspring.data.store import read_documents
from headspring.evaluation.held_out import HeldOut, by_source, fingerprint, held_out, num_bytes
from headspring.models.ngram.kneser_ney import KneserNey
from headspring.text.documents import Document

XZ_LARGEST_DICTIONARY = 1536 << 20


class BaselinesConfig(Value):
    """`held_out` must be that of the evaluation. `primed_bytes` bounds the training text that xz and zstd see first
    (its end; 0: they see none), `ngram_tokens` that which the n-gram model counts: both cost time and memory."""

    held_out: HeldOut = HeldOut()
    order: int = Field(default=5, ge=1, le=8)
    primed_bytes: int = Field(default=32 << 20, ge=0)
    ngram_tokens: int = Field(default=20_000_000, gt=0)


def baselines(config: BaselinesConfig, data_folder: Path, tokens_folder: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Bits per byte of every baseline, in all ("all") and by source; written to `folder/baselines.json` and returned.

    Nothing here is random; `seed` is accepted because every stage has one, and changes nothing."""
    documents = held_out(data_folder, config.held_out)
    measurements: dict[str, Callable[[], dict[str, float]]] = {
        "xz": lambda: _streams(documents, xz_bits),
        "zstd": lambda: _streams(documents, zstd_bits),
        f"kneser_ney_{config.order}gram": lambda: kneser_ney(config, documents, TokenShards(tokens_folder)),
    }
    if config.primed_bytes:
        training = _training_text(data_folder, config.primed_bytes)
        stream = _join(documents)
        measurements["xz_primed"] = lambda: {"all": xz_bits(stream, training) / len(stream)}
        measurements["zstd_primed"] = lambda: {"all": zstd_bits(stream, training) / len(stream)}
    metrics: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    with task("baselines", len(measurements)) as bar:
        for name, measure in measurements.items():
            bar.describe(f"baselines: {name}")
            started = time.perf_counter()
            metrics[name] = measure()
            seconds[name] = time.perf_counter() - started
            bar.advance()
    size = sum(map(num_bytes, documents))
    metrics["held_out"] = {"documents": len(documents), "bytes": size, "fingerprint": fingerprint(documents)}
    metrics["seconds"] = seconds
    write_json(Path(folder) / "baselines.json", {name: metrics[name] for name in metrics if name != "seconds"})
    return metrics


def xz_bits(text: bytes, training: bytes = b"") -> float:
    """Bits of `xz -9`; with `training`, what `text` adds behind it when the dictionary holds both."""
    if not training:
        return 8.0 * len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9))
    dictionary = min(XZ_LARGEST_DICTIONARY, max(1 << 20, len(training) + len(text)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))

    with ThreadPoolExecutor(2) as pool:  # liblzma lets go of the interpreter lock
        both, alone = pool.map(size, (training + text, training))
    return 8.0 * (both - alone)


def zstd_bits(text: bytes, training: bytes = b"") -> float:
    """Bits of `zstd -19`; with `training`, as a raw dictionary within a window that holds both."""
    window = max(20, (len(training) + len(text)).bit_length())
    if window > zstandard.WINDOWLOG_MAX:
        raise UserError(f"baselines.primed_bytes: {len(training):,} bytes do not fit in a zstd window; lower it")
    if not training:
        return 8.0 * len(zstandard.ZstdCompressor(level=19).compress(text))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, source_size=len(text), dict_size=len(training), window_log=window, enable_ldm=True
    )
    dictionary = zstandard.ZstdCompressionDict(training, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return 8.0 * len(zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(text))


def kneser_ney(config: BaselinesConfig, documents: Sequence[Document], shards: TokenShards) -> dict[str, float]:
    """Bits per byte of the n-gram model trained on the shards' training split."""
    bos = shards.control["bos"]
    if bos is None:  # a tokenizer without bos is lent an id to begin documents with
        begin, vocab_size = shards.vocab_size, shards.vocab_size + 1
    else:
        begin, vocab_size = bos, shards.vocab_size

    def add(tokens: np.ndarray) -> np.ndarray:
        return tokens if bos is not None else np.concatenate([[begin], tokens])

    training: list[np.ndarray] = []
    for source in shards.sources("train"):
        tokens, table = shards.tokens("train", source), shards.documents("train", source)
        training += [add(tokens[start:end]) for start, end in zip(table.token_start, table.token_end)]
    if not training:
        raise UserError(f"{shards.folder}: the train split has no tokens, so there is no n-gram model to compare with")
    total = sum(map(len, training))
    every = -(-total // config.ngram_tokens)  # too much text: every second, third, … document
    model = KneserNey(training[::every], vocab_size, begin, config.order)
    scores = model.log_probs([add(_tokens_of(shards, document)) for document in documents])
    return by_source(documents, [-score.sum() / log(2) for score in scores])


def _tokens_of(shards: TokenShards, document: Document) -> np.ndarray:
    for split, source, number in shards.find(document.id):
        table = shards.documents(split, source)
        return shards.tokens(split, source)[table.token_start[number] : table.token_end[number]]
    raise UserError(f"{shards.folder}: no tokens of held-out document {document.id}; run the tokens stage again")


def _streams(documents: Sequence[Document], bits: Callable[[bytes], float]) -> dict[str, float]:
    """Bits per byte of all documents as one stream, and of each source as one."""
    groups = {"all": list(documents)}
    for document in documents:
        groups.setdefault(document.source, []).append(document)
    streams = {name: _join(group) for name, group in groups.items()}
    return {name: bits(stream) / len(stream) for name, stream in streams.items()}


def _join(documents: Sequence[Document]) -> bytes:
    return b"".join(document.text.encode() for document in documents)


def _training_text(data_folder: Path, limit: int) -> bytes:
    """The end of the training text, at most `limit` bytes."""
    text = b"".join(document.text.encode() for document in read_documents(data_folder, split="train"))
    return text[-limit:]
