"""The dry run: what would run, why, what it would cost; and nothing is written."""

import json

import pytest
import torch

from headspring.artifacts import UserError
from headspring.cli import main
from headspring.data.batch import Batch
from headspring.line import estimates, memory
from headspring.line.plan import plan
from headspring.line.registry import Estimate, Known, Stage
from headspring.line.run import run
from headspring.tokenization.train import TokenizerConfig
from headspring.training.optimizers import build_optimizers
from headspring.training.pretrain import PretrainConfig
from tests.line import toy


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("headspring.line.run.write_report", lambda folder: folder / "report.html")
    return toy.write(tmp_path)


def rows(recipe, *overrides, **options):
    planned = plan(recipe, overrides, recipe.parent / "run", registry=toy.STAGES, **options)
    return {row.stage: "cached" if row.cached else row.reason for row in planned.stages}


def test_a_new_folder_runs_everything_and_nothing_is_written(recipe):
    assert set(rows(recipe).values()) == {""}
    assert not (recipe.parent / "run").exists() and toy.calls == []


def test_what_is_cached_and_why_the_rest_would_run(recipe):
    run(recipe, (), recipe.parent / "run", registry=toy.STAGES)
    before = sorted(recipe.parent.rglob("*"))
    assert set(rows(recipe).values()) == {"cached"}
    found = rows(recipe, "sft.steps=3")
    assert found["pretrain"] == found["evaluate-pretrain"] == "cached"
    assert found["sft"] == "config.steps 2 → 3" and found["dpo"] == "after sft" and found["evaluate-dpo"] == "after dpo"
    assert rows(recipe, force="evaluate-sft")["evaluate-sft"] == "forced"
    assert list(rows(recipe, until="tokenizer")) == ["data", "tokenizer"]
    assert sorted(recipe.parent.rglob("*")) == before


def test_bad_input_is_refused_as_a_run_would(recipe):
    with pytest.raises(UserError, match="did you mean 'steps'"):
        rows(recipe, "sft.stpes=3")
    with pytest.raises(UserError, match="--until: |--until nothing"):
        rows(recipe, until="nothing")


def test_the_sum_says_whether_it_is_complete(recipe, capsys):
    costly = {
        kind: Stage(**{**vars(stage), "estimate": lambda config, known: Estimate(seconds=30.0, parameters=2e6)})
        for kind, stage in toy.STAGES.items()
    }
    whole = plan(recipe, (), recipe.parent / "run", registry=costly)
    assert whole.complete and whole.seconds == 270.0
    whole.print()
    out = capsys.readouterr().out
    assert "2 M" in out and "~4 min 30 s" in out
    part = plan(recipe, (), recipe.parent / "run", registry={**costly, "data": toy.STAGES["data"]})
    assert not part.complete and part.seconds == 240.0
    part.print()
    assert "> 4 min 00 s" in capsys.readouterr().out
    figures = json.loads(json.dumps(part.as_json()))
    assert figures["stages"][0]["seconds"] is None and figures["stages"][1]["seconds"] == 30.0


def test_fine_tuning_costs_as_much_a_token_as_pretraining():
    class Config:
        steps, batch_size, sequence_length, epochs = 10, 4, None, None

    model = Estimate(seconds=100.0, tokens=1000.0, parameters=5.0, flops=1e6, sample_tokens=50.0, seconds_per_token=0.1)
    found = estimates.sft(Config, Known({}, {"model": model}))
    assert (found.tokens, found.seconds, found.flops) == (2000.0, 200.0, 2e6)
    Config.epochs = 2
    assert estimates.sft(Config, Known({}, {"model": model})).seconds is None


def test_the_real_pretraining_is_measured():
    config = PretrainConfig(model={"width": 32, "depth": 1, "heads": 2, "context": 32}, steps=3, batch_size=2)
    found = estimates.pretrain(config, Known({"tokenizer": TokenizerConfig(vocab_size=300)}, {}))
    assert found.tokens == 3 * 2 * 32 and found.sample_tokens == 32
    assert found.parameters > 300 * 32 and found.seconds > 0 and found.flops > 6 * found.tokens * 300 * 32


