"""How an n-gram model learns: by counting, once, what the samples of a run show.

The same stream of samples that a neural model would train on decides what is read: `steps` · `batch_size` rows. A row that
comes again in a later epoch is not counted again: Kneser–Ney's discounts rest on how many n-grams were seen just once, and
a second epoch leaves none. Rows that follow one another in the text are joined again, so that a document is cut only where
the run did not read on.
"""

import time
from collections import defaultdict
from itertools import pairwise

import numpy as np
from pydantic import ValidationError

from headspring.artifacts.errors import UserError
from headspring.data.packing import PackedTokens
from headspring.models.ngram import NGram, NGramModule

SECONDS_PER_TOKEN = 5e-6  # counting five orders, on a slow core
READS = frozenset(  # of a pretrain stage's config: what decides which text is counted, and what measures it afterwards
    (
        "model",
        "objective",
        "steps",
        "batch_size",
        "sequence_length",
        "mixture",
        "packing",
        "document_mask",
        "validation_samples",
    )
)


def begun(config: NGram, bos: int | None) -> NGram:
    """`config` for documents that begin with `bos`. Raises `UserError` where its smoothing needs one and there is none."""
    try:
        return NGram.model_validate({**config.model_dump(), "bos": bos})
    except ValidationError:
        raise UserError("kneser_ney needs a tokenizer with a bos token; use smoothing: stupid_backoff") from None


def count(model: NGramModule, data: PackedTokens) -> dict[str, float]:
    """Count what the samples of `data` show, in place; what it took, under the names of `TrainResult.metrics`."""
    started = time.perf_counter()
    documents = seen_documents(data)
    model.count(documents)
    seconds = time.perf_counter() - started
    tokens = sum(map(len, documents))
    return {
        "steps": 1,
        "train_seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "flops": 0.0,  # counting multiplies nothing
    }


def seen_documents(data: PackedTokens) -> list[np.ndarray]:
    """Token ids (n,) int64 of every document that the samples show, or of the parts of it that they show."""
    rows: dict[str, set[int]] = defaultdict(set)
    for index in range(len(data)):
        source, row = data.row_of(index)
        rows[source].add(row)
    found = []
    for source, shown in sorted(rows.items()):
        tokens, table = data.shards.tokens(data.split, source), data.shards.documents(data.split, source)
        for start, end in zip(table.token_start.tolist(), table.token_end.tolist(), strict=True):
            runs = [run for run in data.layouts[source].runs(start, end) if run.row in shown]
            if not runs:
                continue
            gaps = [index for index, (a, b) in enumerate(pairwise(runs), start=1) if a.end != b.start]
            for first, last in pairwise([0, *gaps, len(runs)]):
                found.append(np.asarray(tokens[runs[first].start : runs[last - 1].end], dtype=np.int64))
    return found
