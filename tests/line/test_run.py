"""Running a line: what is skipped, what runs again and why, and what survives an end at any moment."""

import json
import multiprocessing
import os
import signal

import pytest

from headspring.artifacts import CorruptArtifact, HeadspringError, UserError
from headspring.artifacts.manifest import read_manifest
from headspring.line.registry import Stage
from headspring.line.run import run as run_line
from tests.line import toy

TRAINED = ["data", "tokenizer", "pretrain", "sft", "dpo"]
ALL = [*TRAINED, "evaluate-initial", "evaluate-pretrain", "evaluate-sft", "evaluate-dpo"]
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """The report has its own tests; here its half second a run would be most of the time."""
    monkeypatch.setattr("headspring.line.run.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def line(tmp_path):
    recipe = toy.write(tmp_path)

    def run(*overrides, registry=toy.STAGES, **options):
        toy.calls.clear()
        return run_line(recipe, overrides, tmp_path / "run", registry=registry, **options)

    return run


def steps_done(folder):
    return [int(line) for line in (folder / "logs" / "steps").read_text().split()]


def test_everything_runs_once_and_then_nothing(line, capsys):
    first = line()
    assert toy.calls == ALL == list(first.made)
    assert "skipped" not in capsys.readouterr().out
    again = line()
    assert toy.calls == [] and again.made == ()
    assert capsys.readouterr().out.count("skipped (unchanged)") == len(ALL)


def test_the_manifest_says_what_was_made_of_what(line):
    run = line()
    manifest = run.manifest("sft")
    assert manifest.kind == "sft" and manifest.seed == 3 and manifest.config["steps"] == 2
    assert manifest.inputs["model"] == {"stage": "pretrain", "sha256": run.manifest("pretrain").content_hash}
    assert set(manifest.outputs) == {"weights", "initial/weights"}
    assert manifest.cost["flops"] == 7.0 and manifest.cost["peak_memory_bytes"] > 1e6 and manifest.cost["seconds"] >= 0
    assert "cost" not in run.metrics("sft")
    assert manifest.environment["versions"]["torch"]
    initial = run.manifest("evaluate-initial").inputs["model"]
    assert initial["stage"] == "pretrain/initial" and initial["sha256"] != manifest.inputs["model"]["sha256"]
    record = json.loads((run.folder / "run.json").read_text())
    assert record["stages"] == ALL and record["state"] == "done" and set(record["states"].values()) == {"done"}


def test_a_change_repeats_what_follows_and_says_why(line, capsys):
    line()
    capsys.readouterr()
    line("sft.steps=3")
    assert toy.calls == ["sft", "dpo", "evaluate-sft"]  # dpo's weights came out equal: its evaluation stands
    out = capsys.readouterr().out
    assert "sft: running · config.steps 2 → 3" in out
    assert "dpo: running · input model changed" in out


def test_an_equal_result_stops_the_wave(line):
    line()
    line("data.text=THE CORPUS")
    assert toy.calls == ["data"]
    line("data.text=other words")
    assert toy.calls[:2] == ["data", "tokenizer"]


def test_a_new_revision_runs_again(line, capsys):
    line()
    stage = toy.STAGES["sft"]
    newer = Stage(**{**vars(stage), "revision": 2})
    line(registry={**toy.STAGES, "sft": newer})
    assert toy.calls == ["sft"]
    assert "revision 1 → 2" in capsys.readouterr().out


def test_a_change_of_seed_or_of_an_outside_file_runs_again(line, tmp_path, capsys):
    line()
    line("seed=5")
    assert toy.calls == ALL and "seed 3 → 5" in capsys.readouterr().out
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "p"}\n')
    line("seed=5", f"evaluate.sets=[{asked}]")
    asked.write_text('{"prompt": "q"}\n')
    run = line("seed=5", f"evaluate.sets=[{asked}]")
    assert toy.calls == ["data", "evaluate-initial", "evaluate-pretrain", "evaluate-sft", "evaluate-dpo"]
    assert "input files changed" in capsys.readouterr().out
    assert run.metrics("data")["files"] == ["asked.jsonl"]


def test_until_and_force(line):
    run = line(until="tokenizer")
    assert toy.calls == ["data", "tokenizer"]
    assert json.loads((run.folder / "run.json").read_text())["state"] == "partial"
    line()
    assert toy.calls == ALL[2:]
    line(force="sft")
    assert toy.calls == ["sft", "dpo", "evaluate-sft", "evaluate-dpo"]
    line(force=["evaluate"])
    assert toy.calls == ALL[5:]
    line(until="evaluate", force="evaluate-dpo")
    assert toy.calls == ["evaluate-dpo"]


def test_what_a_part_of_the_line_left_behind_is_called_outdated(line):
    line()
    run = line("sft.steps=3", until="sft")
    assert run.outdated == ("dpo", "evaluate-sft", "evaluate-dpo")
    states = json.loads((run.folder / "run.json").read_text())["states"]
    assert states["dpo"] == "outdated" and states["evaluate-pretrain"] == "done"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": "sfft"}, "--until sfft: the recipe 'toy' has no such stage; did you mean 'sft'?"),
        ({"force": "sfft"}, "--force sfft: the recipe 'toy' has no such stage; did you mean 'sft'?"),
        ({"until": "data", "force": "sft"}, "--force sft: this stage comes after --until data"),
    ],
)
def test_unknown_stages_in_options(line, tmp_path, options, expected):
    with pytest.raises(UserError) as caught:
        line(**options)
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bad_input_of_a_stage_leaves_nothing_half_done(line, tmp_path):
    with pytest.raises(UserError, match="the corpus is empty"):
        line("data.text=''")
    assert not (tmp_path / "run" / "data").exists() and not (tmp_path / "run" / "data.partial").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["states"]["data"] == "failed"


