"""An n-gram language model with interpolated modified Kneser–Ney smoothing, exact and in NumPy.

What it is: the strongest model that only counts (Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques for
Language Modeling", section 3; the conventions at document borders are those of KenLM). A neural model that does not
beat it has learned nothing that counting would not give.

    p_n(w | h) = (a(hw) − D(a(hw))) / Σ_x a(hx) + γ(h) · p_{n−1}(w | h′)      γ(h) = Σ_x D(a(hx)) / Σ_x a(hx)

a(·) is the count at the highest order and for n-grams that begin with bos; elsewhere it is the number of distinct
tokens seen before the n-gram. D(1), D(2), D(3+) come from the counts of counts of each order:
Y = n₁ / (n₁ + 2 n₂), D(j) = j − (j + 1) · Y · n_{j+1} / n_j. The unigrams are interpolated with the uniform
distribution over all tokens but bos, which is context and never predicted.

How it works: an n-gram is the number of its first n − 1 tokens (an (n−1)-gram) and its last token, packed into one
64-bit integer; sorting these gives the numbers of the next order. No hash tables and no strings, so that five million
tokens take seconds. What it gives up: the model is held whole in memory (about 150 bytes a token of training text),
with no pruning and no quantization.
"""

from collections.abc import Sequence

import numpy as np

from headspring.artifacts import UserError
from headspring.models.ngram.backoff import Table

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # KenLM's, for text so small that the formula leaves [0, j]


