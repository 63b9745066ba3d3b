"""Unigram language model (Kudo, arXiv 1804.10959): begin with too many pieces, drop those that are missed least.

A text's probability is that of its pieces, drawn independently; a word's is summed over all its segmentations.

    seed    every substring that occurs often enough, scored by count × length
    EM      E: expected count of each piece over all segmentations (forward–backward)
            M: log p = ψ(count) − ψ(total), the Bayesian estimate, which pushes rare pieces towards zero
    prune   the loss of a piece is how much likelihood the corpus loses when the piece is spelled by others;
            keep the best three quarters; single characters always stay
    repeat until the size is reached

**The library differs** in the seed: it looks for substrings shared by two *different* words, so that a word which is
no part of another one never becomes a piece however often it occurs. Here a substring counts as often as its words do.

Encoding finds the most probable segmentation (Viterbi).
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

LONGEST = 16  # characters of a seed piece; SentencePiece's default
KEEP = 0.75  # of the pieces, at each pruning
ROUNDS = 2  # of EM between prunings
RARE = 0.5  # expected counts below this drop a piece


class Edge(NamedTuple):
    """A piece that fits at characters `start … end − 1` of a word."""

    start: int
    end: int
    piece: str
    log_prob: float


def train(words: Mapping[str, int], vocab_size: int, seed_size: int = 20_000) -> dict[str, float]:
    """Pieces and their log-probabilities, most probable first; every character of the corpus is one of them."""
    characters = {character for word in words for character in word}
    pieces = seed(words, seed_size)
    while True:
        for _ in range(ROUNDS):
            pieces = maximize(expect(words, pieces), characters)
        if len(pieces) <= max(vocab_size, len(characters)):
            return dict(sorted(pieces.items(), key=lambda item: (-item[1], item[0])))
        size = max(vocab_size, len(characters), int(KEEP * len(pieces)))
        pieces = prune(words, pieces, characters, size)


def seed(words: Mapping[str, int], size: int) -> dict[str, float]:
    """All characters, and the substrings of two or more with the largest count × length."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + LONGEST) + 1):
                counts[word[start:end]] += n
    scores = {piece: n * len(piece) for piece, n in counts.items()}
    longer = sorted((p for p, n in counts.items() if len(p) > 1 and n > 1), key=lambda p: (-scores[p], p))
    chosen = [piece for piece in counts if len(piece) == 1] + longer[:size]
    total = math.log(sum(scores[piece] for piece in chosen))
    return {piece: math.log(scores[piece]) - total for piece in chosen}


def lattice(word: str, pieces: Mapping[str, float], without: str | None = None, longest: int = LONGEST) -> list[Edge]:
    """Every piece that fits somewhere in `word`, ordered by start, then end."""
    found = []
    for start in range(len(word)):
        for end in range(start + 1, min(len(word), start + longest) + 1):
            piece = word[start:end]
            if piece in pieces and piece != without:
                found.append(Edge(start, end, piece, pieces[piece]))
    return found


def viterbi(edges: list[Edge], length: int) -> tuple[list[Edge], float]:
    """The most probable path through a lattice of `length` characters, and its log-probability (−inf: there is none).

    Edges come ordered by start. best[e] = max over edges (s, e) of best[s] + log p.
    """
    best = [0.0] + [-math.inf] * length
    last: list[Edge | None] = [None] * (length + 1)
    for edge in edges:
        if best[edge.start] + edge.log_prob > best[edge.end]:
            best[edge.end], last[edge.end] = best[edge.start] + edge.log_prob, edge
    path: list[Edge] = []
    edge_back = last[length]
    while edge_back is not None:
        path.append(edge_back)
        edge_back = last[edge_back.start]
    return path[::-1], best[length]


def encode(word: str, pieces: Mapping[str, float]) -> list[str]:
    """The most probable segmentation; [] where a character has no piece."""
    return [edge.piece for edge in viterbi(lattice(word, pieces), len(word))[0]]


def expect(words: Mapping[str, int], pieces: Mapping[str, float]) -> dict[str, float]:
    """Expected count of every piece over all segmentations of the corpus."""
    expected = dict.fromkeys(pieces, 0.0)
    for word, n in words.items():
        edges = lattice(word, pieces)
        forward, backward = _forward(edges, len(word)), _backward(edges, len(word))
        for edge in edges:
            inside = forward[edge.start] + edge.log_prob + backward[edge.end] - forward[-1]
            expected[edge.piece] += n * math.exp(inside)
    return expected


def log_likelihood(words: Mapping[str, int], pieces: Mapping[str, float]) -> float:
    """Natural log-probability of the corpus, summed over all segmentations of each word."""
    return sum(n * _forward(lattice(word, pieces), len(word))[-1] for word, n in words.items())


def maximize(expected: Mapping[str, float], characters: set[str]) -> dict[str, float]:
    """Log-probabilities from expected counts; rare pieces go, characters stay."""
    kept = {piece: max(n, RARE) for piece, n in expected.items() if n >= RARE or piece in characters}
    total = _digamma(sum(kept.values()))
    return {piece: _digamma(n) - total for piece, n in kept.items()}


def prune(words: Mapping[str, int], pieces: Mapping[str, float], characters: set[str], size: int) -> dict[str, float]:
    """The `size` pieces whose loss would hurt most. Loss = Viterbi count × (own log p − log p of its replacement)."""
    used: Counter[str] = Counter()
    for word, n in words.items():
        for piece in encode(word, pieces):
            used[piece] += n
    loss = {}
    for piece in pieces:
        if piece not in characters:
            _, replacement = viterbi(lattice(piece, pieces, without=piece), len(piece))
            loss[piece] = used[piece] * (pieces[piece] - replacement)
    ordered = sorted(loss, key=lambda piece: (-loss[piece], piece))
    kept = {*characters, *ordered[: max(size - len(characters), 0)]}
    return {piece: log_prob for piece, log_prob in pieces.items() if piece in kept}


def _forward(edges: list[Edge], length: int) -> list[float]:
    """α[e] = log Σ over edges (s, e) of exp(α[s] + log p)."""
    total = [0.0] + [-math.inf] * length
    for edge in edges:
        total[edge.end] = _log_add(total[edge.end], total[edge.start] + edge.log_prob)
    return total


def _backward(edges: list[Edge], length: int) -> list[float]:
    """β[s] = log Σ over edges (s, e) of exp(log p + β[e])."""
    total = [-math.inf] * length + [0.0]
    for edge in reversed(edges):
        total[edge.start] = _log_add(total[edge.start], edge.log_prob + total[edge.end])
    return total


def _log_add(a: float, b: float) -> float:
    high, low = (a, b) if a > b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _digamma(x: float) -> float:
    """ψ(x): up by the recurrence to x ≥ 6, then the asymptotic series (error below 1e-8)."""
    shift = 0.0
    while x < 6:
        shift -= 1 / x
        x += 1
    y = 1 / (x * x)
    return shift + math.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y / 240)))
