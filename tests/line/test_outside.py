"""What the line reads from outside the run: source files, evaluation files, a model that writes synthetic text."""

import os

import pytest

from headspring.artifacts import UserError, Value
from headspring.line.decide import model_hash
from headspring.line.evaluation_files import evaluation_texts
from headspring.line.fingerprint import sources_fingerprint
from headspring.line.recipe import load_recipe
from tests.line import toy


class Sources(Value):
    paths: list[str]
    package: str = "numpy"


def test_evaluation_rows_become_texts(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "two plus two?", "answer": "four", "n": 4}\n\n{"messages": [{"content": "hello\\u2028"}]}\n')
    assert evaluation_texts([file]) == ["two plus two?\nfour", "hello\u2028"]


def test_evaluation_files_that_cannot_be_read_are_named_with_their_line(tmp_path):
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"set\.jsonl:2: not a line of JSON"):
        evaluation_texts([file])
    file.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"set\.jsonl: cannot be read as UTF-8"):
        evaluation_texts([file])


@pytest.mark.parametrize("pattern", ["{}", "{}/notes", "{}/notes/*.txt", "{}/**/a.txt", "file://{}/notes"])
def test_the_fingerprint_changes_with_the_files_and_only_then(tmp_path, pattern):
    file = tmp_path / "notes" / "a.txt"
    file.parent.mkdir()
    file.write_text("one")
    config = Sources(paths=[pattern.format(tmp_path)])
    before = sources_fingerprint(config)
    assert sources_fingerprint(config) == before
    file.write_text("two!")
    changed = sources_fingerprint(config)
    assert changed != before
    os.utime(file, ns=(1, 1))
    touched = sources_fingerprint(config)
    assert touched != changed
    (file.parent / "b.txt").write_text("more")
    if "a.txt" not in pattern:
        assert sources_fingerprint(config) != touched


def test_the_fingerprint_knows_versions_of_packages_and_leaves_addresses_alone(tmp_path, monkeypatch):
    config = Sources(paths=["s3://bucket/a.txt", "hf://datasets/x"])
    before = sources_fingerprint(config)
    monkeypatch.setattr("headspring.line.fingerprint.version", lambda name: "99")
    assert sources_fingerprint(config) != before


def test_the_model_that_writes_synthetic_text_is_an_input(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"one")
    before = model_hash(model)
    (model / "manifest.json").write_text('{"schema_version": 1, "name": "", "kind": "sft", "revision": 1, "config": {}}')
    assert model_hash(model) == before
    (model / "model.safetensors").write_bytes(b"two")
    assert model_hash(model) != before


def test_only_the_data_stage_takes_a_generator(tmp_path):
    from headspring.line.stages import STAGES

    path = toy.write(tmp_path, f"data: {{generator: {tmp_path}}}\ntokenizer:\n")
    assert load_recipe(path, (), STAGES).step("data").generator == tmp_path
    path = toy.write(tmp_path, "data: {generator: nowhere}\n")
    with pytest.raises(UserError, match=r"toy\.yaml:1: data\.generator: no such run or model folder: nowhere"):
        load_recipe(path, (), STAGES)
    path = toy.write(tmp_path, f"data:\ntokenizer: {{generator: {tmp_path}}}\n")
    with pytest.raises(UserError, match="unknown key"):
        load_recipe(path, (), STAGES)
