"""The house around the code: what CI does with skips and shards, and that docs and make targets hang together."""

import re
import subprocess
import sys

import pytest
import yaml

from tests.docs.blocks import ROOT

CHECKS = """
import pytest
{mark}
def test_a(): pass
def test_b(): pass
def test_c(): pass
def test_d(): pass
"""


def pytest_in(folder, *options, mark="", ci=""):
    """Run a small suite under this project's conftest; the completed process."""
    for name in ("conftest.py", "allowed_skips.txt"):
        (folder / "tests").mkdir(exist_ok=True)
        (folder / "tests" / name).write_bytes((ROOT / "tests" / name).read_bytes())
    (folder / "tests" / "test_small.py").write_text(CHECKS.format(mark=mark), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(folder / "tests"), *options]
    environment = {"PATH": "", "CI": ci} if ci else {"PATH": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("reason", "ci", "code"),
    [("no such package", "true", 1), ("no such package", "", 0), ("a check for GPU only", "true", 0)],
)
def test_a_skip_fails_ci_unless_it_is_listed(tmp_path, reason, ci, code):
    done = pytest_in(tmp_path, mark=f"@pytest.mark.skip(reason={reason!r})", ci=ci)
    assert done.returncode == code
    assert ("SKIP NOT ALLOWED" in done.stdout) == (code == 1)


def test_what_needs_native_operators_is_left_out_where_there_are_none(tmp_path):
    marks = [f"@pytest.mark.skipif({missing}, reason='no native products here')" for missing in (True, False)]
    without, beside = (pytest_in(tmp_path, mark=mark, ci="true") for mark in marks)
    assert without.returncode == beside.returncode == 0
    assert "3 passed, 1 deselected" in without.stdout and "4 passed" in beside.stdout


def test_a_module_that_skips_itself_fails_ci(tmp_path):
    done = pytest_in(tmp_path, mark='pytest.importorskip("no_such_module")', ci="true")
    assert done.returncode == 1 and "SKIP NOT ALLOWED" in done.stdout


def test_shards_split_all_tests_evenly(tmp_path):
    shards = [re.findall(r"::(test_\w) PASSED", pytest_in(tmp_path, "--shard", f"{i}/2").stdout) for i in range(2)]
    assert sorted(shards[0] + shards[1]) == ["test_a", "test_b", "test_c", "test_d"]
    assert len(shards[0]) == len(shards[1]) == 2


@pytest.mark.parametrize("shard", ["2/2", "1", "x/3"])
def test_a_shard_that_is_none_is_refused(tmp_path, shard):
    assert pytest_in(tmp_path, "--shard", shard).returncode == pytest.ExitCode.USAGE_ERROR


def test_constraints_pin_what_the_project_asks_for():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert not any("+" in version for version in pins.values())
    wanted = re.findall(r'^\s*"([A-Za-z0-9_.-]+)', project_section("dependencies"), re.M)
    assert wanted and {name.lower() for name in wanted} <= {name.replace("-", "_") for name in pins} | set(pins)


def project_section(name):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf"^{name} = \[(.*?)^\]", text, re.M | re.S)[1]


def test_every_page_is_in_the_navigation_and_exists():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = set(re.findall(r"[\w-]+\.md", str(navigation)))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_ci_calls_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    assert called == ["check", "slow", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in called)
