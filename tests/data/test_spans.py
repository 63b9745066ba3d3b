"""Which spans are taken out, what stands for them, and that it is a function of (seed, index) alone."""

from itertools import pairwise

import numpy as np
import pytest

from headspring.artifacts import UserError
from headspring.data.batch import Sample, collate
from headspring.data.spans import CorruptedSpans, SpanCorruption, spans
from headspring.tokenization.tokenizer import Tokenizer
from headspring.tokenization.train import TokenizerConfig, train_tokenizer

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some text to count bytes in"] * 3, TokenizerConfig(vocab_size=280, sentinels=4))


class Rows:
    sequence_length = LENGTH

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, 256, LENGTH)
        return Sample(tokens, np.roll(tokens, -1), np.zeros(LENGTH, np.int32))

    def where(self, document_id: str):
        return [document_id]


def restored(sample: Sample, sentinels: list[int]) -> list[int]:
    """The row, from source and answer: every sentinel of the one replaced by what follows it in the other."""
    answer = sample.targets[:-1].tolist()
    starts = [answer.index(mark) for mark in sentinels if mark in answer] + [len(answer)]
    taken = {answer[start]: answer[start + 1 : end] for start, end in pairwise(starts)}
    assert sample.source is not None
    return [token for mark in sample.source.tolist() for token in taken.get(mark, [mark])]


def test_source_and_answer_hold_the_row(tokenizer):
    rows = Rows()
    ids, lengths, first = tokenizer.sentinel_ids, [], []
    assert [tokenizer.token(i) for i in ids] == [f"<|span_{n}|>" for n in range(4)]
    corrupted = CorruptedSpans(rows, tokenizer, SpanCorruption(mean_length=3), seed=3)
    for index in range(200):
        sample = corrupted.sample(index)
        assert restored(sample, ids) == rows.sample(index).inputs.tolist()
        assert sample.targets[-1] == tokenizer.eos_id and sample.inputs[0] == tokenizer.bos_id
        assert (sample.inputs[1:] == sample.targets[:-1]).all()
        marks = np.isin(sample.source, ids)
        assert sample.source[marks].tolist() == ids[:3] and not (marks[1:] & marks[:-1]).any() and not marks[0]
        assert len(sample.targets) == 10 + 3 + 1 and len(sample.source) == LENGTH - 10 + 3  # 15 % of 64, in spans of 3
        lengths += np.diff(np.flatnonzero(np.isin(sample.targets, [*ids, tokenizer.eos_id]))).tolist()
        first.append(int(np.flatnonzero(marks)[0]))
    assert min(lengths) == 2 and max(lengths) > 7 and min(first) < 4 and max(first) > 30


def test_every_place_is_as_likely_but_the_ends():
    """A row begins with what is kept and ends with a span, as in the authors' code; in between, no place is special."""
    hit, config = np.zeros(LENGTH), SpanCorruption()
    for seed in range(4000):
        _, taken = spans(np.arange(LENGTH), config, np.random.default_rng(seed))
        hit[np.concatenate(taken)] += 1 / 4000
    assert hit[0] == 0 and hit[-1] == pytest.approx(1) and abs(hit[8:56].mean() - 0.12) < 0.01 and hit[8:56].std() < 0.01


def test_it_is_a_function_of_seed_and_index(tokenizer):
    first, second = (CorruptedSpans(Rows(), tokenizer, SpanCorruption(), seed=3) for _ in range(2))
    backwards = [second.sample(index) for index in reversed(range(6))][::-1]
    for index in range(6):
        assert (first.sample(index).source == backwards[index].source).all()
    other = CorruptedSpans(Rows(), tokenizer, SpanCorruption(), seed=4)
    assert any((first.sample(i).source != other.sample(i).source).any() for i in range(3))
    assert first.where("x") == ["x"]


@pytest.mark.parametrize(("length", "config", "counts"), [
    (512, SpanCorruption(), (77, 26)), (2, SpanCorruption(), (1, 1)), (10, SpanCorruption(share=0.9, mean_length=1), (9, 1)),
    (100, SpanCorruption(share=0.5, mean_length=1), (50, 50)),
])  # fmt: skip
def test_counts(length, config, counts):
    assert config.counts(length) == counts
    kept, taken = spans(np.arange(length), config, np.random.default_rng(0))
    assert sum(map(len, taken)) == counts[0] and len(taken) == len(kept) == counts[1]
    assert min(map(len, [*kept, *taken])) >= 1


def test_what_a_tokenizer_lacks_is_said():
    bare = train_tokenizer(["text"] * 3, TokenizerConfig(vocab_size=264))
    with pytest.raises(UserError, match="has 0 sentinels, and a row of 64 tokens needs 3; train one with .*sentinels: 3"):
        CorruptedSpans(Rows(), bare, SpanCorruption(), seed=0)


def test_rows_with_sources_are_stacked(tokenizer):
    """Sources of different lengths are padded on the left; a batch moves as a whole."""
    row = np.arange(4)
    samples = [Sample(row, row, np.zeros(4, np.int32), np.arange(1, n)) for n in (4, 3)]
    batch = collate(samples, document_mask=False).to("cpu")
    assert batch.source.tolist() == [[1, 2, 3], [0, 1, 2]] and batch.source_padding.tolist() == [0, 1]
    assert set(batch.given) == {"source", "source_padding"}
    assert collate([Sample(row, row, row)], document_mask=False).given == {}