class KneserNey:
    """Trained on documents, each a sequence of token ids that begins with `bos` and holds it nowhere else.

    vocab_size: every id is smaller. order: the longest n-gram. Raises `UserError` for documents without a target."""

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int, bos: int, order: int = 5):
        if order < 1:
            raise UserError(f"the n-gram order is {order}; it must be at least 1")
        stream, position = _join(documents)
        if len(stream) == len(documents):
            raise UserError("an n-gram model needs at least one token besides bos to count")
        self.vocab_size, self.bos, self.order = vocab_size, bos, order
        counted = _count(stream, position, vocab_size, order)
        adjusted = _adjust(counted, order)
        self._keys = [keys for keys, *_ in counted]
        self._suffixes = [suffix for *_, suffix in counted]
        # Per n-gram: discounted count. Per context: what was seen after it, and what was taken away.
        self._mass: list[np.ndarray] = []
        self._total: list[np.ndarray] = []
        self._taken: list[np.ndarray] = []
        self.discounts: list[tuple[float, float, float]] = []
        for n, (keys, count) in enumerate(zip(self._keys, adjusted), start=1):
            usable = keys != bos if n == 1 else np.ones(len(keys), bool)  # bos is never predicted
            count = np.where(usable, count, 0)
            self.discounts.append(_discounts(count))
            taken = np.array([0.0, *self.discounts[-1]])[np.minimum(count, 3)]
            context = keys // vocab_size
            size = 1 if n == 1 else len(self._keys[n - 2])
            self._mass.append(count - taken)
            self._total.append(np.bincount(context, count, minlength=size))
            self._taken.append(np.bincount(context, taken, minlength=size))

    @property
    def num_ngrams(self) -> list[int]:
        """Distinct n-grams of order 1, 2, …"""
        return [len(keys) for keys in self._keys]

    def backed_off(self) -> "list[Table]":
        """The same model as tables that back off (see `ngram.backoff`), one an order. What interpolation adds to an n-gram
        is in its probability; γ of its context is the context's weight."""
        unigrams = np.full(self.vocab_size, 0.0 if self._total[0][0] == 0 else self._taken[0][0] / self._total[0][0])
        unigrams /= self.vocab_size - 1
        unigrams[self._keys[0]] += self._mass[0] / self._total[0][0]
        unigrams[self.bos] = 0.0
        tables, names, before = [Table(np.arange(self.vocab_size), unigrams)], self._keys[0], unigrams[self._keys[0]]
        for n in range(2, self.order + 1):
            keys, context = self._keys[n - 1], self._keys[n - 1] // self.vocab_size
            total, taken = self._total[n - 1], self._taken[n - 1]
            shorter = before[self._suffixes[n - 1]]
            before = (self._mass[n - 1] + taken[context] * shorter) / total[context]
            weights = np.ones(len(tables[-1].keys))
            seen = total > 0
            weights[(names if n == 2 else np.arange(len(names)))[seen]] = taken[seen] / total[seen]
            tables[-1].weights = weights
            # Unigrams are numbered by their tokens, and so are the contexts of bigrams.
            renamed = self._keys[0][context] * self.vocab_size + keys % self.vocab_size if n == 2 else keys
            tables.append(Table(renamed, before))
            names = keys
        return tables

    def log_probs(self, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Natural log-probability of every token after the first, for each document: (length − 1,) float64."""
        stream, position = _join(documents)
        with np.errstate(divide="ignore"):  # bos as a target has probability 0
            logs = np.log(self._probabilities(stream, position))
        ends = np.cumsum([len(document) for document in documents])
        return [logs[end - len(document) + 1 : end] for document, end in zip(documents, ends)]

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """(vocab_size,) float64: the probability of each token after `context`, a part of a document."""
        rows = [np.array([*context, word]) for word in range(self.vocab_size)]
        return np.exp([row[-1] for row in self.log_probs(rows)])

    def _probabilities(self, stream: np.ndarray, position: np.ndarray) -> np.ndarray:
        uniform = 1.0 / (self.vocab_size - 1)
        probability = np.where(stream == self.bos, 0.0, uniform)
        context = np.zeros(len(stream), np.int64)  # number of the (n−1)-gram before each token; −1 where never seen
        for n in range(1, self.order + 1):
            number = _find(self._keys[n - 1], context, stream, self.vocab_size)
            total = np.where(context >= 0, self._total[n - 1][context], 0.0)
            seen = (total > 0) & (stream != self.bos)
            mass = np.where(number >= 0, self._mass[n - 1][number], 0.0)
            rest = self._taken[n - 1][context] * probability
            probability = np.divide(mass + rest, total, out=probability.copy(), where=seen)
            context = _shift(number, position, n)
        return probability


def count_ngrams(documents: Sequence[np.ndarray], vocab_size: int, order: int):
    """What `_count` gives, for documents."""
    return _count(*_join(documents), vocab_size, order)


def _join(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in one array, int64, and the position of each within its document."""
    if not documents:
        raise UserError("an n-gram model needs at least one document")
    stream = np.concatenate(documents).astype(np.int64)
    lengths = np.array([len(document) for document in documents])
    return stream, np.arange(len(stream)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _count(
    stream: np.ndarray, position: np.ndarray, vocab_size: int, order: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """For each order: sorted keys, counts, "begins a document", and the number of each n-gram's last n − 1 tokens."""
    counted = []
    before, shorter = np.zeros(len(stream), np.int64), np.zeros(len(stream), np.int64)
    for n in range(1, order + 1):
        valid = np.flatnonzero(position >= n - 1)
        keys, first, inverse, counts = np.unique(
            before[valid] * vocab_size + stream[valid], return_index=True, return_inverse=True, return_counts=True
        )
        number = np.full(len(stream), -1, np.int64)
        number[valid] = inverse
        counted.append((keys, counts, position[valid[first]] == n - 1, shorter[valid[first]]))
        before, shorter = _shift(number, position, n), number
    return counted


def _adjust(counted: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], order: int) -> list[np.ndarray]:
    """a(·): counts at the top and at the beginning of documents, elsewhere the number of distinct tokens before."""
    adjusted = [counts for _, counts, _, _ in counted]
    for n in range(1, order):
        _, counts, begins, _ = counted[n - 1]
        suffix = counted[n][3]
        adjusted[n - 1] = np.where(begins, counts, np.bincount(suffix, minlength=len(counts)))
    return adjusted


def _shift(number: np.ndarray, position: np.ndarray, n: int) -> np.ndarray:
    """The n-gram that ends before each token; −1 where the document is too short for one."""
    shifted = np.full(len(number), -1, np.int64)
    shifted[1:] = number[:-1]
    shifted[position < n] = -1
    return shifted


def _find(keys: np.ndarray, context: np.ndarray, stream: np.ndarray, vocab_size: int) -> np.ndarray:
    """The number of the n-gram `context` + token, −1 where it was never seen."""
    wanted = context * vocab_size + stream
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((context >= 0) & (keys[place] == wanted), place, -1) if len(keys) else np.full(len(stream), -1)


def _discounts(count: np.ndarray) -> tuple[float, float, float]:
    n1, n2, n3, n4 = (int(n) for n in np.bincount(np.minimum(count, 5), minlength=6)[1:5])
    if min(n1, n2, n3) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 <= d <= j for j, d in enumerate(found, start=1)) else FALLBACK_DISCOUNTS
