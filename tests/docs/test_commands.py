"""Every command that the README and the docs show does what a reader would see: it runs, and exits with 0.

Commands run as written, in a folder that looks like a checkout after `make quickstart` (see `smoke_run`): the
quickstart recipe there is the small smoke recipe, everything else is real. `make` targets are looked up, not run.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, all_blocks, blocks

RUN = ("headspring", "ls", "cat", "echo")
NOT_RUN = ("git", "cd", "source", "open", "pip", "python", "torchrun")  # checked by eye
INPUT = "What does this function return?\n/quit\n"  # what a reader types into `headspring chat`
TIMEOUT = 280

COMMANDS = [(block, command) for block in all_blocks("sh") for command in block.commands]
OURS = [(block, command) for block, command in COMMANDS if command.startswith("headspring ")]


def name(case):
    block, command = case
    return f"{block.page}:{block.line}: {command}"


def is_slow(command):
    """A command that trains. Every other one is quick against a finished run."""
    words = command.split()
    return (words[:2] == ["headspring", "run"] and "--dry-run" not in words) or words[1:3] == ["tokens", "compare"]


def executed():
    """A test for each block: its commands run in order, so a later one may use what an earlier one made."""
    runnable = [block for block in all_blocks("sh") if not block.mark and any(map(runs, block.commands))]
    marks = {True: [pytest.mark.slow], False: []}
    slow = [any(map(is_slow, block.commands)) for block in runnable]
    return [pytest.param(block, id=f"{block.page}:{block.line}", marks=marks[long]) for block, long in zip(runnable, slow)]


def runs(command):
    return command.split()[0] in RUN


def shell(command, folder):
    """Run as a reader would, with the headspring of this environment, a home of its own, and one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        input=INPUT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture
def world(smoke_run):
    """The finished run, and the reader's own text that the README speaks of."""
    notes = smoke_run / "notes"
    if not notes.exists():
        notes.mkdir()
        text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
        for index in range(20):
            (notes / f"note{index}.md").write_text(f"# Note {index}\n\n{text[index * 300 :]}", encoding="utf-8")
    return smoke_run


@pytest.mark.timeout(3 * TIMEOUT)
@pytest.mark.parametrize("block", executed())
def test_commands_run(block, world):
    for command in filter(runs, block.commands):
        done = shell(command, world)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, command


def make_targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def unknown(command):
    """Why a documented command, or one of those that it pipes together, cannot be right; "" where it can."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]  # VARIABLE=value
    if "|" in words:
        at = words.index("|")
        return unknown(shlex.join(words[:at])) or unknown(shlex.join(words[at + 1 :]))
    if words[0] == "make":
        missing = [word for word in words[1:] if word not in make_targets()]
        return f"no make target {missing}" if missing else ""
    if words[0] == "headspring":
        return "" if verb_exists(words[1]) else f"no verb {words[1]}"
    return "" if words[0] in (*RUN, *NOT_RUN) else f"the tests do not know how to check {words[0]!r}"


def verb_exists(verb):
    import typer

    from headspring.cli import app

    return verb in typer.main.get_command(app).commands or verb.startswith("-")


@pytest.mark.parametrize("case", [pytest.param(case, id=name(case)) for case in dict.fromkeys(COMMANDS)])
def test_command_exists(case):
    assert unknown(case[1]) == ""


SIGNATURES = "docs/architecture.md"  # its Python blocks list signatures without bodies
PYTHON = [block for block in all_blocks("python") if block.page != SIGNATURES]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_compiles(block):
    compile(block.body, f"{block.page}:{block.line}", "exec")


MARKED = [block for block in PYTHON if block.mark == "run"]


@pytest.mark.timeout(2 * TIMEOUT)
@pytest.mark.parametrize("block", MARKED, ids=lambda block: f"{block.page}:{block.line}")
def test_python_runs(block, world):
    done = subprocess.run([sys.executable, "-c", block.body], cwd=world, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_these_checks_can_fail(tmp_path):
    text = "a\n\n```sh\nmake breakfast\nheadspring fly  # up\nfrobnicate \\\n  now\n```\n\n"
    text += "<!-- run -->\n```python\n1 +\n```\n"
    shell_block, python_block = blocks(text, "planted.md")
    assert shell_block.commands == ["make breakfast", "headspring fly", "frobnicate    now"]
    assert [bool(unknown(command)) for command in shell_block.commands] == [True, True, True]
    assert unknown("echo a | headspring fly") and not unknown("echo 'a|b' | headspring run -")
    assert unknown("make quickstart") == "" and unknown("headspring run x.yaml") == ""
    assert python_block.mark == "run"
    with pytest.raises(SyntaxError):
        compile(python_block.body, "planted", "exec")
    assert shell("headspring run no-such-recipe.yaml", tmp_path).returncode == 2


def test_readme_and_docs_show_commands():
    assert len(OURS) >= 8 and any(block.page == "README.md" for block, _ in OURS)
