"""Recipes with a `quantize` stage: what it takes, what it refuses, and the whole line with one in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import headspring as hs
from headspring.artifacts import UserError
from headspring.artifacts.manifest import read_manifest
from headspring.inference.quantization.installing import installed
from headspring.line.recipe import load_recipe

ROOT = Path(__file__).parents[2]
HEADSPRING = Path(sys.executable).with_name("headspring")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STAGES = """
data:
  sources:
    stdlib: {kind: stdlib, max_documents: 120}
  split: {validation: 0.1, test: 0.1}
tokenizer: {vocab_size: 512}
tokens:
pretrain:
  model: {width: 64, depth: 2, heads: 2, context: 128}
  steps: 12
  batch_size: 8
  compile: never
"""
EVALUATE = "evaluate: {tasks: null, completions: 0, functions: 0, held_out: {max_bytes: 20000}}\n"


def recipe(folder: Path, more: str) -> Path:
    path = folder / "small.yaml"
    path.write_text("recipe: small\ndescription: one sentence\n" + STAGES + more)
    return path


def test_it_takes_the_nearest_model_and_is_evaluated(tmp_path):
    loaded = load_recipe(recipe(tmp_path, "quantize: {method: int4, group: 64}\n" + EVALUATE))
    steps = {step.name: step for step in loaded.steps}
    assert steps["quantize"].inputs["model"].step == "pretrain"
    assert steps["evaluate-quantize"].inputs["model"].step == "quantize"
    assert loaded.models[-1] == "quantize"


def test_training_goes_on_from_floats(tmp_path):
    loaded = load_recipe(recipe(tmp_path, "quantize:\nsft:\n"))
    assert {step.name: step for step in loaded.steps}["sft"].inputs["model"].step == "pretrain"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{metod: int4}", "did you mean 'method'"),
        ("{method: int3}", "unknown value .int3."),
        ("{method: int8, minimum: true}", "minimum is for 4 bits"),
        ("{method: int4, calibration: 100}", "int4-gptq"),
        ("{group: 48}", "group"),
    ],
)
def test_unfit_keys_are_refused_with_their_place(tmp_path, stage, message):
    with pytest.raises(UserError, match=message) as error:
        load_recipe(recipe(tmp_path, f"quantize: {stage}\n"))
    assert "small.yaml:15" in str(error.value) and "quantize" in str(error.value)


@pytest.mark.slow
def test_the_line_with_it(tmp_path):
    """From text to an answer of the quantized model; the report has its change."""
    stages = "quantize: {method: int4-gptq, calibration: 2000, held_out: 1000}\n" + EVALUATE
    place = tmp_path / "run"
    command = [HEADSPRING, "run", recipe(tmp_path, stages), "--run-dir", place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = read_manifest(place / "quantize")
    assert set(manifest.inputs) == {"model", "data"} and manifest.kind == "quantize"
    assert manifest.metrics["bytes"] < manifest.metrics["original_bytes"] / 3
    assert "bytes, held-out bits per" in done.stdout and "KL" in done.stdout
    assert "times smaller" in (place / "report.html").read_text()
    lm = hs.load(place)
    assert lm.kind == "quantize" and installed(lm.model)
    asked = [HEADSPRING, "generate", place, "--prompt", "def ", "--max-tokens", "4", "--json"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=100, env=ENVIRONMENT)
    assert answer.returncode == 0 and json.loads(answer.stdout), answer.stderr
    measured = read_manifest(place / "evaluate-quantize").metrics["bits_per_byte"]["all"]
    before = read_manifest(place / "evaluate-pretrain").metrics["bits_per_byte"]["all"]
    assert measured == pytest.approx(before, rel=0.05) and measured != before
