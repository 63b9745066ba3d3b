"""Files of every kind, and every way in which a file can be wrong."""

import gzip
import io
import json
import os

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headspring.artifacts import UserError
from headspring.text.sources import Files, Reading
from headspring.text.sources.files import extension_of, kind_of
from headspring.text.sources.pieces import BinaryFile, read_pieces, split_string


def read(*paths, **options):
    reading = Reading()
    return list(Files(paths=[str(path) for path in paths], **options).read("f", reading)), reading


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff")), st.integers(4, 40))
def test_pieces_tile_the_file(text, limit):
    content = text.encode()
    pieces = list(read_pieces(io.BytesIO(content), "f", limit))
    assert "".join(piece.text for piece in pieces) == text
    assert all(content[piece.start : piece.end] == piece.text.encode() for piece in pieces)
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces)][: len(pieces)]
    assert all(0 < piece.end - piece.start <= limit for piece in pieces)
    assert "".join(split_string(text, limit)) == text


def test_pieces_end_at_lines_where_they_can():
    pieces = list(read_pieces(io.BytesIO(b"one two\nthree four\nfive"), "f", 20))
    assert [piece.text for piece in pieces] == ["one two\nthree four\n", "five"]


def test_text_and_code_are_verbatim(tmp_path):
    (tmp_path / "a.md").write_bytes("# Größe\r\n\r\nText.\r\n".encode())
    (tmp_path / "b.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    documents, reading = read(tmp_path)
    assert [(d.kind, d.start, d.verbatim) for d in documents] == [("prose", 0, True), ("code", 3, True)]
    for document in documents:
        with open(document.path, "rb") as file:
            assert file.read()[document.start : document.end] == document.text.encode()
    assert len(reading.files["f"]) == 2


def test_a_folder_skips_binary_and_hidden_files_and_counts_the_binary_ones(tmp_path):
    (tmp_path / ".git").mkdir()
    contents = {".git/config": b"x", ".hidden": b"x", "image.png": b"\x89PNG\0\0", "b.txt": b"b", "a.txt": b"a"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    documents, reading = read(tmp_path)
    assert [document.text for document in documents] == ["a", "b"]
    assert reading.counts["f"] == {"binary_files_skipped": 1}
    with pytest.raises(UserError, match=r"image\.png: binary file"):
        read(tmp_path / "image.png")


def test_extensions_exclude_and_globs(tmp_path):
    for name in ("a.txt", "b.md", "c.txt"):
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path, extensions=["txt"])[0]] == ["a.txt", "c.txt"]
    assert [d.text for d in read(tmp_path, exclude=["c.*"])[0]] == ["a.txt", "b.md"]
    assert [d.text for d in read(tmp_path / "*.txt")[0]] == ["a.txt", "c.txt"]
    with pytest.raises(UserError, match=r"no such file or folder.*no match"):
        read(tmp_path / "*.rst")


def test_invalid_utf8_is_named_with_its_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good\n" * 400 + b"\xff tail")
    with pytest.raises(UserError, match=r"bad\.txt: invalid UTF-8 at byte 2000; .*errors: replace"):
        read(tmp_path / "bad.txt", max_document_bytes=1024)
    documents, _ = read(tmp_path / "bad.txt", errors="replace", max_document_bytes=1024)
    assert "\ufffd tail" in documents[-1].text
    assert [document.verbatim for document in documents] == [True, False]


def test_missing_and_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file or folder"):
        read(tmp_path / "nowhere.txt")
    (tmp_path / "locked.txt").write_text("secret")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("headspring.text.sources.files.fsspec.core.OpenFile.__enter__", refuse)
    with pytest.raises(UserError, match=r"locked\.txt: cannot be read \(Permission denied\)"):
        read(tmp_path / "locked.txt")


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text " * 100)[:-12])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not a table PAR1")
    for name in ("a.txt.gz", "b.parquet"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read(tmp_path / name)


def test_named_pipes_are_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("a")
    assert [document.text for document in read(tmp_path)[0]] == ["a"]


def test_json_lines_have_rows_spans_and_metadata(tmp_path):
    rows = [{"body": "erste Zeile", "language": "de", "stars": 3, "tags": ["x"]}, {"body": "second"}]
    content = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    documents, _ = read(tmp_path, text_field="body")
    assert [document.text for document in documents] == ["erste Zeile", "second"]
    assert documents[0].metadata == {"row": 0, "language": "de", "stars": 3} and documents[0].language == "de"
    assert [json.loads(content.encode()[d.start : d.end])["body"] for d in documents] == [d.text for d in documents]
    assert documents[0].split_group != documents[1].split_group and not documents[0].verbatim


@pytest.mark.parametrize(("line", "message"), [
    ("{oops", "line 2 .byte 16. is not JSON"), ('{"other": 1}', "line 2 has no text in field 'text' .it has: other"),
    ("[1]", "no text in field"), ('{"text": 7}', "no text in field"), ("[" * 100_000, "is not JSON"),
])  # fmt: skip
def test_bad_json_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text":"fine"}\n' + line)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["one", None, "three"], "label": [1, 2, 3]}), tmp_path / "a.parquet")
    documents, _ = read(tmp_path)
    assert [(d.text, d.metadata) for d in documents] == [("one", {"row": 0, "label": 1}), ("three", {"row": 2, "label": 3})]
    with pytest.raises(UserError, match=r"no column 'words' \(it has: text, label\)"):
        read(tmp_path, text_field="words")
    with pytest.raises(UserError, match="does not hold strings"):
        read(tmp_path, text_field="label")


def test_any_fsspec_url():
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.txt", b"remote")
    try:
        assert [(d.text, d.path) for d in read("memory://corpus")[0]] == [("remote", "memory://corpus/a.txt")]
        with pytest.raises(UserError, match="no such file or folder"):
            read("memory://nothing")
    finally:
        memory.rm("/corpus", recursive=True)
    with pytest.raises(UserError, match="nosuchscheme://x: cannot be opened"):
        read("nosuchscheme://x")


def test_one_line_of_100_megabytes_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "line.txt"
    with open(path, "wb") as file:
        for _ in range(100):
            file.write("aé ".encode() * 250_000)
    size = path.stat().st_size
    assert size == 100_000_000
    total = longest = 0
    for document in Files(paths=[str(path)], max_document_bytes=1 << 20).read("f", Reading()):
        assert document.start == total
        total = document.end
        longest = max(longest, document.end - document.start)
    assert total == size and longest <= 1 << 20


def test_binary_detection_looks_at_the_beginning_only():
    with pytest.raises(BinaryFile):
        list(read_pieces(io.BytesIO(b"abc\0def"), "f", 1024))


def test_kinds_and_extensions():
    assert extension_of("A.JSONL.GZ") == ".jsonl" and extension_of("notes.txt") == ".txt"
    assert kind_of(".py") == "code" and kind_of(".md") == "prose" and kind_of("") == "prose"
