"""The comparison of the three families runs, compares models of one size, and asks all three the same."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "three_families.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("three_families", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["three_families"] = module
    spec.loader.exec_module(module)
    return module


def test_models_are_of_one_size(benchmark):
    sizes = {family: value.build().num_parameters() for family, value in benchmark.equal(96, 4).items()}
    assert max(sizes.values()) / min(sizes.values()) < 1.01, sizes


def test_all_three_are_asked_the_same(benchmark):
    """The loss falls on the answer and on nothing else, and nothing that is read holds it."""
    task = benchmark.Transformation(held_out=True)
    for index in range(20):
        rows = {family: benchmark.Rows(task, family, seed=3) for family in benchmark.FAMILIES}
        one, samples = rows["encoder"].example(index), {family: row.sample(index) for family, row in rows.items()}
        for family, sample in samples.items():
            assert sample.targets[sample.targets != benchmark.IGNORE].tolist() == one.answer, family
        assert samples["encoder"].inputs.tolist() == one.before + [benchmark.MASK] * len(one.answer)
        assert samples["encoder–decoder"].source.tolist() == [*one.before, benchmark.GAP]
        decoder = samples["decoder"].inputs.tolist()
        assert decoder == [*one.before, benchmark.GAP, benchmark.START, *one.answer[:-1]]


def test_what_is_tested_is_not_trained_on(benchmark):
    assert not set(benchmark.Transformation(True).names) & set(benchmark.Transformation(False).names)
    assert not set(benchmark.library(True)) & set(benchmark.library(False))


@pytest.mark.slow
def test_it_runs(tmp_path):
    out = tmp_path / "three.json"
    done = subprocess.run([sys.executable, SCRIPT, "--quick", "--out", out], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 9 and all(0 <= row["mean"] <= 1 for row in rows)
