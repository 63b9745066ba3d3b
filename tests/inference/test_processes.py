"""Two processes with half of the model each are one engine: same answers, same ends, and no hanging when one is lost."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headspring.artifacts import UserError
from headspring.inference.engine.processes import _check_sites
from headspring.inference.inspection import Inspection

from .processes_worker import CONFIGS, everything, model

ROOT = Path(__file__).parents[2]


def together(folder: Path, how: str, timeout: float) -> list:
    """What the two processes wrote, or None for one that wrote nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.inference.processes_worker", str(folder), how]
    running = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1].decode() for process in running[: 1 if how == "hangs" else 2]]
    finally:
        for process in running:
            process.kill()
    paths = [folder / f"rank{rank}.json" for rank in (0, 1)]
    assert any(path.exists() for path in paths), errors
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    return together(tmp_path_factory.mktemp("agree"), "agree", 200)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_are_one_engine(name, agreed):
    first, second = (found[name] for found in agreed)
    alone = everything(model().engine(**CONFIGS[name]))
    assert second["left"] == 0 and first.pop("stats") == second["stats"]
    ends = {"cancelled": "cancelled", "cancelled from inside": "cancelled", "too late": "timeout", "raises": "failed"}
    assert {key: outcome for key, (outcome, _) in first.items()} == {key: ends.get(key, "finished") for key in alone}
    for key in alone.keys() - {"without seed"}:
        assert first[key] == list(alone[key]), key
    assert len(first["without seed"][1][0]) == 6


@pytest.mark.parametrize("how", ["dies", *(pytest.param(how, marks=pytest.mark.slow) for how in ("hangs", "disagrees"))])
def test_a_lost_process_ends_the_run(how, tmp_path):
    first, second = together(tmp_path, how, 200)
    kind, message, seconds = second if how == "disagrees" else first
    assert kind == "HeadspringError" and seconds < 100
    assert "start all of them again" in message
    assert ("computed different answers" if how == "disagrees" else "has ended or hangs") in message
    if how == "disagrees":
        assert "has ended or hangs" in first[1]


def test_sites_of_which_a_process_has_a_part_are_refused():
    _check_sites(Inspection(capture=["layers.0.mixer.out", "embed"], lens={"sites": [0]}))
    with pytest.raises(UserError, match=r"each process has a part of 'layers.0.mixer.heads'"):
        _check_sites(Inspection(capture=["layers.0.mixer.heads"]))
