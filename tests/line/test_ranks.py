"""The line under torchrun: every rank trains, the leader alone does everything else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.line import toy


@pytest.mark.slow
def test_two_ranks_run_one_line(tmp_path):
    toy.write(tmp_path)
    worker = Path(__file__).with_name("ranks_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    evaluations = "evaluate-initial,evaluate-pretrain,evaluate-sft,evaluate-dpo"
    assert (tmp_path / "calls-0").read_text() == f"data,tokenizer,pretrain,sft,dpo,{evaluations} True"
    assert (tmp_path / "calls-1").read_text() == "pretrain,sft,dpo False"
    assert done.stdout.count("data: running") == 1
