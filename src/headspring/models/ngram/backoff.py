"""The form in which every n-gram model is kept: probabilities of what was seen, and a weight for what was not.

    p(w | h) = p(hw)                    where hw was seen
               weight(h) · p(w | h′)    elsewhere, h′ being h without its first token

Interpolated models (Kneser–Ney) have this form too: what the lower orders add to a seen n-gram is in its probability
(Chen & Goodman 1998, section 2.7). It is what an ARPA file holds, so that reading and writing one loses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

STUPID_WEIGHT = 0.4


@dataclass
class Table:
    """The n-grams of one order. `keys` (N,) int64, sorted: the number of an n-gram's first n − 1 tokens in the table below,
    times the vocabulary's size, plus its last token; a unigram is its token. `probabilities` (N,) float64. `weights` (N,)
    float64 of the n-gram as a context."""

    keys: np.ndarray
    probabilities: np.ndarray
    weights: np.ndarray = field(default_factory=lambda: np.ones(0))

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.keys):
            self.weights = np.ones(len(self.keys))


def stupid(documents: Sequence[np.ndarray], vocab_size: int, bos: int | None, order: int) -> list[Table]:
    """Stupid backoff (Brants et al. 2007, equation 5): relative frequencies, and 0.4 for each token of context given up.

    Its scores do not sum to 1; a softmax over them does. Tokens never seen get a unigram count of a half, where the paper
    has no answer."""
    from headspring.models.ngram.kneser_ney import count_ngrams

    counted = count_ngrams(documents, vocab_size, order)
    counts = np.full(vocab_size, 0.5)
    counts[counted[0][0]] = counted[0][1]
    if bos is not None:
        counts[bos] = 0.0
    tables = [Table(np.arange(vocab_size), counts / counts.sum())]
    for n in range(2, order + 1):
        keys, numbers = counted[n - 1][:2]
        context = keys // vocab_size
        followed = np.bincount(context, numbers, minlength=len(counted[n - 2][0]))
        weights = np.full(len(tables[-1].keys), STUPID_WEIGHT)
        tables[-1].weights = weights
        if n == 2:
            keys = counted[0][0][context] * vocab_size + keys % vocab_size
        tables.append(Table(keys, numbers / followed[context]))
    return tables
