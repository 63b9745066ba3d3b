"""The dry run: what would run, why, what it would cost; and nothing is written."""

import json

import pytest

from headspring.artifacts import UserError
from headspring.line import estimates
from headspring.line.plan import plan
from headspring.line.registry import Estimate, Known, Stage
from headspring.line.run import run
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
    from headspring.tokenization.train import TokenizerConfig
    from headspring.training.pretrain import PretrainConfig

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
