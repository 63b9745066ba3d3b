"""WordPiece (Schuster & Nakajima 2012; BERT, arXiv 1810.04805): merge the pair that helps the likelihood most.

Where BPE takes the pair with the largest count, WordPiece takes the largest

    count(ab) / (count(a) · count(b))

which is the gain in log-likelihood of a unigram model per merged occurrence. It prefers parts that rarely occur
without each other. Pieces inside a word are written with `##`.

**The library differs**: `tokenizers.trainers.WordPieceTrainer` is its BPE trainer (largest count) on an alphabet with
`##`; Google's own trainer was never published. The tests show both: the library's vocabulary equals reference BPE's on
that alphabet, and differs from this one. A pair seen once whose parts occur nowhere else has the best possible score,
so `min_frequency` matters here far more than in BPE.

Encoding is greedy: the longest piece of the vocabulary that begins the rest of the word. A word with a rest that
nothing begins becomes one unknown token.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping

Pair = tuple[str, str]
CONTINUATION = "##"


def spell(word: str) -> list[str]:
    """A word's first symbols: the first character, and every other with `##`."""
    return [word[0], *(CONTINUATION + character for character in word[1:])]


def join(left: str, right: str) -> str:
    """Two neighbours as one piece."""
    return left + right.removeprefix(CONTINUATION)


def train(words: Mapping[str, int], vocab_size: int, min_frequency: int = 2) -> list[str]:
    """The vocabulary in order: the alphabet sorted, then each merge's piece. Ties go to the first pair by text."""
    spelled = {word: spell(word) for word in words if word}
    vocab = sorted({symbol for symbols in spelled.values() for symbol in symbols})
    known = set(vocab)
    while len(vocab) < vocab_size:
        pairs, symbols = count(spelled, words)
        scores = {pair: n / (symbols[pair[0]] * symbols[pair[1]]) for pair, n in pairs.items() if n >= min_frequency}
        if not scores:
            break
        best = min(scores, key=lambda pair: (-scores[pair], pair))
        piece = join(*best)
        if piece not in known:
            known.add(piece)
            vocab.append(piece)
        spelled = {word: _merge(pieces, best, piece) for word, pieces in spelled.items()}
    return vocab


def count(spelled: Mapping[str, list[str]], words: Mapping[str, int]) -> tuple[Counter[Pair], Counter[str]]:
    """How often each pair and each symbol occurs."""
    pairs: Counter[Pair] = Counter()
    symbols: Counter[str] = Counter()
    for word, pieces in spelled.items():
        for piece in pieces:
            symbols[piece] += words[word]
        for pair in itertools.pairwise(pieces):
            pairs[pair] += words[word]
    return pairs, symbols


def _merge(pieces: list[str], pair: Pair, joined: str) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(pieces):
        hit = (*pieces[i : i + 2],) == pair
        merged.append(joined if hit else pieces[i])
        i += 2 if hit else 1
    return merged


def encode(word: str, vocab: Collection[str], unknown: str, continuation: str = CONTINUATION) -> list[str]:
    """The pieces of a word, longest match first; `[unknown]` where the rest of the word matches nothing."""
    pieces: list[str] = []
    start = 0
    while start < len(word):
        prefix = continuation if start else ""
        end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in vocab), None)
        if end is None:
            return [unknown]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces
