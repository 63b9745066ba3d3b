"""The kernels of `triton_paged`, read by Triton's interpreter: run by `test_triton_paged`, with TRITON_INTERPRET=1."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from headspring.inference import LanguageModel, SamplingParams
from headspring.inference.engine import EngineConfig
from headspring.models import Attention, Block, Causal, SwiGLU, kernels
from headspring.models.kernels import triton_paged
from headspring.models.paged import Int8Pages, Pages
from headspring.models.ragged import PAGE, Ragged
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from tests.inference.engine.recording import Recorder, recorded
from tests.inference.tiny import TEXT, tiny_model

LENGTHS = [1, 33, 90, 20]


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    """Two pages: the interpreter takes milliseconds for what a GPU does in none."""
    monkeypatch.setattr(triton_paged, "SPLIT", 64)


class Sequences:
    """Queries, keys and values of several whole sequences, and pages, in a random order, that hold a part of them."""

    def __init__(self, lengths=LENGTHS, heads=(3, 1), channels=32, dtype=torch.float32, kind=Pages, **scoring):
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

    def run(self, *chunks):
        """The answers to the last tokens of every sequence, which come in chunks of so many; those before lie in pages."""
        past = [length - sum(counts) for length, counts in zip(self.lengths, zip(*chunks))]
        k, v = (torch.cat([x[:at] for x, at in zip(whole, past)]) for whole in (self.k, self.v))
        self.pages.store(k, v, Ragged([0] * len(past), past, {None: self.table}).slots(None))
        parts = [[] for _ in past]
        for counts in chunks:
            going = [number for number, count in enumerate(counts) if count]
            answers = self.step([past[i] for i in going], [counts[i] for i in going], going)
            for number, answer in zip(going, answers):
                parts[number].append(answer)
            past = [at + count for at, count in zip(past, counts)]
        assert past == self.lengths
        return [torch.cat(part) for part in parts]

    def off(self, answers, **read):
        """The largest difference from the obvious lines."""
        pairs = [(answer.double(), self.expected(number, **read)[-len(answer) :]) for number, answer in enumerate(answers)]
        return max(float((ours - right).abs().max()) for ours, right in pairs)

    def expected(self, number, k=None, v=None):
        """The obvious lines, in float64."""
        q, k, v = (
            self.q[number].double(),
            (self.k[number] if k is None else k).double(),
            (self.v[number] if v is None else v).double(),
        )
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


WHOLE = [[1, 2, 6, 1]]
MIXED = [[1, 0, 5, 0], [0, 2, 0, 1], [0, 0, 1, 0]]
OPTIONS = {
    "plain": {},
    "window": {"window": 40, "heads": (4, 2)},
    "short window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.randn(3, generator=torch.Generator().manual_seed(1))},
    "all": {"window": 70, "softcap": 5.0, "scale": 0.3, "sinks": torch.ones(3)},
    "heads of their own": {"heads": (2, 2), "channels": 48},
    "one head for all": {"heads": (5, 1), "channels": 16},
}
SLOW = sorted({*OPTIONS} - {"window", "all"})


@pytest.mark.parametrize("name", ["window", "all", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_is_attention(name):
    sequences = Sequences(**OPTIONS[name])
    assert sequences.off(sequences.run(*WHOLE)) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_in_sixteen_bits(dtype):
    sequences = Sequences(dtype=dtype)
    answers = sequences.run(*WHOLE)
    assert answers[0].dtype == dtype and sequences.off(answers) < 0.01


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "all"])
def test_chunks_and_company_change_no_bit(name):
    whole, mixed = (Sequences(**OPTIONS[name]).run(*chunks) for chunks in (WHOLE, MIXED))
    assert all(torch.equal(one, other) for one, other in zip(whole, mixed))


def test_int8_pages_are_those_of_the_definition():
    sequences, stored = Sequences(kind=Int8Pages), Sequences(kind=Int8Pages)
    answers = sequences.run(*WHOLE)
    ragged = Ragged([0] * 4, LENGTHS, {None: stored.table})
    stored.pages.store(torch.cat(stored.k), torch.cat(stored.v), ragged.slots(None))
    for ours, plain in zip(sequences.pages.tensors, stored.pages.tensors):
        assert torch.equal(ours.nan_to_num(nan=-1.0), plain.nan_to_num(nan=-1.0))
    for number, answer in enumerate(answers):
        k, v = (x[0].transpose(0, 1) for x in stored.pages.gather(number, ragged))
        torch.testing.assert_close(answer.double(), sequences.expected(number, k, v)[-len(answer) :], rtol=1e-5, atol=3e-6)


def test_written_pages_are_those_of_the_definition():
    sequences, stored = (Sequences([40, 3], (4, 2), 24, torch.bfloat16) for _ in range(2))
    ragged = Ragged([0] * 2, [40, 3], {None: stored.table})
    k, v = torch.cat(stored.k), torch.cat(stored.v)
    stored.pages.store(k, v, ragged.slots(None))
    wide = torch.cat([k.flatten(1), v.flatten(1)], 1)  # as they come from one product: rows lie apart
    k, v = (part.unflatten(1, (2, 24)) for part in wide.chunk(2, 1))
    triton_paged.write(k, v, sequences.pages.tensors, ragged.slots(None))
    for ours, plain in zip(sequences.pages.tensors, stored.pages.tensors):
        assert torch.equal(ours.nan_to_num(nan=-1.0), plain.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("captured", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_engine_reads_its_pages_by_them(captured, monkeypatch):
    """In steps that are computed, and in steps that are replayed."""
    monkeypatch.setenv("HEADSPRING_KERNELS", "plain")
    tokenizer, recorder = train_tokenizer(TEXT, TokenizerConfig(vocab_size=300)), Recorder()
    mixers = (Attention(heads=3, kv_heads=1, head_dim=16, mask=Causal(window=9), sink=True), Attention(heads=2, softcap=3.0))
    blocks = tuple(Block(mixer=mixer, feedforward=SwiGLU(hidden=32)) for mixer in mixers)
    lm = LanguageModel(tiny_model(tokenizer.vocab_size, layers=blocks), tokenizer)
    prompts = [list(range(5, 40)), [7, 8]]
    plain = lm.generate(prompts, max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
    launches = []
    launch = recorded(triton_paged.launch)
    monkeypatch.setattr(
        triton_paged, "launch", lambda kernel, *rest, **sizes: (launches.append(0), launch(kernel, *rest, **sizes))
    )
    monkeypatch.setattr(kernels, "pages_on_gpu", lambda x: triton_paged)
    monkeypatch.setattr("headspring.inference.engine.runner.CudaBackend", lambda: recorder)
    monkeypatch.setattr(EngineConfig, "captures", lambda *_, **__: captured)
    engine = lm.engine()
    jobs = [
        engine.submit(prompt, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=0)) for prompt in prompts
    ]
    engine.run()
    assert launches and recorder.replayed == 3 * captured
    for job, theirs in zip(jobs, plain):
        assert job.generations[0].token_ids == theirs.token_ids
        assert torch.allclose(torch.tensor(job.generations[0].logprobs), torch.tensor(theirs.logprobs), atol=1e-4)


# ---- planted bugs: each is found


@pytest.mark.slow
def test_splits_counted_by_the_longest_sequence_are_found(monkeypatch):
    """As other engines count, so that a row's sums depend on its company."""
    whole, real = Sequences().run(*WHOLE), triton_paged.attend

    def attend(q, *rest, **options):
        monkeypatch.setattr(triton_paged, "SPLIT", 32 if rest[-1] > 88 else 64)
        return real(q, *rest, **options)

    monkeypatch.setattr(triton_paged, "attend", attend)
    mixed = Sequences().run(*MIXED)
    assert not torch.equal(mixed[2], whole[2])
    torch.testing.assert_close(mixed[2], whole[2])


def test_pages_of_somebody_else_are_found():
    sequences = Sequences()
    sequences.table[2, 1] = sequences.table[3, 0]
    assert sequences.off(sequences.run(*WHOLE)) > 1e-3


@pytest.mark.slow
def test_a_window_that_is_too_wide_is_found():
    sequences = Sequences(window=41)
    answers = sequences.run(*WHOLE)
    sequences.scoring["window"] = 40
    assert sequences.off(answers) > 1e-4
