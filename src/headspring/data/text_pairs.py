"""Pairs of texts that belong together, for training embeddings: what a function is said to do, and its source.

    "Return the number of days in a month."  ↔  def monthrange(year, month): …            (its docstring taken out)

The corpus gives them for nothing: whoever wrote a docstring said in words what the code below it does. Two texts that
stand for the same thing in different languages are what contrastive training needs (CodeSearchNet, arXiv 1909.09436, is
made this way). A text that occurs twice is left out, or one of its partners would count as a wrong answer of the other.

What it gives up: only functions whose docstring begins with one sentence of prose, in files that parse.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field

from headspring.artifacts import UserError, Value
from headspring.data.batch import Sample, SampleSource, Visit
from headspring.data.functions import functions
from headspring.data.permutation import Epochs
from headspring.text.documents import Document
from headspring.tokenization.framing import framed
from headspring.tokenization.tokenizer import Tokenizer

MIN_LINES = 3  # of a source; shorter ones say nothing but their name


@dataclass(frozen=True)
class TextPair:
    """`query` and `passage` say the same. Both come from bytes `byte_start` … `byte_end` of the document's text."""

    query: str
    passage: str
    document_id: str
    byte_start: int
    byte_end: int


class PairsConfig(Value):
    """Which pairs to mine (characters), and where their texts are cut (tokens)."""

    max_pairs: int = Field(4000, gt=1)
    max_characters: int = Field(1200, gt=0)
    query_tokens: int = Field(48, gt=2)
    passage_tokens: int = Field(192, gt=2)


def mine_pairs(documents: Iterable[Document], config: PairsConfig, seed: int) -> list[TextPair]:
    """At most `max_pairs` pairs, no text twice, in an order drawn from the seed: the same documents give the same pairs."""
    found: dict[str, TextPair] = {}
    seen: set[str] = set()
    for document in documents:
        for function in functions(document.text, config.max_characters):
            query, passage = function.summary, function.source
            if query and passage.count("\n") >= MIN_LINES - 1 and not seen & {query, passage}:
                span = function.byte_start, function.byte_end
                found[_key(seed, document.id, *span)] = TextPair(query, passage, document.id, *span)
            seen |= {query, passage}
    return [found[key] for key in sorted(found)][: config.max_pairs]


def _key(seed: int, *place: object) -> str:
    return hashlib.blake2b(repr((seed, *place)).encode(), digest_size=16).hexdigest()


@dataclass
class PairBatch:
    """B pairs: tokens (B, T) int64 and left padding (B,) int64 of each side, row i of the one belonging to row i of the
    other."""

    queries: torch.Tensor
    query_padding: torch.Tensor
    passages: torch.Tensor
    passage_padding: torch.Tensor

    def to(self, device: torch.device | str) -> "PairBatch":
        sides = (self.queries, self.query_padding, self.passages, self.passage_padding)
        return PairBatch(*(tensor.to(device) for tensor in sides))


@dataclass(frozen=True)
class PairSample(Sample):
    """A pair as one sample: `inputs` are the query's tokens and then the passage's, `segments` say which (0 and 1)."""


class TextPairs(SampleSource):
    """The pairs again and again, in another order every epoch. `sample(i)` is a pure function of (pairs, seed, i)."""

    def __init__(self, pairs: Sequence[TextPair], tokenizer: Tokenizer, config: PairsConfig, seed: int):
        if len(pairs) < 2:
            raise UserError(f"{len(pairs)} pairs of docstring and source were found; contrastive training needs at least 2")
        self.pairs = list(pairs)
        self.queries = framed(tokenizer, [pair.query for pair in pairs], config.query_tokens)
        self.passages = framed(tokenizer, [pair.passage for pair in pairs], config.passage_tokens)
        self.sequence_length = round(float(np.mean([len(a) + len(b) for a, b in zip(self.queries, self.passages)])))
        self._order = Epochs(len(pairs), seed, "pairs")
        self._pad_id = tokenizer.pad_id or 0

    def sample(self, index: int) -> Sample:
        number = self._order(index)
        query, passage = self.queries[number], self.passages[number]
        tokens = np.array(query + passage, np.int64)
        return PairSample(tokens, tokens, np.repeat(np.array([0, 1], np.int32), [len(query), len(passage)]))

    def where(self, document_id: str, num_samples: int | None = None) -> list[Visit]:
        """Every visit of a document's functions among samples 0 … num_samples − 1 (default: one epoch)."""
        count = len(self.pairs) if num_samples is None else num_samples
        visits = []
        for number, pair in enumerate(self.pairs):
            if pair.document_id == document_id:
                end = len(self.queries[number]) + len(self.passages[number])
                places = self._order.places(number, count)
                visits += [Visit(place, 0, end, pair.byte_start, pair.byte_end) for place in places]
        return sorted(visits, key=lambda visit: (visit.sample, visit.byte_start))

    def collate(self, samples: Sequence[Sample]) -> PairBatch:
        """Stack pairs, each side padded on the left."""
        sides = [[sample.inputs[sample.segments == side] for sample in samples] for side in (0, 1)]
        return PairBatch(*self._padded(sides[0]), *self._padded(sides[1]))

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        tokens = np.stack([np.pad(row, (pads, 0), constant_values=self._pad_id) for row, pads in zip(rows, padding)])
        return torch.from_numpy(tokens), torch.tensor(padding)
