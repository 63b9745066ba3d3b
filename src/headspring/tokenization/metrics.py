"""Intrinsic measures of a tokenizer, one function each, with the definition it uses.

A *word* is a maximal run of non-space characters (`str.split()`): a definition that reads the same in every script,
and calls a Chinese sentence one word, so that fertility is to be compared within a language only.

None of these predicts a model's quality alone (Rényi efficiency can be gamed, arXiv 2402.14614); bits per byte of a
trained model can.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from headspring.tokenization.tokenizer import Tokenizer

RENYI_ALPHA = 2.5  # Zouhar et al., arXiv 2306.16842


@dataclass(frozen=True)
class CorpusMeasures:
    """One tokenizer on one corpus."""

    bytes: int
    characters: int
    words: int
    tokens: int
    bytes_per_token: float  # of the whole corpus
    mean_bytes_per_token: float  # mean over texts, as TokEval has it
    fertility: float  # tokens per word (Rust et al., arXiv 2012.15613); white space between words counts too
    continued_words: float  # share of words that stand in two or more tokens
    renyi_efficiency: float
    vocabulary_use: float  # share of the ordinary tokens that occur
    unknown: float  # share of tokens that are the unknown token


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> CorpusMeasures:
    """All measures of a corpus. Ratios of an empty corpus are nan."""
    rows = tokenizer.encode_batch_with_spans(texts)
    sizes = np.array([len(text.encode()) for text in texts], float)
    tokens = np.array([len(ids) for ids, _ in rows], float)
    counts = Counter(i for ids, _ in rows for i in ids.tolist())
    words = sum(len(text.split()) for text in texts)
    continued = sum(continued_words(text, spans) for text, (_, spans) in zip(texts, rows))
    ordinary = tokenizer.vocab_size - len(tokenizer.control)
    full = tokens > 0
    return CorpusMeasures(
        bytes=int(sizes.sum()),
        characters=sum(map(len, texts)),
        words=words,
        tokens=int(tokens.sum()),
        bytes_per_token=_ratio(sizes.sum(), tokens.sum()),
        mean_bytes_per_token=float((sizes[full] / tokens[full]).mean()) if full.any() else float("nan"),
        fertility=_ratio(tokens.sum(), words),
        continued_words=_ratio(continued, words),
        renyi_efficiency=renyi_efficiency(counts.values()),
        vocabulary_use=_ratio(len(counts), ordinary),
        unknown=_ratio(counts[tokenizer.unk_id] if tokenizer.unk_id is not None else 0, tokens.sum()),
    )


def continued_words(text: str, spans: np.ndarray) -> int:
    """How many words of `text` are cut by a token boundary. `spans`: (n, 2) byte spans of its tokens."""
    data = text.encode()
    starts, ends = _word_bounds(data)
    cuts = np.unique(spans[:, 0])  # a token that begins strictly inside a word cuts it
    after = np.searchsorted(cuts, starts, side="right")
    before = np.searchsorted(cuts, ends, side="left")
    return int((before > after).sum())


def _word_bounds(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    starts, ends, position = [], [], 0
    for word in data.decode().split():
        encoded = word.encode()
        position = data.index(encoded, position)
        starts.append(position)
        position += len(encoded)
        ends.append(position)
    return np.array(starts, np.int64), np.array(ends, np.int64)


def renyi_efficiency(counts: Iterable[int], alpha: float = RENYI_ALPHA) -> float:
    """H_α(p) / log₂ n over the n token types that occur, H_α = log₂(Σ p^α) / (1 − α); 1 is uniform use.

    As the published scorer does it, n is the observed types, not the vocabulary (arXiv 2306.16842).
    """
    values = np.array([count for count in counts if count > 0], float)
    if len(values) < 2:
        return float("nan")
    shares = values / values.sum()
    entropy = np.log2((shares**alpha).sum()) / (1 - alpha)
    return float(entropy / np.log2(len(values)))


def gini(costs: Sequence[float]) -> float:
    """Σ|c_i − c_j| / (2 n² mean): 0 when every language pays the same for the same content."""
    values = np.asarray(costs, float)
    if len(values) == 0 or values.sum() == 0:
        return float("nan")
    return float(np.abs(values[:, None] - values[None, :]).sum() / (2 * len(values) ** 2 * values.mean()))


@dataclass(frozen=True)
class Parity:
    """A language against English over the same sentences."""

    parity: float  # tokens(language) / tokens(English), whole corpus; 1 is fair (Ali et al., arXiv 2310.08754)
    premium: float  # mean of the ratio over sentences (Petrov et al., arXiv 2305.15425)


def parity(tokenizer: Tokenizer, sentences: Sequence[str], english: Sequence[str]) -> Parity:
    """`sentences[i]` says what `english[i]` says."""
    theirs = np.array([len(ids) for ids in tokenizer.encode_batch(sentences)], float)
    ours = np.array([len(ids) for ids in tokenizer.encode_batch(english)], float)
    return Parity(_ratio(theirs.sum(), ours.sum()), float((theirs / ours).mean()))


@dataclass(frozen=True)
class DigitSplitting:
    """How whole numbers are cut, measured on integers written after a space."""

    mean_tokens: dict[int, float]  # number of digits → tokens
    left_aligned: float  # share of 4- to 6-digit numbers cut in equal groups from the left, as 123|4
    right_aligned: float  # … from the right, as 1|234, which is how place value works
    both: float  # … whichever way one counts, as 12|34 or 1|2|3|4, or not cut at all
    inconsistent: float  # anything else
    longest: int  # digits in one token


def digit_splitting(tokenizer: Tokenizer, per_length: int = 200) -> DigitSplitting:
    """Cuts of integers with one to six digits, evenly spaced over each length."""
    means: dict[int, float] = {}
    kinds: Counter[str] = Counter()
    longest = 0
    for digits in range(1, 7):
        low, high = 10 ** (digits - 1), 10**digits
        numbers = [str(n) for n in range(low, high, max((high - low) // per_length, 1))]
        rows = tokenizer.encode_batch_with_spans([" " + number for number in numbers])
        groups = [_groups(spans, digits) for _, spans in rows]
        means[digits] = float(np.mean([len(group) for group in groups]))
        longest = max(longest, *(max(group) for group in groups))
        if digits >= 4:
            kinds.update(_alignment(group) for group in groups)
    total = kinds.total()
    share = {kind: kinds[kind] / total for kind in ("left", "right", "both", "inconsistent")}
    return DigitSplitting(means, share["left"], share["right"], share["both"], share["inconsistent"], longest)


def _groups(spans: np.ndarray, digits: int) -> list[int]:
    """Digits in each token of " 12345" (the space is byte 0)."""
    cuts = sorted({1, digits + 1, *(int(start) for start in spans[:, 0] if start > 1)})
    return [b - a for a, b in itertools.pairwise(cuts)]


def _alignment(groups: list[int]) -> str:
    size = max(groups)
    left = all(group == size for group in groups[:-1])
    right = all(group == size for group in groups[1:])
    return "both" if left and right else "left" if left else "right" if right else "inconsistent"


@dataclass(frozen=True)
class TokenFaults:
    """Tokens of the vocabulary that can hardly be learned (Land & Bartolo, arXiv 2405.05417). Lists of ids."""

    undecodable: list[int]  # bytes that are no UTF-8 of their own
    unreachable: list[int]  # not among the tokens of its own text, alone or behind a letter, digit or bracket
    never_trained: list[int] | None  # not once in the training corpus; None where none was given


# A piece that only continues a word shows behind one of these.
_ANCHORS = ("", "a", "q", "z", "0", "(")


def token_faults(tokenizer: Tokenizer, training: Iterable[str] | None = None) -> TokenFaults:
    """Control and unknown tokens are left out: no text is meant to give them."""
    skipped = {*tokenizer.control_ids, tokenizer.unk_id}
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in skipped and tokenizer.token(i)]
    undecodable: list[int] = []
    unreached: dict[int, str] = {}
    for i in ordinary:
        try:
            unreached[i] = tokenizer.token_bytes(i).decode("utf-8")
        except UnicodeDecodeError:
            undecodable.append(i)
    for anchor in _ANCHORS:
        rows = tokenizer.encode_batch([anchor + text for text in unreached.values()])
        unreached = {i: text for (i, text), ids in zip(unreached.items(), rows) if i not in ids}
    never = None
    if training is not None:
        counts = token_counts(tokenizer, training)
        never = [i for i in ordinary if counts[i] == 0]
    return TokenFaults(undecodable, list(unreached), never)


def token_counts(tokenizer: Tokenizer, texts: Iterable[str], batch: int = 256) -> np.ndarray:
    """(vocab,) int64: how often each token occurs. Reads the texts once, `batch` at a time."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    rows: list[str] = []
    for text in texts:
        rows.append(text)
        if len(rows) == batch:
            counts += _count(tokenizer, rows)
            rows = []
    return counts + _count(tokenizer, rows)


def _count(tokenizer: Tokenizer, rows: list[str]) -> np.ndarray:
    ids = [np.asarray(row, np.int64) for row in tokenizer.encode_batch(rows)]
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int64)
    return np.bincount(flat, minlength=tokenizer.vocab_size)


def _ratio(a: float, b: float) -> float:
    return float(a) / float(b) if b else float("nan")
