"""Files and folders are whole or absent, and manifests notice every change."""

import json

import pytest
from pydantic import ValidationError

from headspring.artifacts import CorruptArtifact, UserError, Value
from headspring.artifacts.files import folder_atomic, open_atomic, sha256_json, write_atomic, write_json
from headspring.artifacts.manifest import Manifest, cache_key, read_manifest, verify, write_manifest
from headspring.artifacts.progress import quiet, track


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError), open_atomic(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "stage"
    with folder_atomic(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), folder_atomic(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["a"] and [p.name for p in tmp_path.iterdir()] == ["stage"]
    with folder_atomic(target) as folder:
        (folder / "c").write_text("3")
    assert [p.name for p in target.iterdir()] == ["c"] and [p.name for p in tmp_path.iterdir()] == ["stage"]


def test_manifest_names_what_changed(tmp_path):
    (tmp_path / "weights").write_bytes(b"123")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text("not an output")
    manifest = write_manifest(tmp_path, Manifest(name="a", kind="data", revision=1, config={}))
    assert set(manifest.outputs) == {"weights"} and read_manifest(tmp_path) == manifest
    verify(tmp_path, manifest)
    (tmp_path / "weights").write_bytes(b"124")
    with pytest.raises(CorruptArtifact, match="weights"):
        verify(tmp_path, manifest)
    (tmp_path / "weights").unlink()
    with pytest.raises(CorruptArtifact, match="missing"):
        verify(tmp_path, manifest)


def test_manifests_that_cannot_be_read(tmp_path):
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CorruptArtifact):
        read_manifest(tmp_path)
    write_json(tmp_path / "manifest.json", {"schema_version": 99})
    with pytest.raises(UserError, match="99"):
        read_manifest(tmp_path)


def test_cache_key_depends_on_content_alone():
    inputs = {"data": {"stage": "data", "sha256": "0"}}
    renamed = {"data": {"stage": "corpus", "sha256": "0"}}
    key = cache_key("sft", 1, {"a": 1, "b": 2}, inputs, 0)
    assert key == cache_key("sft", 1, {"b": 2, "a": 1}, renamed, 0)
    others = [("dpo", 1, {"a": 1, "b": 2}, inputs, 0), ("sft", 2, {"a": 1, "b": 2}, inputs, 0)]
    others += [("sft", 1, {"a": 2, "b": 2}, inputs, 0), ("sft", 1, {"a": 1, "b": 2}, inputs, 1)]
    others += [("sft", 1, {"a": 1, "b": 2}, {"data": {"stage": "data", "sha256": "1"}}, 0)]
    assert all(cache_key(*other) != key for other in others)
    assert sha256_json({"a": 1, "b": 2}) == sha256_json(json.loads('{"b": 2, "a": 1}'))


def test_values_are_frozen_and_refuse_unknown_keys():
    class Config(Value):
        steps: int = 1

    with pytest.raises(ValidationError):
        Config(stesp=2)
    with pytest.raises(ValidationError):
        Config().steps = 2


def test_progress_without_a_terminal(capfd, monkeypatch):
    monkeypatch.setattr("headspring.artifacts.progress.PLAIN_SECONDS", 0.0)
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert "counting: 1 of 3" in capfd.readouterr().err
    with quiet():
        assert list(track(iter("ab"), "letters")) == ["a", "b"]
    assert capfd.readouterr().err == ""
