"""Hugging Face data sets by name, for real: the hub's own clients read from a hub on the loopback."""

import json
import subprocess
import sys

import pytest

from tests.hub import Hub, commit_of

READ = """
import json, sys
from headspring.artifacts import UserError
from headspring.text.sources import Files, HuggingFaceDataset, Reading
for kind, options in json.loads(sys.argv[1]):
    source = {"datasets": HuggingFaceDataset, "files": Files}[kind](**options)
    try:
        print(json.dumps([[document.text, document.path] for document in source.read("hub", Reading())]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
BY_NAME = {"dataset": "org/set"}


def rows(word, count):
    return "".join(json.dumps({"text": f"{word} {number}"}) + "\n" for number in range(count)).encode()


REPOSITORIES = {
    ("datasets", "org/set"): {
        "main": {"data/train.jsonl": rows("new", 3), "data/test.jsonl": rows("held out", 1)},
        "v1": {"data/train.jsonl": rows("old", 2)},
    },
    ("datasets", "org/script"): {"main": {"script.py": b"raise SystemExit('remote code ran')\n"}},
}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What each source gives, all in one process."""
    sources = {
        "newest": ("datasets", BY_NAME),
        "pinned": ("datasets", BY_NAME | {"revision": "v1"}),
        "commit": ("datasets", BY_NAME | {"revision": commit_of("v1")}),
        "whole": ("datasets", BY_NAME | {"revision": "v1", "streaming": False}),
        "split": ("datasets", BY_NAME | {"split": "test"}),
        "no such revision": ("datasets", BY_NAME | {"revision": "v9"}),
        "no such set": ("datasets", {"dataset": "org/none"}),
        "script": ("datasets", {"dataset": "org/script"}),
        "address": ("files", {"paths": ["hf://datasets/org/set@v1/data/*.jsonl"]}),
    }
    with Hub(REPOSITORIES) as hub:
        command = [sys.executable, "-c", READ, json.dumps(list(sources.values()))]
        environment = hub.environment(tmp_path_factory.mktemp("home"))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    return dict(zip(sources, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("source", "words"), [
    ("newest", ["new 0", "new 1", "new 2"]), ("pinned", ["old 0", "old 1"]), ("commit", ["old 0", "old 1"]),
    ("whole", ["old 0", "old 1"]), ("split", ["held out 0"]), ("address", ["old 0", "old 1"]),
])  # fmt: skip
def test_a_set_by_name_is_read_at_its_revision(read, source, words):
    assert [text for text, _ in read[source]] == words


def test_each_document_says_which_revision_it_is_of(read):
    assert {path for _, path in read["pinned"]} == {"datasets:org/set:train@v1"}
    assert {path for _, path in read["address"]} == {"hf://datasets/org/set@v1/data/train.jsonl"}


def test_what_the_hub_does_not_have_is_one_line(read):
    assert "'v9' doesn't exist" in read["no such revision"] and "\n" not in read["no such revision"]
    assert "'org/none' doesn't exist" in read["no such set"] and "\n" not in read["no such set"]


def test_no_code_of_a_set_is_run(read):
    assert "scripts are no longer supported" in read["script"]
