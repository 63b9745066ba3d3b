"""Hide some tokens of every row and ask for them back: what encoders are trained on (BERT, arXiv 1810.04805, section 3.1).

    inputs    the  cat  [M]  on   dog  mat      80 % of the chosen become the mask token, 10 % a random one, 10 % stay
    targets   ·    ·    sat  ·    the  mat      · = IGNORE: only chosen tokens carry a loss

The random and the kept ones are there because the mask token never occurs in use: without them a model learns that a
token that is not a mask needs no thought. With `whole_words` all tokens of a word are chosen together (the authors' later
release, and RoBERTa's and Chinese BERT-wwm's finding, arXiv 1906.08101), so that no word is guessed from its own pieces.

What is hidden in sample i is a function of (seed, i) alone: resuming needs one integer, every process hides the same, and
every epoch hides something else. What this gives up: BERT's ten fixed maskings of a corpus could be stored; these are made
again each time, in about 50 microseconds a row.
"""

import numpy as np
from pydantic import Field, model_validator

from headspring.artifacts import UserError, Value
from headspring.data.batch import IGNORE, Sample, SampleSource, Visit
from headspring.tokenization.tokenizer import Tokenizer

STREAM = 0x6D61736B  # keeps these random numbers apart from any others drawn from the same seed


class Masking(Value):
    """`share` of a row's tokens are chosen; of those, `masked` become the mask token and `random` another one."""

    share: float = Field(0.15, gt=0, le=1)
    masked: float = Field(0.8, ge=0, le=1)
    random: float = Field(0.1, ge=0, le=1)
    whole_words: bool = False

    @model_validator(mode="after")
    def _shares_fit(self) -> "Masking":
        if self.masked + self.random > 1:
            raise ValueError(f"masked ({self.masked}) and random ({self.random}) are shares of one whole; lower one of them")
        return self


class MaskedSamples(SampleSource):
    """The samples of `source` with tokens hidden. Raises `UserError` for a tokenizer without a mask token."""

    def __init__(self, source: SampleSource, tokenizer: Tokenizer, config: Masking, seed: int):
        if tokenizer.mask_id is None:
            raise UserError("the tokenizer has no mask token; train one with `tokenizer: {mask: true}`")
        self.source, self.config, self.seed = source, config, seed
        self.sequence_length = source.sequence_length
        self.mask_id = tokenizer.mask_id
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.control_ids))
        self._can_hide = np.isin(np.arange(tokenizer.vocab_size), self.ordinary)
        self._words = Words(tokenizer) if config.whole_words else None

    def sample(self, index: int) -> Sample:
        """Sample `index` of the source: `targets` are its own inputs where tokens were chosen, IGNORE elsewhere."""
        row = self.source.sample(index)
        generator = np.random.default_rng((self.seed, STREAM, index))
        chosen = self._choose(row, generator)
        inputs, targets = row.inputs.copy(), np.full_like(row.inputs, IGNORE)
        targets[chosen] = row.inputs[chosen]
        lot = generator.random(len(chosen))
        others = generator.choice(self.ordinary, len(chosen))
        masked, random = self.config.masked, self.config.masked + self.config.random
        inputs[chosen] = np.where(lot < masked, self.mask_id, np.where(lot < random, others, inputs[chosen]))
        return Sample(inputs, targets, row.segments)

    def where(self, document_id: str) -> list[Visit]:
        """As the source says: a hidden token is still a token that was trained on."""
        return self.source.where(document_id)

    def _choose(self, row: Sample, generator: np.random.Generator) -> np.ndarray:
        """Places of the tokens to hide, (n,) int64: `share` of those that are no control tokens, rounded, at least one."""
        places = np.flatnonzero(self._can_hide[row.inputs])
        if not len(places):
            return places
        budget = max(1, round(self.config.share * len(places)))
        if self._words is None:
            return generator.permutation(places)[:budget]
        number = self._words.numbers(row)[places]
        order = generator.permutation(np.unique(number))
        sizes = np.bincount(number)[order]
        return places[np.isin(number, order[_that_fit(sizes, budget)])]


def _that_fit(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Which of the things of these sizes are taken, one after another, when those that no longer fit are passed over.

    Should none fit (one word longer than the budget), the first is taken nonetheless."""
    taken, used = np.zeros(len(sizes), bool), 0
    for place, size in enumerate(sizes.tolist()):
        if used + size <= budget:
            taken[place] = True
            used += size
    taken[0] |= not used
    return taken


class Words:
    """Which tokens of a row belong to one word.

    WordPiece marks a continuation (`##ing`). Elsewhere a token goes on with a word where both the byte before it and its
    own first byte belong to words: letters, digits, underscores and everything beyond ASCII. ` un|believ|able` is one word
    of a byte-level vocabulary, `foo|.|bar` are three.
    """

    def __init__(self, tokenizer: Tokenizer):
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        if tokenizer.scheme.family == "wordpiece":
            marks = [tokenizer.token(i).startswith(tokenizer.scheme.continuation) for i in range(len(pieces))]
            self._opens, self._closes = ~np.array(marks), np.zeros(len(pieces), bool)
        else:
            self._opens = np.array([not _in_words(piece[:1]) for piece in pieces])
            self._closes = np.array([not _in_words(piece[-1:]) for piece in pieces])

    def starts(self, row: Sample) -> np.ndarray:
        """(T,) bool: the tokens at which a word begins. A document's first token always begins one."""
        begins = self._opens[row.inputs].copy()
        begins[1:] |= self._closes[row.inputs[:-1]] | (row.segments[1:] != row.segments[:-1])
        begins[0] = True
        return begins

    def numbers(self, row: Sample) -> np.ndarray:
        """(T,) int64: the number of the word that each token belongs to."""
        return self.starts(row).cumsum() - 1


def _in_words(byte: bytes) -> bool:
    return byte.isalnum() or byte == b"_" or byte > b"\x7f"
