"""Byte-pair encoding (Sennrich et al., arXiv 1508.07909): merge the most frequent adjacent pair, again and again.

    low ×5, lower ×2, newest ×6   →   e s ×6   →   es t ×6   →   …

Training looks at distinct words with their counts. Each merge changes only the words that hold the pair, so an index
from pairs to words spares the recount; that is the whole trick of the fast trainers. Ties go to the pair whose two
ids are smallest, left before right, ids being the alphabet in order and then the merges: the library's rule, so that
merges can be compared one by one.

Encoding a word replays the merges in the order in which they were learned (lowest rank first, leftmost first). It is
not a search for the shortest encoding.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

Pair = tuple[str, str]


def train(words: Mapping[str, int], alphabet: Iterable[str], num_merges: int, min_frequency: int = 1) -> list[Pair]:
    """Merges in order. `words`: distinct words with counts; `alphabet`: symbols in the order of their ids.

    Fewer than `num_merges` come back where no pair occurs `min_frequency` times any more.
    """
    ids = {symbol: i for i, symbol in enumerate(alphabet)}
    spelled = [list(word) for word in words]
    counts = list(words.values())
    pairs: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for index, symbols in enumerate(spelled):
        _add(symbols, counts[index], index, pairs, where)
    merges: list[Pair] = []
    while len(merges) < num_merges and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        if pairs[best] < max(min_frequency, 1):
            break
        merges.append(best)
        ids.setdefault("".join(best), len(ids))
        for index in list(where[best]):
            _add(spelled[index], -counts[index], index, pairs, where)
            spelled[index] = merge(spelled[index], best)
            _add(spelled[index], counts[index], index, pairs, where)
        del pairs[best]
    return merges


def _add(symbols: list[str], count: int, index: int, pairs: Counter[Pair], where: dict[Pair, set[int]]) -> None:
    """Add a word's pairs to the statistics, or with a negative count take them out."""
    for pair in itertools.pairwise(symbols):
        pairs[pair] += count
        (where[pair].add if count > 0 else where[pair].discard)(index)


def merge(symbols: Sequence[str], pair: Pair) -> list[str]:
    """Join every occurrence of `pair`, from the left."""
    merged: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


def steps(symbols: Sequence[str], ranks: Mapping[Pair, int]) -> Iterator[tuple[int, Pair, list[str]]]:
    """The merges that happen in a word: (rank, pair, the pieces after it). One occurrence a step, leftmost first."""
    pieces = list(symbols)
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in ranks]
        if not found:
            return
        rank, i = min(found)
        pair = (pieces[i], pieces[i + 1])
        pieces[i : i + 2] = ["".join(pair)]
        yield rank, pair, list(pieces)


def encode(symbols: Sequence[str], ranks: Mapping[Pair, int]) -> list[str]:
    """The pieces of a word."""
    done = list(symbols)
    for _, _, pieces in steps(symbols, ranks):
        done = pieces
    return done
