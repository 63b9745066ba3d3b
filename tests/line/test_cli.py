"""`headspring` and its verb `run`: exit codes, one-line errors, a quick start."""

import json
import subprocess
import sys

import pytest

import headspring
from headspring import cli
from tests.line import toy


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `headspring ARGS` in this process on the toy line; the exit code, standard output, standard error."""
    monkeypatch.setattr("headspring.line.stages.STAGES", toy.STAGES)
    monkeypatch.chdir(tmp_path)
    toy.write(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["headspring", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def test_a_run_ends_with_the_table_the_report_and_what_to_do_next(command, tmp_path):
    code, out, _ = command("run", "toy.yaml")
    assert code == 0
    table = out[out.index("before → after") :]
    for stage in ("data", "tokenizer", "pretrain", "sft", "dpo", "evaluate-initial", "evaluate-dpo"):
        assert f"\n{stage} " in table
    assert "report: runs/toy/report.html" in out and (tmp_path / "runs/toy/report.html").is_file()
    assert "headspring chat runs/toy" in out
    assert "headspring run toy.yaml data.sources=~/my/folder --run-dir runs/mine" in out
    code, out, _ = command("run", "toy.yaml", "--until", "sft", "--force", "sft")
    assert code == 0 and "(earlier)" in out and "(outdated)" not in out


def test_the_end_without_a_model_names_the_command_that_goes_on(command):
    _, out, _ = command("run", "toy.yaml", "--until", "tokenizer")
    assert "headspring chat" not in out and "headspring run toy.yaml --run-dir runs/toy" in out
    assert "not run" in out


def test_json(command):
    code, out, _ = command("run", "toy.yaml", "--until", "data", "--json")
    assert code == 0
    value = json.loads(out)
    assert value["stages"]["data"]["made"] is True and value["recipe"] == "toy"
    code, out, _ = command("run", "toy.yaml", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["stages"][0]["cached"] is True


def test_a_dry_run_prints_the_plan(command):
    code, out, _ = command("run", "toy.yaml", "--dry-run")
    assert code == 0 and "evaluate-dpo" in out and "FLOPs" in out and toy.calls == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "missing.yaml"], 2, "headspring: missing.yaml: no such recipe"),
        (["run", "toy.yaml", "pretrain.stesp=3"], 2, "did you mean 'steps'"),
        (["run", "toy.yaml", "--until", "stf"], 2, "did you mean 'sft'"),
        (["run", "toy.yaml", "data.text=''"], 2, "headspring: the corpus is empty"),
        (["run", "toy.yaml", "pretrain.stop=full"], 1, "is full; finished stages are kept"),
        (["run", "toy.yaml", "pretrain.stop=terminate"], 1, "run the same command again to go on"),
    ],
)
def test_errors_are_one_line_with_the_promised_exit_code(command, arguments, code, words):
    found, _, err = command(*arguments)
    assert found == code
    assert words in err and err.count("\n") == 1 and "Traceback" not in err


def test_defects_are_not_dressed_up(command):
    with pytest.raises(ZeroDivisionError):
        command("run", "toy.yaml", "pretrain.stop=crash")


@pytest.mark.parametrize("arguments", [["run"], ["run", "toy.yaml", "--nope"], ["walk"], []])
def test_bad_usage_exits_with_2(command, arguments):
    assert command(*arguments)[0] == 2


def test_version(command):
    assert command("--version") == (0, f"{headspring.__version__}\n", "")


def test_the_help_imports_nothing_heavy():
    """What makes a start slow, instead of a time: no tensor, table or template library before a verb runs."""
    program = (
        "import sys; sys.argv = ['headspring', '--help']\n"
        "from headspring import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'tokenizers', 'transformers', 'jinja2', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Run a recipe" in done.stdout


def test_the_package_offers_its_promised_names_lazily():
    program = (
        "import sys, headspring as hs\n"
        "assert 'torch' not in sys.modules\n"
        "assert {'run', 'load', 'Run', '__version__'} <= set(dir(hs))\n"
        "assert callable(hs.run) and callable(hs.load)\n"
        "try: hs.nothing\nexcept AttributeError: pass\nelse: raise SystemExit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
