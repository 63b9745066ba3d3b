"""The kernels of `triton_paged`, read by Triton's interpreter: run by `test_triton_paged`, with TRITON_INTERPRET=1."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from headspring.models.kernels import triton_paged
from headspring.models.paged import Int8Pages, Pages
from headspring.models.ragged import PAGE, Ragged

LENGTHS = [1, 33, 300, 70]


class Sequences:
    """Queries, keys and values of several whole sequences, and pages, in a random order, that hold a part of them."""

    def __init__(self, lengths=LENGTHS, heads=(6, 2), channels=32, dtype=torch.float32, kind=Pages, **scoring):
        torch.manual_seed(0)
        self.lengths, self.heads, self.scoring = lengths, heads, {"scale": channels**-0.5, **scoring}
        counts = [-(-length // PAGE) for length in lengths]
        owned = torch.randperm(sum(counts) + 3)[: sum(counts)].int().split(counts)
        self.table = pad_sequence(list(owned), batch_first=True, padding_value=0)
        sizes = (heads[0], heads[1], heads[1])
        self.q, self.k, self.v = ([torch.randn(n, size, channels).to(dtype) for n in lengths] for size in sizes)
        self.pages = kind(sum(counts) + 3, heads[1], channels, dtype, torch.device("cpu"))
        for pool in self.pages.tensors:
            pool.fill_(-7 if pool.dtype == torch.int8 else float("nan"))  # what nobody has written must not matter

    def step(self, past, counts, which=None):
        """Write and attend to `counts` tokens of each sequence (of those in `which`): the answers of each, (count, H, C)."""
        which = list(range(len(self.lengths))) if which is None else which
        ragged = Ragged(past, counts, {None: self.table[which]})
        q, k, v = (
            torch.cat([x[number][at : at + count] for number, at, count in zip(which, past, counts)])
            for x in (self.q, self.k, self.v)
        )
        triton_paged.write(k, v, self.pages.tensors, ragged.slots(None))
        where = ragged.tables[None], ragged.offsets, ragged.lengths, ragged.positions[0]
        tiles = ragged.tiles(triton_paged.queries_of_a_tile(*self.heads))
        return list(triton_paged.attend(q, self.pages.tensors, *where, tiles, ragged.reach(), **self.scoring).split(counts))

    def run(self, chunks):
        """All of every sequence: the prompts whole but for the last tokens, which come in chunks of so many."""
        past, parts = [0] * len(self.lengths), [[] for _ in self.lengths]
        for counts in chunks:
            counts = [min(count, length - at) for count, length, at in zip(counts, self.lengths, past)]
            going = [number for number, count in enumerate(counts) if count]
            answers = self.step([past[i] for i in going], [counts[i] for i in going], going)
            for number, answer in zip(going, answers):
                parts[number].append(answer)
            past = [at + count for at, count in zip(past, counts)]
        assert past == self.lengths
        return [torch.cat(part) for part in parts]

    def expected(self, number, k=None, v=None):
        """The obvious lines, in float64."""
        q, k, v = self.q[number].double(), (self.k[number] if k is None else k).double(), (self.v[number] if v is None else v).double()
        group, place = self.heads[0] // self.heads[1], torch.arange(self.lengths[number])
        scores = torch.einsum("thc,shc->hts", q, k.repeat_interleave(group, 1)) * self.scoring["scale"]
        if (cap := self.scoring.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        seen = place <= place[:, None]
        if (window := self.scoring.get("window")) is not None:
            seen &= place > place[:, None] - window
        scores = scores.masked_fill(~seen, -torch.inf)
        if (sinks := self.scoring.get("sinks")) is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
        pattern = scores.softmax(-1)[..., : len(place)]
        return torch.einsum("hts,shc->thc", pattern, v.repeat_interleave(group, 1))


WHOLE = [[400] * 4]
MIXED = [[1, 20, 290, 69], [0, 12, 7, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
OPTIONS = {
    "plain": {},
    "window": {"window": 40},
    "short window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.randn(6, generator=torch.Generator().manual_seed(1))},
    "all": {"window": 290, "softcap": 5.0, "scale": 0.3, "sinks": torch.ones(6)},
    "heads of their own": {"heads": (2, 2), "channels": 48},
    "one head for all": {"heads": (5, 1), "channels": 16},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_attention(name):
    sequences = Sequences(**OPTIONS[name])
    for number, answer in enumerate(sequences.run(MIXED)):
        torch.testing.assert_close(answer.double(), sequences.expected(number), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(dtype):
    sequences = Sequences([40, 270], dtype=dtype)
    for number, answer in enumerate(sequences.run([[39, 268], [1, 2]])):
        assert answer.dtype == dtype
        torch.testing.assert_close(answer.double(), sequences.expected(number), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", ["plain", "window", "all"])
def test_chunks_and_company_change_no_bit(name):
    whole = Sequences(**OPTIONS[name]).run(WHOLE)
    for answer, other in zip(whole, Sequences(**OPTIONS[name]).run(MIXED)):
        assert torch.equal(answer, other)
    alone = Sequences(**OPTIONS[name])
    (answer,) = alone.step([0], [300], [2])
    assert torch.equal(answer, whole[2])


def test_int8_pages_are_those_of_the_definition():
    sequences, stored = Sequences([33, 70], kind=Int8Pages), Sequences([33, 70], kind=Int8Pages)
    answers = sequences.run([[30, 70], [3, 0]])
    ragged = Ragged([0, 0], [33, 70], {None: stored.table})
    stored.pages.store(torch.cat(stored.k), torch.cat(stored.v), ragged.slots(None))
    for ours, plain in zip(sequences.pages.tensors, stored.pages.tensors):
        assert torch.equal(ours.nan_to_num(nan=-1.0), plain.nan_to_num(nan=-1.0))
    for number, answer in enumerate(answers):
        k, v = (x[0].transpose(0, 1) for x in stored.pages.gather(number, ragged))
        torch.testing.assert_close(answer.double(), sequences.expected(number, k, v), rtol=1e-5, atol=2e-6)


def test_written_pages_are_those_of_the_definition():
    sequences, stored = Sequences(dtype=torch.bfloat16, channels=24), Sequences(dtype=torch.bfloat16, channels=24)
    ragged = Ragged([0] * 4, LENGTHS, {None: stored.table})
    k, v = torch.cat(stored.k), torch.cat(stored.v)
    stored.pages.store(k, v, ragged.slots(None))
    wide = torch.cat([k.flatten(1), v.flatten(1)], 1)  # as they come from one product: rows lie apart
    k, v = (part.unflatten(1, (2, 24)) for part in wide.chunk(2, 1))
    triton_paged.write(k, v, sequences.pages.tensors, ragged.slots(None))
    for ours, plain in zip(sequences.pages.tensors, stored.pages.tensors):
        assert torch.equal(ours.nan_to_num(nan=-1.0), plain.nan_to_num(nan=-1.0))


# ---- planted bugs: each is found


def test_a_split_counted_by_what_is_there_is_found(monkeypatch):
    """As other engines count: as many splits as would fill the device, so that a row's sums depend on the longest sequence."""
    whole, real = Sequences().run(WHOLE), triton_paged.attend

    def attend(q, *rest, **options):
        monkeypatch.setattr(triton_paged, "SPLIT", 128 if rest[-1] > 295 else 256)
        return real(q, *rest, **options)

    monkeypatch.setattr(triton_paged, "attend", attend)
    mixed = Sequences().run([[1, 20, 280, 69], *MIXED[1:], [0, 0, 10, 0]])
    assert not torch.equal(mixed[2], whole[2])
    torch.testing.assert_close(mixed[2], whole[2])


def test_pages_of_somebody_else_are_found():
    sequences = Sequences()
    sequences.table[2, 3] = sequences.table[3, 1]
    answers = sequences.run(WHOLE)
    assert not torch.allclose(answers[2].double(), sequences.expected(2), atol=1e-3)


def test_a_window_that_is_too_wide_is_found():
    sequences = Sequences(window=41)
    answers = sequences.run(WHOLE)
    sequences.scoring["window"] = 40
    assert not torch.allclose(answers[2].double(), sequences.expected(2), atol=1e-4)
