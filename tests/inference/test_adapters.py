"""Adapters beside their base: in one engine, in Python, on the command line. `tests/models/test_lora.py` has the definition."""

import pytest
import torch
from typer.testing import CliRunner

from headspring.artifacts import UserError
from headspring.cli import app
from headspring.inference import LanguageModel
from headspring.inference.adapters import Adapting, stacks
from headspring.inference.conversion import convert
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.inspection import Inspection, Steer
from headspring.inference.sampling_params import SamplingParams
from headspring.models import Attention, Block, GatedLinear, Mamba2, SwiGLU
from headspring.models.adapter_folder import save_adapter
from headspring.models.families.registry import FAMILIES
from headspring.models.kernels import multiplies_natively
from headspring.models.lora import attached
from headspring.models.ragged import Ragged
from tests.models.adapters import alike, narrow, random_adapter
from tests.models.parity import close

from .tiny import tiny_model

CONFIG = EngineConfig(max_sequences=8, chunk=16, memory=8 << 20, debug=True)
PARAMS = SamplingParams.of(max_tokens=12, temperature=0)
PROMPT = list(range(20, 62))
RANKS = {"poet": 4, "clerk": 20, "judge": 40}


@pytest.fixture(scope="module")
def lm(tokenizer):
    return LanguageModel(narrow(tiny_model(tokenizer.vocab_size, width=128)), tokenizer)


@pytest.fixture(scope="module")
def adapters(lm):
    return {name: random_adapter(lm.model, rank, seed=rank) for name, rank in RANKS.items()}


def answers(lm, adapters, asked, config=CONFIG, edits=None):
    """Log-probabilities and tokens of each (adapter's name, prompt), all in one engine."""
    engine = Engine(lm.model, lm.tokenizer, config, adapters=adapters)
    jobs = [engine.submit(prompt, PARAMS, adapter=name, edits=edits) for name, prompt in asked]
    engine.run()
    return [(job.generations[0].token_ids, job.generations[0].logprobs) for job in jobs]


def test_each_row_is_what_it_is_alone(lm, adapters):
    asked = [(name, PROMPT[start:]) for start in (0, 5) for name in (None, *adapters)]
    together = answers(lm, adapters, asked)
    assert len({tuple(tokens) for tokens, _ in together[:4]}) == 4, "adapters that change nothing prove nothing"
    for one, got in zip(asked, together, strict=True):
        assert alike(lm.model, answers(lm, adapters, [one]), [got])
        view = lm if one[0] is None else lm.with_adapter(adapters[one[0]])
        alone = view.generate([one[1]], max_tokens=12, temperature=0)[0]
        assert alike(lm.model, [(alone.token_ids, alone.logprobs)], [got])


def test_a_mask_of_other_rows_would_be_seen(lm, adapters, monkeypatch):
    asked = [(name, PROMPT) for name in (None, *adapters)]
    together = answers(lm, adapters, asked)
    monkeypatch.setattr(Adapting, "step", _shifted(Adapting.step))
    assert not alike(lm.model, answers(lm, adapters, asked), together)


def _shifted(step):
    def wrong(self, ragged, adapters):
        return step(self, ragged, [*adapters[1:], adapters[0]])

    return wrong


def test_steps_without_adapters_keep_the_fused_blocks(lm, adapters, monkeypatch):
    from headspring.models.fused_block import FusedStack

    runs = []
    run = FusedStack.run
    monkeypatch.setattr(FusedStack, "run", lambda *given: (runs.append(1), run(*given))[1])
    base = answers(lm, adapters, [(None, PROMPT)])
    fused = len(runs)
    if multiplies_natively(torch.empty(0, dtype=torch.bfloat16)):
        assert fused > 0
    beside = answers(lm, adapters, [("poet", PROMPT)])
    assert len(runs) == fused and beside != base