def test_a_fresh_run_of_every_recipe_can_be_estimated(tmp_path, monkeypatch):
    """Only pretraining is measured; here a stand-in takes a millisecond a token."""
    figures = {"seconds": 100.0, "tokens": 1e5, "parameters": 1e6, "flops": 1e12}
    monkeypatch.setattr("headspring.training.pretrain.plan", lambda config, vocab_size: figures)
    (tmp_path / "a.txt").write_text("x" * 12_000)
    whole = plan("smoke", [f"data.sources={tmp_path / 'a.txt'}"], tmp_path / "run")
    assert whole.complete
    by_name = {row.stage: row.estimate for row in whole.stages}
    assert by_name["data"].bytes == 12_000 and by_name["data"].seconds == pytest.approx(0.01)
    assert by_name["tokens"].tokens == pytest.approx(12_000 / 3.3)
    assert by_name["sft"].seconds == pytest.approx(by_name["sft"].tokens / 1e5 * 100.0)
    assert by_name["evaluate-initial"].seconds < by_name["evaluate-sft"].seconds
    assert not plan("smoke", ["data.sources=s3://bucket/a.txt"], tmp_path / "run").complete


# ---- memory


def pretrain_memory(**changes):
    config = PretrainConfig.model_validate(
        {"model": {"width": 32, "depth": 3, "heads": 2, "context": 32}, "steps": 3, "batch_size": 6, "precision": "fp32"}
        | changes
    )
    return config, memory.pretrain(config, Known({"tokenizer": TokenizerConfig(vocab_size=300)}, {}))


@pytest.mark.parametrize("optimizer", [{"kind": "adamw"}, {"kind": "muon"}])
@pytest.mark.parametrize("model", [{"tied": False}, {"kind": "headed", "body": {"width": 32, "depth": 2, "context": 32}}])
def test_the_memory_of_weights_gradients_and_optimizer_is_what_a_step_holds(optimizer, model):
    model = model if "kind" in model else {"width": 32, "depth": 3, "heads": 2, "context": 32} | model
    objective = "multi_token" if "kind" in model else "next_token"
    config, found = pretrain_memory(model=model, optimizer=optimizer, objective=objective)
    module = config.described(300).build()
    optimizers = build_optimizers(module, config.optimizer)
    tokens = torch.randint(0, 300, (2, 17))
    torch.autograd.backward(config.minimised().loss(module, Batch(tokens[:, :-1], tokens[:, 1:]))[0])
    for each in optimizers:
        each.step()
    states = [value for each in optimizers for state in each.state.values() for value in state.values()]
    held = sum(tensor.nbytes for tensor in states if tensor.ndim)  # AdamW's step is one number
    assert found.optimizer == held
    assert found.weights == sum(p.nbytes for p in module.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in module.parameters())


def test_activations_grow_with_what_is_computed_at_once():
    _, whole = pretrain_memory()
    _, pieces = pretrain_memory(micro_batch_size=2)
    _, half = pretrain_memory(precision="bf16")
    _, again = pretrain_memory(activation_checkpointing=True)
    assert whole.tokens == 6 * 32 == 3 * pieces.tokens
    assert whole.activations == 3 * pieces.activations == 2 * half.activations
    assert 0.3 < again.activations / whole.activations < 0.8
    counted = PretrainConfig(model={"kind": "ngram"})
    assert memory.pretrain(counted, Known({"tokenizer": TokenizerConfig(vocab_size=300)}, {})) is None


def test_what_follows_a_model_knows_its_memory(tmp_path):
    """A finished stage too, whose time is known and not estimated; a frozen reference is held once more."""
    (tmp_path / "a.txt").write_text("x" * 12_000)
    with pytest.MonkeyPatch.context() as patch:
        figures = {"seconds": 100.0, "tokens": 1e5, "parameters": 1e6, "flops": 1e12}
        patch.setattr("headspring.training.pretrain.plan", lambda config, vocab_size: figures)
        whole = plan("smoke", [f"data.sources={tmp_path / 'a.txt'}"], tmp_path / "run")
    found = {row.stage: row.memory for row in whole.stages}
    assert found["dpo"].weights == 2 * found["sft"].weights == 2 * found["pretrain"].weights > 0
    assert found["data"] is None and found["evaluate-sft"] is None
    said = json.loads(json.dumps(whole.as_json()))["stages"]
    by_name = {row["stage"]: row["memory"] for row in said}
    assert by_name["pretrain"]["total"] == found["pretrain"].total and by_name["tokenizer"] is None


def test_the_verb_prints_what_memory_is_made_of_and_the_model(tmp_path, monkeypatch, capsys):
    figures = {"seconds": 100.0, "tokens": 1e5, "parameters": 1e6, "flops": 1e12}
    monkeypatch.setattr("headspring.training.pretrain.plan", lambda config, vocab_size: figures)
    arguments = ["smoke", "--run-dir", str(tmp_path / "run"), "--until", "pretrain", "--parts"]
    with pytest.raises(SystemExit) as ended:
        monkeypatch.setattr("sys.argv", ["headspring", "plan", *arguments])
        main()
    out = capsys.readouterr().out
    assert not ended.value.code and "optimizer" in out and "tokens at once" in out and "mixer.pre" in out
    assert not (tmp_path / "run").exists()
