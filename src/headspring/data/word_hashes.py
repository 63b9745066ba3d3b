"""Words and word n-grams as 64-bit numbers, for many documents at once.

Near-duplicate removal and decontamination both compare sequences of words. Looping over words in Python costs about a
microsecond each, so the whole batch becomes one byte array instead: words are the runs between spaces, and a word's
hash is a polynomial in its bytes modulo 2^64, read off a prefix sum as (P[end] − P[start]) · B^(−start) (B is odd, so
its inverse exists). An n-gram's hash is a sum of its words' hashes with one odd multiplier for each position. All of it
is a dozen array operations, the same on every machine and in every process.

Words are compared lower-cased and without punctuation. Scripts written without spaces (Chinese, Japanese, Thai, …)
count each character as a word. Two different words collide with probability about 2^−64; nothing here is safe
against an adversary.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

ASCII_WORDS = bytes(
    ord(chr(code).lower()) if chr(code).isalnum() or code >= 128 else 0x20 for code in range(256)
)  # ASCII punctuation and control characters become spaces; bytes of longer characters stay
NOT_WORD = re.compile(r"[\W_]+")
UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
BASE = 0x9E3779B97F4A7C15
BATCH_BYTES = 1 << 19  # a batch's arrays (8 bytes for each byte of text) should fit in the second-level cache

_random = np.random.default_rng(0x48656164)  # fixed for ever: the numbers define the hashes
BYTE_CODES = _random.integers(1, 2**63, 256, dtype=np.uint64)
POSITION_CODES = _random.integers(1, 2**63, 64, dtype=np.uint64) | np.uint64(1)


class Grams(NamedTuple):
    """Hashes of all documents' n-grams in one array: those of document d are `hashes[offsets[d]:offsets[d + 1]]`.

    hashes: (G,) uint64; offsets: (D + 1,) int64."""

    hashes: np.ndarray
    offsets: np.ndarray

    def of(self, document: int) -> np.ndarray:
        return self.hashes[self.offsets[document] : self.offsets[document + 1]]


def words_of(text: str) -> bytes:
    """The text's words in UTF-8: lower case, punctuation and white space as single-byte spaces (several may follow)."""
    if text.isascii():
        return text.encode("ascii").translate(ASCII_WORDS)
    spaced = UNSPACED.sub(r" \1 ", NOT_WORD.sub(" ", text.lower()))
    return spaced.encode("utf-8", "replace").translate(ASCII_WORDS)


def word_hashes(texts: Sequence[str]) -> Grams:
    """One hash for each word of each text."""
    parts = [words_of(text) for text in texts]
    content = np.frombuffer(b" " + b" ".join(parts) + b" ", dtype=np.uint8)
    is_word = content != 0x20
    edges = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1  # word starts and ends in turns
    starts, ends = edges[0::2], edges[1::2]
    powers, inverse_powers = _powers(len(content))
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(BYTE_CODES[content] * powers, dtype=np.uint64)])
    hashes = mix((prefix[ends] - prefix[starts]) * inverse_powers[starts])
    boundaries = np.cumsum([0, *(len(part) + 1 for part in parts)]) + 1
    return Grams(hashes, np.searchsorted(starts, boundaries).astype(np.int64))


def gram_hashes(texts: Sequence[str], n: int, whole: bool = True) -> Grams:
    """One hash for each run of `n` words; a text with fewer words (but at least one) counts as one gram if `whole`."""
    words = word_hashes(texts)
    count, offsets = len(words.hashes), words.offsets
    sums = np.zeros(count, np.uint64)
    ends = np.repeat(offsets[1:], np.diff(offsets))
    position = np.arange(count)
    for step in range(min(n, count)):
        inside = position[: count - step] + step < ends[: count - step]
        sums[: count - step] += np.where(inside, words.hashes[step:] * POSITION_CODES[step], np.uint64(0))
    keep = position + n <= ends
    if whole:
        starts = np.repeat(offsets[:-1], np.diff(offsets))
        keep |= position == starts
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    return Grams(mix(sums[keep]), kept_before[offsets])


def batches(sizes: Sequence[int], limit: int = BATCH_BYTES) -> Iterator[range]:
    """Ranges of consecutive indices whose sizes sum to about `limit` (at least one index each)."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > limit:
            yield range(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of 64-bit numbers after which every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_power_tables: list[np.ndarray] = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """B^i and B^(−i) modulo 2^64 for i < length; the tables grow with the longest batch seen."""
    if len(_power_tables[0]) < length:
        size = 1 << (length - 1).bit_length()
        for index, base in enumerate((BASE, pow(BASE, -1, 2**64))):
            factors = np.full(size, base, np.uint64)
            factors[0] = 1
            _power_tables[index] = np.cumprod(factors, dtype=np.uint64)
    return _power_tables[0][:length], _power_tables[1][:length]