def test_with_speculation_and_steering(lm, adapters):
    asked = [(name, PROMPT) for name in (None, "poet", "clerk")]
    plain = answers(lm, adapters, asked)
    for kind in ({"kind": "prompt_lookup"}, {"kind": "early_exit", "layers": 1}):
        proposing = CONFIG.model_copy(update={"speculation": EngineConfig.of(speculation=kind).speculation})
        assert alike(lm.model, answers(lm, adapters, asked, proposing), plain)
    steer = Inspection(steer=[Steer(site="layers.0.residual.post", vector=[1.0] * 128, scale=2.0, start=0)])
    steered = answers(lm, adapters, asked, edits=steer)
    assert not alike(lm.model, steered, plain)
    assert alike(lm.model, steered, [answers(lm, adapters, [one], edits=steer)[0] for one in asked])


def test_few_adapters_are_held_when_many_come(lm, adapters, monkeypatch):
    monkeypatch.setattr("headspring.inference.adapters.MOST_COLUMNS", 40)
    asked = [(name, PROMPT) for name in ("judge", "poet", "clerk", "judge")]
    engine = Engine(lm.model, lm.tokenizer, CONFIG, adapters=adapters)
    for name, prompt in asked:
        job = engine.submit(prompt, PARAMS, adapter=name)
        engine.run()
        found = job.generations[0].token_ids, job.generations[0].logprobs
        assert alike(lm.model, [found], answers(lm, adapters, [(name, prompt)]))
    assert engine.runner.adapting.held == (adapters["judge"],)


