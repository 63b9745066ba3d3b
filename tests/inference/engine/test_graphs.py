"""Steps that are replayed give what steps give that are computed, whatever the batch, its padding and the tables do."""

import warnings

import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference import LanguageModel
from headspring.inference.engine import graphs
from headspring.inference.engine.config import EngineConfig
from headspring.inference.inspection import Inspection
from headspring.inference.sampling_params import SamplingParams
from headspring.models import MLP, Attention, Block, Causal, Embed, MoE, SwiGLU
from tests.inference.tiny import tiny_model

from .recording import Recorder

MIXED = tuple(
    Block(mixer=Attention(heads=4, kv_heads=2, mask=Causal(window=window)), feedforward=SwiGLU(hidden=64))
    for window in (None, 40)
)
KINDS = {
    "full": {},
    "windows": {"layers": MIXED},
    "softcap and sinks": {"layers": (Block(mixer=Attention(heads=4, softcap=5.0, sink=True), feedforward=MLP(hidden=64)),)},
    "scaled embedding": {"embed": Embed(scale=32**0.5)},
}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("HEADSPRING_KERNELS", "plain")  # what is not torch's cannot be recorded


@pytest.fixture
def recorder(monkeypatch):
    """Graphs of steps on a CPU."""
    made = Recorder()
    monkeypatch.setattr("headspring.inference.engine.runner.CudaBackend", lambda: made)
    monkeypatch.setattr(
        EngineConfig, "captures", lambda self, device, side_by_side: self.cuda_graphs is not False and side_by_side
    )
    return made


def small(tokenizer, **changes) -> LanguageModel:
    return LanguageModel(tiny_model(tokenizer.vocab_size, **changes), tokenizer)


def answers(lm, prompts, between=lambda engine: None, **options):
    """Greedy and drawn answers of different lengths, which leave the batch one after the other."""
    engine = lm.engine(prefix_sharing=False, **options)
    jobs = []
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=4 + 5 * number, temperature=number % 2, seed=number, ignore_eos=True, logprobs=0)
        jobs.append(engine.submit(prompt, params))
    while engine.step():
        between(engine)
    return [job.generations[0] for job in jobs]


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4)


PROMPTS = [[5, 9], list(range(3, 40)), [7], list(range(20, 90)), [1, 2, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_are_the_steps(kind, tokenizer, recorder):
    lm = small(tokenizer, **KINDS[kind])
    replayed = answers(lm, PROMPTS)
    assert recorder.captured == 4 and recorder.replayed > 10  # batches of 5 → 8, 4 (and 3), 2, 1
    same(replayed, answers(lm, PROMPTS, cuda_graphs=False))


def test_a_longer_bound_when_tables_grow(tokenizer, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "REACH", 32)
    lm = small(tokenizer, layers=MIXED, context=192)
    prompts = [list(range(2, 33)), list(range(5, 130))]
    seen = set()
    replayed = answers(lm, prompts, between=lambda engine: seen.update(engine.runner.graphs.graphs))
    assert seen == {(2, 128), (1, 192)}  # sequences, and the bound of their lengths
    same(replayed, answers(lm, prompts, cuda_graphs=False))
    assert [graphs.reach_of(length, 192) for length in (32, 33, 129)] == [32, 128, 192]


def test_preempted_forked_and_speculating_sequences(tokenizer, recorder):
    lm = small(tokenizer)
    for options in ({"memory": 60_000}, {"speculation": {"kind": "prompt_lookup"}}):
        same(answers(lm, PROMPTS, **options), answers(lm, PROMPTS, cuda_graphs=False, **options))


def test_forks_and_beams(tokenizer, recorder):
    lm, found = small(tokenizer), []
    for wanted in (None, False):
        engine = lm.engine(cuda_graphs=wanted)
        asked = [SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True), SamplingParams(beam_width=3, n=3, max_tokens=6)]
        jobs = [engine.submit([4, 5], params) for params in asked]
        engine.run()
        found.append([answer.token_ids for job in jobs for answer in job.generations])
    assert found[0] == found[1] and recorder.replayed


def test_whoever_is_looked_into_is_computed(tokenizer, recorder):
    lm = small(tokenizer)
    engine = lm.engine()
    look = Inspection(capture=["layers.0.residual.post"])
    job = engine.submit([5, 9], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True), edits=look)
    engine.run()
    assert recorder.replayed == 0 and job.seen[0].activations["layers.0.residual.post"].shape[0] == 6
    engine.submit([5, 9], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    with lm.model.sites.capture(["layers.1.residual.post"]) as seen:
        engine.run()
    assert recorder.replayed == 0 and seen


def test_other_weights_are_captured_anew(tokenizer, recorder):
    lm = small(tokenizer)
    engine = lm.engine(prefix_sharing=False)

    def ask():
        job = engine.submit([5, 9], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
        engine.run()
        return job.generations[0].token_ids

    first = ask()
    other = tiny_model(lm.vocab_size, seed=7)
    for mine, new in zip(lm.model.modules(), other.modules()):
        mine._parameters.update(new._parameters)
    assert ask() == answers(LanguageModel(other, tokenizer), [[5, 9]], cuda_graphs=False)[0].token_ids + ask()[4:] != first
    assert recorder.captured == 2


def test_what_cannot_be_captured_is_said_once(tokenizer, recorder):
    lm = small(tokenizer, layers=(Block(mixer=Attention(heads=4), feedforward=MoE(experts=4, top=2, hidden=32)),))
    with pytest.warns(UserWarning, match="runs without CUDA graphs: its step cannot be captured"):
        replayed = answers(lm, PROMPTS[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(replayed, answers(lm, PROMPTS[:2], cuda_graphs=False))


def test_a_graph_that_is_asked_for_and_cannot_be(tokenizer):
    with pytest.raises(UserError, match="needs a model of attention on CUDA, and this one is on cpu"):
        small(tokenizer).engine(cuda_graphs=True)


# ---- planted bugs: each is found


def test_lengths_that_python_knows_are_found(tokenizer, recorder, monkeypatch):
    """A number that is read while the graph is captured stays as it was."""
    real = graphs.Ragged

    def known(past, counts, tables, device, longest):
        return real(past, counts, tables, device, longest=1)

    monkeypatch.setattr(graphs, "Ragged", known)
    lm = small(tokenizer)
    assert answers(lm, PROMPTS)[1].token_ids != answers(lm, PROMPTS, cuda_graphs=False)[1].token_ids


def test_an_output_that_is_not_copied_is_found(tokenizer, recorder, monkeypatch):
    real = graphs.Graph.run
    kept = []

    def run(self, work, tables):
        kept.append((self.output, real(self, work, tables)))
        return kept[-1][1]

    monkeypatch.setattr(graphs.Graph, "run", run)
    answers(small(tokenizer), PROMPTS[:1])
    assert not torch.equal(kept[0][1], kept[0][0][0, :1])  # the buffer has the last step's


def test_rows_of_nobody_write_to_nobodys_page(tokenizer, recorder, monkeypatch):
    real = graphs.Graphs.__init__

    def first_page(self, stack, layers, nobody, context, backend):
        real(self, stack, layers, dict.fromkeys(nobody, 0), context, backend)

    monkeypatch.setattr(graphs.Graphs, "__init__", first_page)
    lm = small(tokenizer)
    assert [one.token_ids for one in answers(lm, PROMPTS)] != [one.token_ids for one in answers(lm, PROMPTS, cuda_graphs=False)]
