"""The real line on the smoke recipe: every stage, skipped the second time, and resumed bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headspring.artifacts.manifest import read_manifest
from headspring.line.plan import plan
from headspring.line.recipe import load_recipe
from headspring.line.run import run

ROOT = Path(__file__).parents[2]
HEADSPRING = str(Path(sys.executable).with_name("headspring"))


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe):
    loaded = load_recipe(recipe)
    assert loaded.name == recipe.stem and loaded.description
    assert {"data", "tokenizer", "tokens", "pretrain"} <= {step.name for step in loaded.steps}


def test_the_line_ran_and_every_artifact_says_what_it_is(smoke_run):
    folder = smoke_run / "runs" / "quickstart"
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "done"
    for name in record["stages"]:
        manifest = read_manifest(folder / name)
        assert manifest.kind == record["kinds"][name] and manifest.outputs and manifest.cost["seconds"] > 0
        for source in manifest.inputs.values():
            assert re.fullmatch("[0-9a-f]{64}", source["sha256"])
    assert not list(folder.glob("*.partial"))
    assert (folder / "report.html").stat().st_size < 3e6
    for name in ("pretrain", "sft", "dpo"):
        assert (folder / name / "model.safetensors").is_file()


def test_training_lowers_the_bits_per_byte(smoke_run):
    folder = smoke_run / "runs" / "quickstart"
    before, after = (read_manifest(folder / f"evaluate-{name}").metrics for name in ("initial", "pretrain"))
    assert after["bits_per_byte"]["all"] < before["bits_per_byte"]["all"] - 0.5
    assert "task_accuracy" not in before and "task_accuracy" in after


def test_nothing_runs_twice(smoke_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(smoke_run / "runs" / "quickstart", copy)
    recipe = smoke_run / "recipes" / "quickstart.yaml"
    assert run(recipe, run_dir=copy, quiet=True).made == ()
    rows = {row.stage: row.cached for row in plan(recipe, ["evaluate.completions=3"], copy).stages}
    assert rows == {name: not name.startswith("evaluate") or name == "evaluate-initial" for name in rows}


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path, end):
    steps = ["pretrain.steps=160", "pretrain.checkpoint_every=20", "pretrain.compile=never"]
    command = [HEADSPRING, "run", str(ROOT / "recipes" / "smoke.yaml"), *steps, "--until", "pretrain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def line(name):
        return subprocess.Popen(
            [*command, "--run-dir", str(tmp_path / name)], env=environment, stderr=subprocess.PIPE, text=True
        )

    assert line("whole").wait(200) == 0
    process = line("parts")
    log = tmp_path / "parts" / "pretrain.partial" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(log.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(end)
    _, err = process.communicate(timeout=100)
    assert process.returncode == (1 if end == signal.SIGTERM else -signal.SIGKILL)
    if end == signal.SIGTERM:
        assert re.search(r"saved at step \d+ of 160; run the same command again to go on", err)
    assert (tmp_path / "parts" / "tokens" / "manifest.json").is_file() and not (tmp_path / "parts" / "pretrain").exists()
    assert line("parts").wait(200) == 0
    whole, parts = (read_manifest(tmp_path / name / "pretrain") for name in ("whole", "parts"))
    assert whole.outputs["model.safetensors"] == parts.outputs["model.safetensors"]
    assert whole.cache_key == parts.cache_key
