"""A language model as a compressor: the bits it needs for each byte of held-out text.

    bits per byte = −Σ log₂ p(token) / bytes of text

An arithmetic coder would turn those probabilities into a file of that size (to within two bits), so the number stands
beside `xz` and `zstd`, and it does not depend on the tokenizer. A document is `[bos] + tokens + [eos]`: bos is given,
every other token costs, eos too (a decoder must know where the document ends). A tokenizer without bos begins with
its eos; text of one without either cannot be scored, and `UserError` says so.

A document longer than the context is read in windows that advance by `stride` tokens (by default half a context):
each token is scored once, by the first window that reaches it, so all but a document's first tokens see at least
context − stride tokens before them. A smaller stride gives a lower figure for more work.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import log
from typing import Any, Literal

import numpy as np
import torch

from headspring.artifacts import UserError
from headspring.artifacts.progress import task
from headspring.data.batch import IGNORE
from headspring.models import scoring
from headspring.text.documents import Document

Precision = Literal["auto", "fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Window:
    """Inputs `start … start + length − 1` of row `row`; targets from number `first` of the window on count."""

    row: int
    start: int
    length: int
    first: int


@dataclass(frozen=True)
class DocumentScore:
    """What a document costs: bits, for this many predicted tokens (eos included)."""

    bits: float
    num_tokens: int


def score_documents(
    lm: Any,
    documents: Sequence[Document],
    stride: int | None = None,
    batch_tokens: int = 8192,
    precision: Precision = "auto",
    max_context: int | None = None,
) -> list[DocumentScore]:
    """What each document costs `lm` (an `inference.LanguageModel`).

    batch_tokens: tokens of one forward pass. max_context: use less of the model's context than it has.
    Raises `UserError` for a stride outside 1 … context, and for a tokenizer with neither bos nor eos."""
    context = min(lm.context, max_context or lm.context)
    rows = [np.array(row) for row in sequences(lm.tokenizer, [document.text for document in documents])]
    nats = np.zeros(len(rows))
    windows = sorted(
        (window for row, ids in enumerate(rows) for window in windows_of(row, len(ids) - 1, context, stride)),
        key=lambda window: -window.length,
    )
    with torch.inference_mode(), compute_dtype(lm.model, precision), task("bits per byte", len(windows)) as bar:
        for batch in _batches(windows, batch_tokens):
            scores = _score(lm, rows, batch)
            np.subtract.at(nats, [window.row for window in batch], scores)
            bar.advance(len(batch))
    return [DocumentScore(cost / log(2), len(ids) - 1) for cost, ids in zip(nats.tolist(), rows)]


def sequences(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """`[bos] + tokens + [eos]` of each text."""
    eos = tokenizer.eos_id
    bos = eos if tokenizer.bos_id is None else tokenizer.bos_id
    if bos is None:
        raise UserError("this tokenizer has neither a bos nor an eos token, so the first token of a text has no probability")
    for ids in tokenizer.encode_batch(list(texts)):
        yield [bos, *ids] if eos is None else [bos, *ids, eos]


def windows_of(row: int, num_targets: int, context: int, stride: int | None = None) -> Iterator[Window]:
    """Windows of at most `context` tokens that score each target once. The last one ends with the row."""
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"a stride of {stride} tokens is outside 1 … {context}, the model's context")
    done = 0
    while done < num_targets:
        end = min(num_targets, context if done == 0 else done + stride)
        start = max(0, end - context)
        yield Window(row, start, end - start, done - start)
        done = end


def compute_dtype(model: Any, precision: Precision) -> AbstractContextManager[None]:
    """Activations in this precision inside the block; "auto" keeps the model's own."""
    return nullcontext() if precision == "auto" else model.computing_in(DTYPES[precision])


def continuation_log_probs(
    lm: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 8192
) -> list[float]:
    """log p(continuation | prompt) in nats, summed over the continuation's tokens, for pairs of token ids.

    Raises `UserError` for a pair that is longer than the context."""
    rows = [np.array([*prompt, *continuation]) for prompt, continuation in pairs]
    for row in rows:
        if len(row) - 1 > lm.context:
            raise UserError(f"a prompt and its choice have {len(row)} tokens, the model's context is {lm.context}")
    scores = np.zeros(len(rows))
    windows = [Window(row, 0, len(ids) - 1, len(pairs[row][0]) - 1) for row, ids in enumerate(rows)]
    with torch.inference_mode():
        for batch in _batches(sorted(windows, key=lambda window: -window.length), batch_tokens):
            scores[[window.row for window in batch]] = _score(lm, rows, batch)
    return scores.tolist()


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Runs of windows sorted by length, each run of at most `batch_tokens` with its padding."""
    start = 0
    while start < len(windows):
        size = max(1, batch_tokens // windows[start].length)
        yield list(windows[start : start + size])
        start += size


def _score(lm: Any, rows: Sequence[np.ndarray], windows: Sequence[Window]) -> np.ndarray:
    """Σ log p of each window's targets, (B,) float64. Padding goes to the right, where a causal model never looks."""
    width = max(window.length for window in windows)
    inputs = np.zeros((len(windows), width), np.int64)
    targets = np.full((len(windows), width), IGNORE, np.int64)
    for i, window in enumerate(windows):
        ids = rows[window.row][window.start : window.start + window.length + 1]
        inputs[i, : window.length] = ids[:-1]
        targets[i, window.first : window.length] = ids[1 + window.first :]
    hidden = lm.model(torch.from_numpy(inputs).to(lm.device))
    scores = scoring.log_probs(lm.model, hidden, torch.from_numpy(targets).to(lm.device))
    return scores.double().sum(-1).cpu().numpy()
