"""Attention over pages gives the very rows that attention over the whole sequence gives, whatever the pages and the company."""

import pytest
import torch

from headspring.models import kernels
from headspring.models.attend import attend
from headspring.models.context import Visibility
from headspring.models.paged import Int8Pages, Pages
from headspring.models.ragged import PAGE, Ragged

HEADS = (6, 2)  # queries, keys
native = pytest.mark.skipif(
    kernels.library() is None or not kernels.library().has_products,  # type: ignore[union-attr]
    reason="no native products here",
)


class Sequences:
    """Queries, keys and values of several whole sequences, and pages that hold a part of them."""

    def __init__(self, lengths: list[int], channels: int = 64, kind: type[Pages] = Pages, window: int | None = None):
        torch.manual_seed(sum(lengths))
        self.lengths, self.window, self.channels = lengths, window, channels
        self.q, self.k, self.v = (
            [torch.randn(length, heads, channels).bfloat16() for length in lengths] for heads in (HEADS[0], HEADS[1], HEADS[1])
        )
        counts = [-(-length // PAGE) for length in lengths]
        pages = torch.randperm(sum(counts) + 3)[: sum(counts)].int().split(counts)
        self.tables = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True, padding_value=sum(counts) + 2)
        self.pages = kind(sum(counts) + 3, HEADS[1], channels, torch.bfloat16, torch.device("cpu"), window)
        for pool in self.pages.tensors:  # what nobody has written must not matter
            pool.fill_(-7 if pool.dtype == torch.int8 else float("nan"))

    def step(self, past: list[int], counts: list[int]) -> list[torch.Tensor]:
        """Write and attend to `counts` tokens of each sequence: the answers of each, (count, H, C)."""
        ragged = Ragged(past, counts, {self.window: self.tables})
        q, k, v = (
            torch.cat([x[at : at + count] for x, at, count in zip(whole, past, counts)]) for whole in (self.q, self.k, self.v)
        )
        self.pages.write(k, v, ragged)
        return list(kernels.paged_attention(q, self.pages, ragged, self.window).split(counts))

    def run(self, chunks: list[list[int]]) -> list[torch.Tensor]:
        """All of every sequence, step by step: chunks[step][sequence] tokens at a time."""
        past, parts = [0] * len(self.lengths), [[] for _ in self.lengths]
        for counts in chunks:
            for part, answer in zip(parts, self.step(past, counts)):
                part.append(answer)
            past = [at + count for at, count in zip(past, counts)]
        assert past == self.lengths
        return [torch.cat(part) for part in parts]

    def whole(self, number: int) -> torch.Tensor:
        """The answers of `causal_attention` to a sequence by itself."""
        q, k, v = (x[number].transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        length = self.lengths[number]
        first = (torch.arange(length) - (self.window or length) + 1).clamp(min=0)[None]
        return kernels.causal_attention(q, k, v, first if self.window else None)[0].transpose(0, 1)


def random_chunks(lengths: list[int], seed: int, largest: int) -> list[list[int]]:
    """Steps in which each sequence takes 0 … `largest` tokens, until all are done."""
    generator, left, chunks = torch.Generator().manual_seed(seed), list(lengths), []
    while any(left):
        wanted = torch.randint(0, largest + 1, (len(left),), generator=generator).tolist()
        chunks.append([min(some, rest) for some, rest in zip(wanted, left)])
        left = [rest - some for rest, some in zip(left, chunks[-1])]
    return chunks


@native
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("channels", [32, 64, 96])
def test_any_schedule_gives_the_rows_of_the_whole(channels, window):
    lengths = [1, 31, 32, 33, 70, 129, 200]
    expected = Sequences(lengths, channels, window=window)
    whole = [expected.whole(number) for number in range(len(lengths))]
    for seed, largest in enumerate((1, 3, 40, 200)):
        answers = Sequences(lengths, channels, window=window).run(random_chunks(lengths, seed, largest))
        for answer, reference in zip(answers, whole):
            assert torch.equal(answer, reference)


@native
def test_threads_do_not_matter():
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(torch.cat(Sequences([40, 77, 3]).run([[30, 7, 1], [1, 69, 1], [9, 1, 1]])))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


@native
def test_blocks_counted_from_elsewhere_are_noticed():
    """The control: behind one hidden token, the same keys fall into other pairs and blocks, and some last bit differs."""
    sequences = Sequences([500])
    q, k, v = (torch.cat([x[0][:1], x[0]]).transpose(0, 1)[None] for x in (sequences.q, sequences.k, sequences.v))
    shifted = kernels.causal_attention(q, k, v, torch.ones(1, 501, dtype=torch.int64).clamp(max=torch.arange(501)))
    shifted, whole = shifted[0].transpose(0, 1)[1:], sequences.whole(0)
    assert not torch.equal(shifted, whole) and torch.allclose(shifted.float(), whole.float(), atol=2e-2)


@native
@pytest.mark.parametrize("window", [None, 40])
def test_int8_pages_are_those_of_the_plain_definition(window):
    lengths = [33, 100, 5]
    sequences = Sequences(lengths, kind=Int8Pages, window=window)
    stored = Sequences(lengths, kind=Int8Pages, window=window)
    answers = sequences.run([[20, 100, 0], [13, 0, 5]])
    ragged = Ragged([0] * 3, lengths, {window: stored.tables})
    stored.pages.store(torch.cat(stored.k), torch.cat(stored.v), ragged.slots(window))
    for ours, plain in zip(sequences.pages.tensors, stored.pages.tensors):
        assert torch.equal(ours.nan_to_num(nan=-1.0), plain.nan_to_num(nan=-1.0))
    opened = Sequences(lengths, window=window)
    for number in range(3):
        opened.k[number], opened.v[number] = (x[0].transpose(0, 1) for x in stored.pages.gather(number, ragged))
        assert torch.equal(answers[number], opened.whole(number))


@native
def test_int8_pages_of_zeros():
    sequences = Sequences([3], kind=Int8Pages)
    sequences.k[0].zero_(), sequences.v[0].zero_()
    assert torch.equal(sequences.run([[2], [1]])[0], torch.zeros(3, HEADS[0], 64).bfloat16())


@native
def test_near_the_definition():
    sequences = Sequences([90])
    q, k, v = (x[0].transpose(0, 1)[None].float() for x in (sequences.q, sequences.k, sequences.v))
    exact = attend(q, k, v, Visibility(None, causal=True))[0].transpose(0, 1)
    assert (sequences.run([[50], [39], [1]])[0].float() - exact).abs().max() < 3e-2


@native
def test_scale():
    sequences = Sequences([40])
    ragged = Ragged([0], [40], {None: sequences.tables})
    sequences.pages.write(sequences.k[0], sequences.v[0], ragged)
    ours = kernels.paged_attention(sequences.q[0], sequences.pages, ragged, scale=0.5 * 64**-0.5)
    halved = kernels.paged_attention(sequences.q[0] * 0.5, sequences.pages, ragged)
    assert torch.equal(ours, halved)  # a power of two leaves every bit where it was
