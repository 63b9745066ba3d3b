"""The stage and the command, from a model's folder to figures."""

import json

import pytest
import typer
from typer.testing import CliRunner

from headspring.artifacts import UserError, sandbox
from headspring.cli import evaluate as command
from headspring.data.tasks import TaskConfig
from headspring.evaluation.evaluate import EvaluateConfig, evaluate, measure

SMALL = EvaluateConfig(tasks=TaskConfig(per_kind=2), completions=4, functions=2, max_tokens=12, precision="fp32")
NOTHING_ELSE = {"tasks": None, "sets": (), "completions": 0, "functions": 0, "samples": (), "questions": ()}
BITS_ONLY = SMALL.model_copy(update=NOTHING_ELSE)


@pytest.fixture(scope="module")
def metrics(model_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate(SMALL, model_folder, data_folder, folder), folder


def test_metrics(metrics):
    found, folder = metrics
    assert set(found["bits_per_byte"]) == {"all", "code", "prose"}
    for rate in [*found["tasks"].values(), found["task_accuracy"], found["parse_rate"], found["function_pass_rate"]]:
        assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
    assert found["task_accuracy"]["n"] == sum(rate["n"] for rate in found["tasks"].values())
    assert found["doctest_pass_rate"]["n"] > 0 and "seccomp" in found["doctest_pass_rate"]["isolation"]
    assert len(found["samples"]) == 5 and all(set(sample) == {"prompt", "text"} for sample in found["samples"])
    assert json.loads((folder / "evaluation.json").read_text()) == found
    assert len((folder / "tasks.jsonl").read_text().splitlines()) == found["task_accuracy"]["n"]


def test_the_same_again(metrics, model_folder, data_folder, tmp_path):
    assert evaluate(SMALL, model_folder, data_folder, tmp_path) == metrics[0]
    assert (tmp_path / "tasks.jsonl").read_bytes() == (metrics[1] / "tasks.jsonl").read_bytes()


def test_parts_can_be_left_out(model_folder, data_folder, tmp_path, lm):
    found = evaluate(BITS_ONLY, model_folder, data_folder, tmp_path)
    assert set(found) == {"bits_per_byte", "perplexity", "held_out"}
    nothing = BITS_ONLY.model_copy(update={"held_out": None})
    assert measure(lm, nothing, data_folder) == ({}, [])


def test_execution_needs_isolation(model_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_mechanism", lambda: None)
    with pytest.raises(UserError, match="--unsafe-execution"):
        evaluate(SMALL, model_folder, data_folder, tmp_path)
    config = SMALL.model_copy(update={"execute": False, "samples": (), "held_out": None})
    assert "doctest_pass_rate" not in evaluate(config, model_folder, data_folder, tmp_path)


def run(*arguments):
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_command(model_folder, data_folder, tmp_path):
    questions = tmp_path / "mine.jsonl"
    questions.write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    options = ("--data", data_folder, "--tasks", 1, "--max-bytes", 1000, "--set", questions, "--output", tmp_path / "a")
    result = run(model_folder, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tasks"]["mine"]["n"] == 1 and found["held_out"]["bytes"] <= 1000
    again = run(
        model_folder, *options[:-1], tmp_path / "b", "--compare", tmp_path / "a", "--no-execute", "--sample", "def [bold]x"
    )
    assert again.exit_code == 0, again.output
    assert "bits per byte · all" in again.stdout and "+0.0%" in again.stdout and "def [bold]x" in again.stdout


def test_command_on_a_text(model_folder, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("Some notes. " * 40)
    found = json.loads(run(model_folder, "--text", text, "--json").stdout)
    assert found["bits_per_byte"]["notes.txt"] == found["bits_per_byte"]["all"] > 0


def test_data_beside_the_model(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "documents.parquet").touch()
    (tmp_path / "sft").mkdir()
    for model in (tmp_path, tmp_path / "sft"):
        assert command.find_data(str(model), None) == tmp_path / "data"
    assert command.find_data("elsewhere", tmp_path) == tmp_path / "data"
    assert command.find_data("elsewhere", None) is None


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--data", "nowhere"],
        ["--text", "nowhere.txt"],
        ["--text", __file__, "--split", "training"],
        ["--text", __file__, "--compare", "a"],
    ],
)
def test_bad_usage(model_folder, options):
    result = run(model_folder, *options)
    assert isinstance(result.exception, UserError) and "\n" not in str(result.exception)
