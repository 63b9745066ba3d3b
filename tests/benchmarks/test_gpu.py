"""The scripts for a GPU: they refuse in one line where there is none, and their lines run on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "common.py")
TINY = ["kernels.py", "training.py", *(pytest.param(name, marks=pytest.mark.slow) for name in ("engine.py", "fused.py"))]


def run(name: str, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *options], env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPU only: there is one here, and it would be measured")
@pytest.mark.parametrize("name", [SCRIPTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS[1:])])
def test_without_a_gpu_they_refuse(name):
    done = run(name)
    assert done.returncode == 2, done.stderr[-1000:]
    assert done.stderr.startswith("this measures a CUDA device, and there is none here") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", TINY)
def test_they_run(name):
    done = run(name, "--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    if name == "kernels.py":
        assert all(found[kind]["equal_alone"] and found[kind]["largest_error"] == 0 for kind in ("bf16", "int8", "window"))
    if name == "engine.py":
        one = found["tokens_per_second"]["1"]
        assert one["headspring"] > 0 and one["transformers"] > 0 and found["certificate"]
