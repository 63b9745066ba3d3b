"""The document table: what is written comes back, kept and removed apart."""

import pytest

from headspring.artifacts import CorruptArtifact, UserError
from headspring.data.store import DOCUMENTS, Row, read_documents, read_rows, survivors, write_documents
from headspring.text.documents import Document

ONE = Document("täxt 🙂\r\n", "s", "prose", "p.txt", 3, 14, True, "de", True, "g", {"row": 1, "name": "ü"})
TWO = Document("x = 1", "t", "code", "q.py")
GONE = Document("x  = 1", "t", "code", "r.py")


@pytest.fixture
def folder(tmp_path):
    rows = [Row(ONE, "validation", scores={"a.b": 0.5}), TWO, Row(GONE, None, "near_duplicate", "why", TWO.id, TWO.id)]
    write_documents(rows, tmp_path, ["a.b"])
    return tmp_path


def test_kept_documents_come_back_equal_and_in_order(folder):
    assert list(read_documents(folder)) == [ONE, TWO]
    assert list(read_documents(folder, split="train")) == [TWO]
    assert list(read_documents(folder, source="s")) == [ONE]
    assert [document.id for document in read_documents(folder)] == [ONE.id, TWO.id]


def test_removed_documents_stay_in_the_table(folder):
    rows = list(read_rows(folder))
    assert [row["decision"] for row in rows] == ["keep", "keep", "near_duplicate"]
    assert [row["score.a.b"] for row in rows] == [0.5, None, None]
    assert rows[2]["text"] == GONE.text and survivors(folder) == {GONE.id: TWO.id}


def test_an_empty_table_is_a_table(tmp_path):
    write_documents([], tmp_path)
    assert list(read_documents(tmp_path)) == []


def test_bad_requests_and_bad_files_are_named(folder):
    with pytest.raises(UserError, match="no split named 'dev'"):
        list(read_documents(folder, split="dev"))
    with pytest.raises(UserError, match="run the data stage first"):
        list(read_documents(folder / "elsewhere"))
    (folder / DOCUMENTS).write_bytes(b"PAR1 broken")
    with pytest.raises(CorruptArtifact, match=r"documents\.parquet: not a readable Parquet file"):
        list(read_documents(folder))


def test_a_failed_write_leaves_the_old_table(folder):
    def rows():
        yield TWO
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_documents(rows(), folder)
    assert list(read_documents(folder)) == [ONE, TWO]
    assert [path.name for path in folder.iterdir()] == [DOCUMENTS]