MIXED = {
    "recurrent and attention": (Block(mixer=GatedLinear(), feedforward=SwiGLU(hidden=64)),
                                Block(mixer=Attention(heads=4), feedforward=SwiGLU(hidden=64))),
    "state space": (Block(mixer=Mamba2(), feedforward=SwiGLU(hidden=64)),),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_mixers_that_read_one_sequence_at_a_time(case, tokenizer):
    model = tiny_model(tokenizer.vocab_size, width=32, layers=MIXED[case])
    lm, made = LanguageModel(model, tokenizer), {name: random_adapter(model, 4, seed) for seed, name in enumerate("ab")}
    asked = [(name, PROMPT[start:]) for start in (0, 7) for name in (None, "a", "b")]
    for (name, prompt), (tokens, logprobs) in zip(asked, answers(lm, made, asked), strict=True):
        view = lm if name is None else lm.with_adapter(made[name])
        text = [*prompt, *tokens]
        expected = view.logprobs([text])[0][-len(tokens) :]
        assert logprobs == pytest.approx(expected.tolist(), abs=2e-4)


def test_quantized_weights_stay_as_they_are(lm, adapters, tmp_path):
    lm.save(tmp_path / "base")
    whole = LanguageModel.load(tmp_path / "base", quantize="int8", device="cpu")
    asked = [(name, PROMPT) for name in (None, "poet", "clerk")]
    together = answers(whole, adapters, asked)
    if lm.model.compute_dtype == torch.bfloat16:  # the plain kernels leave bits to the batch
        assert together == [answers(whole, adapters, [one])[0] for one in asked]
    assert len({str(one) for one in together}) == 3
    with pytest.raises(UserError, match="float weights were released"):
        whole.with_adapter(adapters["poet"]).merged()


# ---- in Python


def test_a_view_shares_all_weights(lm, adapters):
    view = lm.with_adapter(adapters["poet"])
    ours, theirs = dict(lm.model.named_parameters()), dict(view.model.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        base = lm.logits(ids)
        with attached(lm.model, adapters["poet"]):
            close(view.logits(ids), lm.logits(ids), 0.05)
        assert torch.equal(lm.logits(ids), base) and not torch.equal(view.logits(ids), base)
    learning, still = view.logits(ids), view.logits(ids).detach()
    assert alike(lm.model, [((), learning.flatten().tolist())], [((), still.flatten().tolist())]) and learning.requires_grad
    with torch.no_grad():
        assert alike(lm.model, [((), view.logits(ids).flatten().tolist())], [((), still.flatten().tolist())])
    learning.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.model.parameters()), "what stands before an adapter can learn"
    lm.model.zero_grad()
    with pytest.raises(UserError, match="has an adapter already"):
        view.with_adapter(adapters["clerk"])
    with pytest.raises(UserError, match="this one has none"):
        lm.merged()


def test_merged_is_the_definition(tokenizer, tmp_path):
    """In float32, to 1e-5: the view, the merged model, and it after a way through a folder; only touched tensors are new."""
    lm = LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer)
    adapter, ids = random_adapter(lm.model, 4, targets=("q", "v")), torch.tensor([PROMPT])
    view, base = lm.with_adapter(adapter), {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    merged = view.merged()
    with torch.no_grad():
        expected = view.logits(ids)
        close(merged.logits(ids), expected)
        view.save(tmp_path / "saved")
        close(LanguageModel.load(tmp_path / "saved").logits(ids), expected)
    ours, theirs = dict(lm.model.named_parameters()), dict(merged.model.named_parameters())
    assert {name for name in ours if ours[name] is not theirs[name]} == {f"{name}.weight" for name in adapter.parts}
    assert all(torch.equal(tensor, base[name]) for name, tensor in lm.model.state_dict().items())


def test_names_and_shapes_are_checked_first(lm, adapters, tokenizer):
    engine = Engine(lm.model, tokenizer, CONFIG, adapters=adapters)
    with pytest.raises(UserError, match="there is poet, clerk, judge"):
        engine.submit(PROMPT, PARAMS, adapter="painter")
    assert engine.stats().rejected == 1
    with pytest.raises(UserError, match="another base"):
        Engine(tiny_model(tokenizer.vocab_size, width=64), tokenizer, CONFIG, adapters=adapters)
    writer = FAMILIES["bart"]().build()
    with pytest.raises(UserError, match="without adapters"):
        Engine(writer, tokenizer, CONFIG, adapters={"poet": random_adapter(writer)})


def test_a_sequence_that_runs_again_needs_no_count_of_rows(lm, adapters):
    """A state may read more rows again than the step has: with one sequence all rows are its own."""
    adapting = Adapting(lm.model)
    with adapting.step(Ragged([5], [1]), [adapters["poet"]]), torch.no_grad():
        more = lm.logits([PROMPT])
    adapting.held, adapting.stacks = tuple(adapters.values()), stacks(lm.model, list(adapters.values()))
    with adapting.step(Ragged([5], [1]), [adapters["poet"]]), torch.no_grad():
        assert torch.equal(lm.logits([PROMPT]), more)


# ---- on the command line


def test_commands(lm, tokenizer, tmp_path):
    model = tiny_model(tokenizer.vocab_size)
    base = LanguageModel(model, tokenizer)
    base.save(tmp_path / "base")
    save_adapter(random_adapter(model, 4), model, tmp_path / "adapter")
    wanted = base.with_adapter(tmp_path / "adapter").generate("def add", max_tokens=8, temperature=0)[0].text
    options = ["--prompt", "def add", "--max-tokens", "8", "--temperature", "0"]
    shown = CliRunner().invoke(app, ["generate", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), *options])
    assert shown.stdout == wanted + "\n" != base.generate("def add", max_tokens=8, temperature=0)[0].text + "\n"
    arguments = [str(tmp_path / name) for name in ("base", "merged")]
    made = CliRunner().invoke(app, ["convert", *arguments, "--adapter", str(tmp_path / "adapter")])
    assert made.exit_code == 0, made.exception
    assert LanguageModel.load(tmp_path / "merged").generate("def add", max_tokens=8, temperature=0)[0].text == wanted
    with pytest.raises(UserError, match="quantize what was written"):
        convert(*arguments, quantize="int8", force=True, adapter=tmp_path / "adapter")
