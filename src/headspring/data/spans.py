"""Take spans out of every row and ask for them back: what T5 is trained on (arXiv 1910.10683, section 3.1.4).

    row      the cat sat on the mat and slept
    source   the <0> on the mat <1> slept               every span becomes one sentinel
    answer   <0> cat sat <1> and <|eos|>                what stood there, behind the sentinel that stands for it

15 % of the tokens in spans of 3 on average, as in the paper. An encoder reads the source and a decoder writes the answer.
Compared with masking single tokens (`masking`), the answer is a fifth as long as the text, so that the decoder has little
to compute, and the number of tokens to fill in is not given away.

What is taken out of sample i is a function of (seed, i) alone. All rows of one length give sources of one length and
answers of one length: spans differ in length, their number and sum do not. As in the authors' code, a row begins with text
that is kept and ends with a span.
"""

from itertools import chain

import numpy as np
from pydantic import Field

from headspring.artifacts import UserError, Value
from headspring.data.batch import Sample, SampleSource, Visit
from headspring.tokenization.tokenizer import Tokenizer

STREAM = 0x7370616E  # keeps these random numbers apart from any others drawn from the same seed


class SpanCorruption(Value):
    """`share` of a row's tokens are taken out, in spans of `mean_length` tokens on average."""

    share: float = Field(0.15, gt=0, lt=1)
    mean_length: float = Field(3.0, ge=1)

    def counts(self, length: int) -> tuple[int, int]:
        """Tokens taken out of a row of `length`, and spans: at least one of each, and a token left before every span."""
        tokens = min(max(round(length * self.share), 1), length - 1)
        return tokens, min(max(round(tokens / self.mean_length), 1), tokens, length - tokens)


class CorruptedSpans(SampleSource):
    """The samples of `source` with spans taken out. Raises `UserError` for a tokenizer with too few sentinels."""

    def __init__(self, source: SampleSource, tokenizer: Tokenizer, config: SpanCorruption, seed: int):
        self.source, self.config, self.seed = source, config, seed
        self.sequence_length = source.sequence_length  # tokens of text in a row: what source and answer hold together
        needed, self.sentinels = config.counts(source.sequence_length)[1], np.array(tokenizer.sentinel_ids, np.int64)
        if needed > len(self.sentinels):
            lack = f"the tokenizer has {len(self.sentinels)} sentinels, and a row of {source.sequence_length} tokens"
            raise UserError(f"{lack} needs {needed}; train one with `tokenizer: {{sentinels: {needed}}}`")
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise UserError("the tokenizer has no tokens that begin and end an answer")
        self.start_id, self.end_id = tokenizer.bos_id, tokenizer.eos_id

    def sample(self, index: int) -> Sample:
        """Sample `index` of the source; `inputs` and `targets` are the answer, one token apart."""
        row = self.source.sample(index).inputs
        generator = np.random.default_rng((self.seed, STREAM, index))
        kept, taken = spans(row, self.config, generator)
        marks = self.sentinels[: len(taken), None]
        source = np.concatenate(list(chain.from_iterable(zip(kept, marks))))
        answer = np.concatenate([*chain.from_iterable(zip(marks, taken)), [self.end_id]])
        inputs = np.concatenate([[self.start_id], answer[:-1]])
        return Sample(inputs, answer, np.zeros(len(answer), np.int32), source)

    def where(self, document_id: str) -> list[Visit]:
        """As the source says, in places of its rows: a token that was taken out is still a token that was trained on."""
        return self.source.where(document_id)


def spans(row: np.ndarray, config: SpanCorruption, generator: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The row cut into stretches that are kept and, one behind each, spans that are taken out."""
    tokens, count = config.counts(len(row))
    lengths = np.stack([_parts(len(row) - tokens, count, generator), _parts(tokens, count, generator)], axis=1)
    pieces = np.split(row, lengths.ravel().cumsum()[:-1])
    return pieces[::2], pieces[1::2]


def _parts(total: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` lengths of at least one whose sum is `total`, every choice of borders as likely as any other: (count,)."""
    borders = np.sort(generator.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], borders, [total]])).astype(np.int64)
