"""A script run by two processes that talk to each other."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def in_two_processes(folder: Path, worker: str, timeout: float) -> list[dict[str, torch.Tensor]]:
    """What two gloo processes save: `worker` is a script that is given `folder` and writes rank0 or rank1.safetensors."""
    (folder / "worker.py").write_text(worker)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", folder / "worker.py", folder]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]
