"""Which tokens are hidden, how, and that it is a function of (seed, index) alone."""

import numpy as np
import pytest

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, Sample
from headspring.data.masking import MaskedSamples, Masking, Words
from headspring.tokenization.tokenizer import Tokenizer
from headspring.tokenization.train import TokenizerConfig, train_tokenizer

TEXT = ["def unbelievable_name(first, second):\n    return first + unbelievable_name(second, 17)\n", "a naïve café, 日本語"]
LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXT * 3, TokenizerConfig(vocab_size=290, mask=True))


class Rows:
    """Ordinary tokens between a bos and an eos, with a second document from the middle on."""

    sequence_length = LENGTH

    def __init__(self, tokenizer: Tokenizer):
        self.bos, self.eos, self.ordinary = tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size - len(tokenizer.control)

    def sample(self, index: int) -> Sample:
        tokens = np.random.default_rng(index).integers(0, self.ordinary, LENGTH)
        tokens[[0, 31]], tokens[[30, 63]] = self.bos, self.eos
        return Sample(tokens, np.roll(tokens, -1), (np.arange(LENGTH) > 30).astype(np.int32))

    def where(self, document_id: str):
        return [document_id]


def test_shares_are_those_of_the_paper(tokenizer):
    """15 % of what is no control token, of which 80 % become the mask, 10 % another token, 10 % stay."""
    rows = Rows(tokenizer)
    masked = MaskedSamples(rows, tokenizer, Masking(), seed=3)
    kept = replaced = hidden = 0
    for index in range(400):
        before, after = rows.sample(index), masked.sample(index)
        chosen = after.targets != IGNORE
        assert chosen.sum() == round(0.15 * 60)
        assert (after.targets[chosen] == before.inputs[chosen]).all()  # a target stands at its own place
        assert (after.inputs[~chosen] == before.inputs[~chosen]).all()
        assert not chosen[[0, 30, 31, 63]].any()  # control tokens are never asked for
        now = after.inputs[chosen]
        assert not np.isin(now, [i for i in tokenizer.control_ids if i != tokenizer.mask_id]).any()
        hidden += (now == tokenizer.mask_id).sum()
        kept += (now == before.inputs[chosen]).sum()
        replaced += ((now != tokenizer.mask_id) & (now != before.inputs[chosen])).sum()
    total = hidden + kept + replaced
    assert abs(hidden / total - 0.8) < 0.02 and abs(kept / total - 0.1) < 0.02 and abs(replaced / total - 0.1) < 0.02


def test_it_is_a_function_of_seed_and_index(tokenizer):
    rows = Rows(tokenizer)
    first, second = (MaskedSamples(rows, tokenizer, Masking(), seed=3) for _ in range(2))
    backwards = [second.sample(index) for index in reversed(range(6))][::-1]
    for index in range(6):
        assert (first.sample(index).inputs == backwards[index].inputs).all()
        assert (first.sample(index).targets == backwards[index].targets).all()
    assert (first.sample(0).targets != MaskedSamples(rows, tokenizer, Masking(), seed=4).sample(0).targets).any()
    places = {tuple(np.flatnonzero(first.sample(index).targets != IGNORE)) for index in range(6)}
    assert len(places) == 6  # every sample another choice
    assert first.where("x") == ["x"]


@pytest.mark.parametrize(("kind", "size"), [("bpe", 300), ("wordpiece", 90), ("unigram", 315)])
def test_words_are_those_of_the_text(kind, size):
    """Tokens of one word share a number; words are runs of letters, digits and underscores."""
    tokenizer = train_tokenizer(TEXT * 3, TokenizerConfig(kind=kind, vocab_size=size, mask=True))
    text = "return unbelievable + second naïve"
    ids, spans = tokenizer.encode_with_spans(text)
    numbers = Words(tokenizer).numbers(Sample(ids, ids, np.zeros(len(ids), np.int32)))
    words: dict[int, bytes] = {}
    for (start, end), number in zip(spans.tolist(), numbers.tolist()):
        words[number] = words.get(number, b"") + text.encode()[start:end].strip()
    assert [word.decode() for word in words.values() if word] == text.split()
    assert len(ids) > len(text.split())  # some are of several tokens


def test_whole_words_are_hidden_whole(tokenizer):
    ids = np.array(tokenizer.encode(TEXT[0] * 3)[:LENGTH])
    row = Sample(ids, ids, np.zeros(len(ids), np.int32))

    class One(Rows):
        def sample(self, index: int) -> Sample:
            return row

    numbers = Words(tokenizer).numbers(row)
    broken = {True: 0, False: 0}
    for whole in broken:
        masked = MaskedSamples(One(tokenizer), tokenizer, Masking(whole_words=whole), seed=0)
        for index in range(50):
            chosen = masked.sample(index).targets != IGNORE
            assert 0 < chosen.sum() <= max(round(0.15 * len(ids)), np.bincount(numbers).max())
            broken[whole] += sum(0 < chosen[numbers == n].mean() < 1 for n in np.unique(numbers[chosen]))
    assert broken[True] == 0 < broken[False]  # the control: token by token, words are cut


def test_rows_without_text_are_left_alone(tokenizer):
    class Empty(Rows):
        def sample(self, index: int) -> Sample:
            tokens = np.full(LENGTH, self.eos)
            return Sample(tokens, tokens, np.zeros(LENGTH, np.int32))

    for whole in (True, False):
        sample = MaskedSamples(Empty(tokenizer), tokenizer, Masking(whole_words=whole), seed=0).sample(0)
        assert (sample.targets == IGNORE).all() and (sample.inputs == tokenizer.eos_id).all()


def test_what_cannot_work_is_refused():
    plain = train_tokenizer(TEXT * 3, TokenizerConfig(vocab_size=290))
    with pytest.raises(UserError, match=r"no mask token; train one with `tokenizer: \{mask: true\}`"):
        MaskedSamples(Rows(plain), plain, Masking(), seed=0)
    with pytest.raises(ValueError, match="shares of one whole"):
        Masking(masked=0.8, random=0.3)


def test_the_mask_token_survives_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).mask_id == tokenizer.mask_id is not None
    assert tokenizer.mask_id not in tokenizer.encode("a <|mask|> typed by a user")
