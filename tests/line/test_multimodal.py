"""The recipe of a model that looks, end to end: text first, then pictures; its report, and the model that a run ends with."""

import json
from pathlib import Path

import pytest

import headspring as hs
from headspring.artifacts.manifest import read_manifest
from headspring.line.plan import plan

RECIPE = Path(__file__).parents[2] / "recipes" / "families" / "multimodal.yaml"
SMALL = {
    "data.sources.stdlib.max_documents": 60,
    "data.split.validation": 0.2,
    "tokenizer.vocab_size": 400,
    "pretrain.model": {"width": 32, "depth": 1, "heads": 2, "context": 64},
    "pretrain.steps": 4,
    "pretrain.compile": "never",
    "pretrain.validation_samples": 4,
    "multimodal.tower": {"kind": "vision", "width": 32, "depth": 1, "heads": 2},
    "multimodal.steps": 8,
    "multimodal.compile": "never",
    "multimodal.validation_questions": 20,
}


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    place = tmp_path / "run"
    done = hs.run(RECIPE, overrides=SMALL, run_dir=place, quiet=True)
    metrics = read_manifest(place / "multimodal").metrics
    assert metrics["answers"]["after"]["n"] == 20 and metrics["validation_after"]["loss"] < metrics["validation_before"]["loss"]
    assert json.loads((place / "multimodal" / "config.json").read_text())["model"]["kind"] == "multimodal"
    assert hs.load(place).kind == "multimodal"
    assert "questions about held-out items answered" in done.report.read_text()
    row = next(row for row in plan(RECIPE, SMALL, place, force="multimodal").stages if row.stage == "multimodal")
    assert row.estimate.tokens == 8 * 32 * (16 + 16) and row.estimate.seconds > 0
