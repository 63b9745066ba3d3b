"""The scripts that measure cost and speed: runs are resumed pair by pair, and what is printed is what was measured."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import families_speed

    return families_speed


def found(speed, ours: float, theirs: float) -> dict:
    turns = {name: [{"wall": 2 * s, "processor": s}] * 3 for name, s in (("headspring", ours), ("transformers", theirs))}
    return {clock: speed.compared(turns, clock, 100) for clock in speed.CLOCKS}


def test_a_run_goes_on_where_it_was_stopped(speed, monkeypatch, tmp_path, capsys):
    asked, out = [], tmp_path / "speed.json"

    def process(name, mode, sizes):
        asked.append((name, mode))
        return {"failed": "it broke"} if name == "t5" else found(speed, 1.0, 1.5)

    def run(*arguments: str) -> list[dict]:
        asked.clear()
        monkeypatch.setattr("sys.argv", ["families_speed.py", "--out", str(out), *arguments])
        speed.main()
        return json.loads(out.read_text())["rows"]

    monkeypatch.setattr(speed, "in_a_process", process)
    assert len(run("--pairs", "bert", "--modes", "eager")) == 1
    rows = run("--pairs", "bert", "t5")
    assert asked == [("bert", "compiled"), ("t5", "eager"), ("t5", "compiled")] and len(rows) == 4
    assert len(run("--pairs", "bert", "--again")) == 4 and asked == [("bert", "eager"), ("bert", "compiled")]
    printed = capsys.readouterr().out
    assert "it broke" in printed and "(known)" in printed
    assert rows[0]["processor"]["times_faster"] == 1.5 and rows[0]["wall"]["tokens_per_second"]["headspring"] == 50
    with pytest.raises(SystemExit, match="another shape: name another --out"):
        run("--length", "64")


def test_the_table_of_costs_has_both_passes_and_the_ratio(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention_cost

    full = {4096: {"seconds": 0.2, "forward": 0.05, "kept": 2e6}}
    sparse = {4096: {"seconds": 0.1, "forward": 0.04, "kept": 3e6}, 8192: {"seconds": 0.2, "forward": 0.08, "kept": 6e6}}
    lines = attention_cost.table({"attention": full, "strided": sparse}).splitlines()
    assert lines[0] == "|  | 4,096 | 8,192 |"
    assert lines[3] == "| strided | 40 + 60 (2.0×), 3 MB | 80 + 120, 6 MB |"