def test_a_failing_rerun_keeps_the_older_artifact(line):
    run = line()
    weights = (run.stage("sft") / "weights").read_text()
    with pytest.raises(ZeroDivisionError):
        line("sft.steps=3", "sft.stop=crash")
    assert (run.stage("sft") / "weights").read_text() == weights
    assert read_manifest(run.stage("sft")) is not None
    line()
    assert toy.calls == []


@pytest.mark.parametrize("how", ["kill", "terminate", "full", "crash"])
def test_training_goes_on_where_it_ended(line, tmp_path, how):
    """Two steps, an end of some kind, and the same command again: no step is done twice, no stage above runs again."""
    process = fork.Process(target=_ignore_failure, args=(line, f"pretrain.stop={how}"))
    process.start()
    process.join(30)
    assert process.exitcode == (-signal.SIGKILL if how == "kill" else 7)
    assert not (tmp_path / "run" / "pretrain").exists()
    run = line(f"pretrain.stop={how}")
    assert toy.calls == ALL[2:]
    assert steps_done(run.stage("pretrain")) == [1, 2, 3, 4]
    assert run.metrics("pretrain")["started_at"] == 2


def _ignore_failure(line, override):
    try:
        line(override)
    except BaseException:
        os._exit(7)


def test_another_config_does_not_go_on_with_an_interrupted_attempt(line):
    with pytest.raises(HeadspringError):
        line("pretrain.stop=full")
    run = line("pretrain.stop=full", "pretrain.steps=5", "pretrain.stop_at=9")
    assert run.metrics("pretrain")["started_at"] == 0


def test_force_starts_anew_but_goes_on_with_its_own_attempt(line):
    with pytest.raises(HeadspringError):
        line("pretrain.stop=full")
    with pytest.raises(HeadspringError):  # starts at step 0 again, and meets the full disk again
        line("pretrain.stop=full", force="pretrain")
    assert line("pretrain.stop=full", force="pretrain").metrics("pretrain")["started_at"] == 2


@pytest.mark.parametrize(("how", "words"), [("full", "disk under .* is full"), ("terminate", "pretrain: interrupted")])
def test_ends_from_outside_are_one_line(line, tmp_path, how, words):
    with pytest.raises(HeadspringError, match=words) as caught:
        line(f"pretrain.stop={how}")
    assert caught.value.exit_code == 1 and "run the same command again" in str(caught.value)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["states"]["pretrain"] == record["state"] == ("failed" if how == "full" else "interrupted")
    assert record["states"]["tokenizer"] == "done"


def test_a_damaged_artifact_is_named_and_force_makes_it_again(line):
    run = line()
    (run.stage("tokenizer") / "tokenizer.json").write_text("damaged")
    with pytest.raises(CorruptArtifact) as caught:
        line()
    assert "tokenizer/tokenizer.json: content differs" in str(caught.value)
    assert "`--force tokenizer`" in str(caught.value) and caught.value.exit_code == 2
    assert (run.stage("sft") / "weights").exists()
    line(force="tokenizer")
    assert toy.calls == ALL[1:]
    line()
    assert toy.calls == []


@pytest.mark.parametrize("damage", ["not json", '{"schema_version": 1}'])
def test_a_damaged_manifest_is_named(line, damage):
    run = line()
    (run.stage("sft") / "manifest.json").write_text(damage)
    with pytest.raises(CorruptArtifact, match=r"manifest\.json: not a manifest.*--force sft"):
        line()
    line(force="sft")
    assert toy.calls[0] == "sft"


def test_folders_of_other_recipes_and_versions_are_refused(line, tmp_path):
    line(until="data")
    other = toy.write(tmp_path, toy.RECIPE.replace("recipe: toy", "recipe: other"), "other.yaml")
    with pytest.raises(UserError, match="holds a run of the recipe 'toy', not 'other'; give another --run-dir"):
        run_line(other, run_dir=tmp_path / "run", registry=toy.STAGES)
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(UserError, match=r"written by another version \(schema 2, here 1\)"):
        line()
    record.write_text("nonsense")
    with pytest.raises(UserError, match="not a run's record"):
        line()
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not a run"):
        run_line(other, run_dir=foreign, registry=toy.STAGES)
    with pytest.raises(UserError, match="not a folder"):
        run_line(other, run_dir=foreign / "chapter.txt", registry=toy.STAGES)


def test_a_manifest_of_another_version_is_refused(line):
    run = line(until="data")
    path = run.stage("data") / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(UserError, match="schema version 9"):
        line()


def test_an_exchange_of_folders_that_was_cut_short_is_finished_or_undone(line):
    run = line()
    folder = run.stage("sft")
    os.rename(folder, folder.with_name(".sft.old.77"))  # killed between the two renames, the new one not complete
    line()
    assert toy.calls == []
    os.rename(folder, folder.with_name("sft.partial"))  # killed between the two renames, the new one complete
    line()
    assert toy.calls == [] and folder.is_dir()


def test_run_answers_about_its_stages(line):
    run = line(until="data")
    with pytest.raises(UserError, match="has not run yet"):
        run.metrics("sft")
    with pytest.raises(UserError, match="no such stage"):
        run.stage("stf")
