"""What all tests share: shards of the slow ones, no unlisted skip in CI, and one smoke run of the whole line.

What compares native operators with their definitions is left out, and not skipped, where a machine cannot have them: every
other test runs on the definitions there. So is what another C library does not have.

`--shard i/n` orders the selected tests by a hash of their id and keeps every n-th, so shards are stable, of equal
count, and never empty while there are n tests.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED_SKIPS = ROOT / "tests" / "allowed_skips.txt"
LEFT_OUT = re.compile(r"no (native|bfloat16) products|no C\+\+ compiler|only glibc")  # begin the reason of a skipif


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="i/n: run only shard i (from 0) of n")


@pytest.hookimpl(trylast=True)  # after -m and -k have selected
def pytest_collection_modifyitems(config, items):
    index, _, count = config.getoption("--shard").partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise pytest.UsageError(f"--shard {index}/{count}: want i/n with 0 <= i < n")
    _leave_out(config, items, [item for item in items if _cannot_run_here(item)])
    if int(count) > 1:
        by_hash = sorted(items, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        kept = set(map(id, by_hash[int(index) :: int(count)]))
        _leave_out(config, items, [item for item in items if id(item) not in kept])


def _cannot_run_here(item):
    """Whether a test says that it needs what this machine cannot have (`LEFT_OUT`)."""
    marks = [mark for mark in item.iter_markers("skipif") if LEFT_OUT.match(mark.kwargs.get("reason", ""))]
    return any(mark.args and mark.args[0] is True for mark in marks)


def _leave_out(config, items, left_out):
    if left_out:
        gone = set(map(id, left_out))
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if id(item) not in gone]


def unlisted_skips(skipped, patterns):
    """The "id: reason" lines that no pattern matches."""
    return [line for line in skipped if not any(re.search(pattern, line) for pattern in patterns)]


def skip_patterns(path=ALLOWED_SKIPS):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _skip_lines(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("skipped", []) if reporter else []:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        yield f"{report.nodeid}: {reason}"


def pytest_sessionfinish(session, exitstatus):
    if os.environ.get("CI") and exitstatus in (0, 5) and unlisted_skips(_skip_lines(session.config), skip_patterns()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if not os.environ.get("CI"):
        return
    for line in unlisted_skips(_skip_lines(config), skip_patterns()):
        terminalreporter.write_line(f"SKIP NOT ALLOWED (tests/allowed_skips.txt): {line}", red=True)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """A folder like a checkout after `make quickstart`: `README.md`, `recipes/` and a finished `runs/quickstart`.

    `recipes/quickstart.yaml` there is the smoke recipe under the quickstart's name.
    """
    world = tmp_path_factory.mktemp("world")
    shutil.copytree(ROOT / "recipes", world / "recipes")
    (world / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    smoke = (ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8")
    smoke = re.sub(r"(?m)^recipe:.*$", "recipe: quickstart", smoke)
    (world / "recipes" / "quickstart.yaml").write_text(smoke, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("headspring")), "run", "recipes/quickstart.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a tiny model gains nothing from a second thread
    done = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return world
