"""Exact and near-duplicate removal: of texts that say the same thing, the first one read stays.

Exact: texts are equal after Unicode NFC and with runs of white space as one space.

Near: MinHash with FineWeb's parameters (arXiv:2406.17557, appendix E.1): the set of a document's 5-word shingles, 112
hash functions in 14 bands of 8. Two documents with Jaccard similarity s share at least one band with probability
1 − (1 − s^8)^14, one half at s ≈ 0.70, 92 % at 0.8. Unlike FineWeb we then *check*: a pair that shares a band is a
duplicate only if the true Jaccard similarity of its shingle sets is at least `threshold`, so that precision does not
depend on luck. Duplicates of duplicates form one cluster (union–find), and the survivor is the cluster's first document
in reading order: nothing depends on hashing order, threads or the machine.

Within a band's bucket a document is compared with the bucket's leaders, the documents that matched none before them.
That is all pairs for a bucket of strangers and linear for a bucket of copies. What it gives up: in a bucket, two
leaders' groups that a later document would join through both are joined through one only.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from pydantic import Field

from headspring.artifacts.value import Value
from headspring.data.word_hashes import gram_hashes, mix


class DeduplicationConfig(Value):
    """`exact`, `near`: which duplicates to remove; both are found in any case, for no split may separate them.
    `threshold`: the Jaccard similarity of shingle sets from which on two documents are near-duplicates.
    `bands` × `rows` hash functions over shingles of `shingle_words` words."""

    exact: bool = True
    near: bool = True
    threshold: float = Field(default=0.7, gt=0, le=1)
    shingle_words: int = Field(default=5, ge=1, le=64)
    bands: int = Field(default=14, ge=1)
    rows: int = Field(default=8, ge=1)


@dataclass(frozen=True)
class Cluster:
    """Documents (indices, ascending) that are near-duplicates of each other through a chain; the first one survives."""

    members: list[int]

    @property
    def survivor(self) -> int:
        return self.members[0]


class UnionFind:
    """Disjoint sets of 0 … n − 1; a set's root is its smallest member."""

    def __init__(self, size: int):
        self.parent = list(range(size))

    def root(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = item = self.parent[self.parent[item]]
        return item

    def union(self, first: int, second: int) -> None:
        low, high = sorted((self.root(first), self.root(second)))
        self.parent[high] = low

    def sets(self) -> list[list[int]]:
        """All sets with more than one member, each ascending, ordered by root."""
        members: dict[int, list[int]] = {}
        for item in range(len(self.parent)):
            members.setdefault(self.root(item), []).append(item)
        return [items for items in members.values() if len(items) > 1]


def content_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space or Unicode composition only."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return blake2b(" ".join(composed.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def band_keys(texts: Sequence[str], config: DeduplicationConfig) -> tuple[np.ndarray, np.ndarray]:
    """(keys, has_words): the MinHash band keys of each text, (D, bands) uint64, and whether it has any word, (D,) bool.

    Hash function k maps a shingle x to (a_k · x + b_k) mod 2^64 with odd a_k, which permutes the 64-bit numbers; the
    document's k-th minimum is over its shingles. A band's key mixes its rows' minima and the band's number."""
    shingles = gram_hashes(texts, config.shingle_words)
    has_words = np.diff(shingles.offsets) > 0
    keys = np.zeros((len(texts), config.bands), np.uint64)
    if not has_words.any():
        return keys, has_words
    random = np.random.default_rng(0x6D696E68)
    multipliers = random.integers(1, 2**63, (config.bands, config.rows), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    increments = random.integers(0, 2**63, (config.bands, config.rows), dtype=np.uint64)
    starts = shingles.offsets[:-1][has_words]  # texts without words have no shingles, so the segments stay contiguous
    values = np.empty_like(shingles.hashes)
    for band in range(config.bands):
        key = np.full(len(starts), band, np.uint64)
        for row in range(config.rows):
            np.multiply(shingles.hashes, multipliers[band, row], out=values)
            np.add(values, increments[band, row], out=values)
            key = mix(key ^ np.minimum.reduceat(values, starts))
        keys[has_words, band] = key
    return keys, has_words


def near_duplicates(
    keys: np.ndarray, text: Callable[[int], str], config: DeduplicationConfig, advance: Callable[[], object] = int
) -> list[Cluster]:
    """Clusters of near-duplicates among documents 0 … D − 1 in reading order.

    keys: (D, bands) uint64 of `band_keys`, `text(i)`: document i's text, read again only for candidate pairs;
    `advance` is called once for each band."""
    groups = UnionFind(len(keys))
    shingles = _ShingleCache(text, config.shingle_words)
    for band in range(keys.shape[1]):
        for bucket in _buckets(keys[:, band]):
            leaders: list[int] = []
            for document in bucket:
                if not any(_join(groups, shingles, leader, document, config.threshold) for leader in leaders):
                    leaders.append(document)
        advance()
    return [Cluster(members) for members in groups.sets()]


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted arrays of distinct numbers; 0 for two empty ones."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - both
    return both / union if union else 0.0


def similarity(first: str, second: str, config: DeduplicationConfig) -> float:
    """The Jaccard similarity of two texts' shingle sets."""
    sets = [np.unique(gram_hashes([text], config.shingle_words).hashes) for text in (first, second)]
    return jaccard(*sets)


class _ShingleCache:
    """The shingle sets of the documents compared last; a bucket's neighbours are compared close together."""

    CAPACITY = 4096

    def __init__(self, text: Callable[[int], str], words: int):
        self.text, self.words = text, words
        self.sets: dict[int, np.ndarray] = {}

    def __getitem__(self, document: int) -> np.ndarray:
        found = self.sets.get(document)
        if found is None:
            if len(self.sets) >= self.CAPACITY:
                del self.sets[next(iter(self.sets))]
            found = self.sets[document] = np.unique(gram_hashes([self.text(document)], self.words).hashes)
        return found


def _buckets(keys: np.ndarray) -> Iterator[list[int]]:
    """Groups of documents with the same key, ascending within a group; documents that are alone are left out."""
    order = np.argsort(keys, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(keys[order])) + 1, [len(keys)]])
    for group in np.flatnonzero(np.diff(starts) > 1).tolist():
        yield order[starts[group] : starts[group + 1]].tolist()


def _join(groups: UnionFind, shingles: _ShingleCache, leader: int, document: int, threshold: float) -> bool:
    if groups.root(leader) == groups.root(document):
        return True
    first, second = shingles[leader], shingles[document]
    if min(len(first), len(second)) < threshold * max(len(first), len(second)):
        return False  # the Jaccard similarity is at most the ratio of sizes
    if jaccard(first, second) < threshold:
        return False
    groups.union(leader, document)
    return True
