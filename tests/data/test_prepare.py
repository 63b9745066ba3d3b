"""The whole data stage on small folders: what it keeps, why it removes, and that the books balance."""

import json
import random
from copy import deepcopy

import pytest
from pydantic import ValidationError

from headspring.artifacts import UserError
from headspring.data.data_report import conserved
from headspring.data.prepare import DataConfig, prepare
from headspring.data.store import read_documents, read_rows, survivors

choose = random.Random(1)
NOUNS = ["river", "house", "garden", "letter", "window", "bridge", "stone", "teacher", "winter", "market", "village"]
VERBS = ["carries", "watches", "finds", "leaves", "builds", "remembers", "crosses", "opens", "follows", "keeps"]


def sentence():
    who, whose, what, things, other = choose.choices(NOUNS, k=5)
    action, number = choose.choice(VERBS), choose.randrange(9999)
    return f"The {who} of the {whose} {action} the {what} with {number} {things}s and a {other}."


def article(sentences=12):
    return " ".join(sentence() for _ in range(sentences))


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """200 articles, one exact and one near-duplicate, one short note, one program, one binary file."""
    folder = tmp_path_factory.mktemp("notes")
    for number in range(200):
        (folder / f"note{number:03}.txt").write_text(article())
    first = (folder / "note000.txt").read_text()
    (folder / "z_copy.txt").write_text(first.replace(" ", "  ", 3))
    (folder / "z_near.txt").write_text(first + " One more sentence, which the first has not.")
    (folder / "z_short.txt").write_text("Too short a note.")
    (folder / "z_code.py").write_text("def f(x):\n    return {x: '#'}\n" * 8)
    (folder / "z_image.bin").write_bytes(b"\0\1\2")
    return folder


def run(folder, source, **options):
    metrics = prepare(DataConfig(sources=source, **options), folder)
    rows = {row["path"].split("/")[-1]: row for row in read_rows(folder)}
    return metrics, json.loads((folder / "report.json").read_text()), rows


def test_the_whole_stage(notes, tmp_path):
    metrics, report, rows = run(tmp_path, str(notes))
    assert rows["z_copy.txt"]["decision"] == "exact_duplicate" and rows["z_copy.txt"]["split"] is None
    assert rows["z_near.txt"]["decision"] == "near_duplicate" and "Jaccard 0.9" in rows["z_near.txt"]["reason"]
    assert rows["z_short.txt"]["reason"] == "gopher.words 4 < 50" and rows["z_short.txt"]["score.gopher.words"] == 4
    assert rows["z_code.py"]["decision"] == "keep" and rows["z_code.py"]["score.gopher.words"] is None
    first = rows["note000.txt"]
    assert survivors(tmp_path) == {rows[name]["id"]: first["id"] for name in ("z_copy.txt", "z_near.txt")}
    assert {rows[name]["cluster"] for name in ("note000.txt", "z_copy.txt", "z_near.txt")} == {first["id"]}
    assert len(list(read_documents(tmp_path))) == 201 == metrics["documents_kept"]
    assert all(document.verbatim for document in read_documents(tmp_path))
    files = report["sources"]["files"]
    assert files["notes"] == {"binary_files_skipped": 1} and files["read"]["documents"] == 204
    assert report["duplicates"]["largest"][0]["size"] == 3
    assert sum(split["documents"] for split in report["splits"].values()) == 201
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.parquet", "report.json"]


def test_the_books_balance_and_notice_a_missing_byte(notes, tmp_path):
    _, report, _ = run(tmp_path, str(notes), mask=["email"])
    assert conserved(report)
    for change in (
        lambda r: r["conservation"][1].update(read=r["conservation"][1]["read"] + 1),
        lambda r: r["conservation"][0]["removed"].update({"gopher.words": 0}),
        lambda r: r["splits"]["train"].update(documents=1),
    ):
        broken = deepcopy(report)
        change(broken)
        assert not conserved(broken)


def test_two_runs_are_equal_and_seed_changes_only_the_split(notes, tmp_path):
    config = DataConfig(sources=str(notes))
    first = prepare(config, tmp_path / "a")
    again = prepare(config, tmp_path / "b")
    other = prepare(config, tmp_path / "c", seed=1)
    assert first == again and first["corpus_hash"] != other["corpus_hash"]
    for name in ("documents.parquet", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ids = [[document.id for document in read_documents(tmp_path / name)] for name in "ac"]
    assert ids[0] == ids[1]


def test_contaminated_documents_leave_training_only(notes, tmp_path):
    prepare(DataConfig(sources=str(notes)), tmp_path / "before")
    by_split = {split: next(read_documents(tmp_path / "before", split=split)) for split in ("train", "validation")}
    questions = [" ".join(document.text.split()[20:40]) for document in by_split.values()]
    metrics = prepare(DataConfig(sources=str(notes)), tmp_path / "after", evaluation_texts=questions)
    rows = {row["id"]: row for row in read_rows(tmp_path / "after")}
    assert rows[by_split["train"].id]["decision"] == "contaminated"
    assert rows[by_split["train"].id]["reason"].startswith("shares 13 words: ")
    assert rows[by_split["validation"].id]["decision"] == "keep" and metrics["removed_contaminated"] == 1
    off = DataConfig(sources=str(notes), decontamination={"enabled": False})
    assert prepare(off, tmp_path / "off", evaluation_texts=questions)["removed_contaminated"] == 0


def test_near_duplicates_that_stay_do_not_straddle(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(60):
        text = article()
        for copy in range(3):
            (tmp_path / "in" / f"{number:02}{copy}.txt").write_text(text + " And a last one." * copy)
    keep = {"exact": False, "near": False}
    _, _, rows = run(tmp_path / "out", str(tmp_path / "in"), deduplication=keep, split={"validation": 0.3, "test": 0.3})
    assert len(rows) == 180 and all(row["decision"] == "keep" for row in rows.values())
    for number in range(60):
        assert len({rows[f"{number:02}{copy}.txt"]["split"] for copy in range(3)}) == 1


def test_masking_gives_up_verbatim_and_is_counted(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number}.txt").write_text(article() + (" Write to a.b@mail.org today." if number == 7 else ""))
    options = {"mask": ["email"], "split": {"validation": 0.2, "test": 0.2}}
    _, report, rows = run(tmp_path / "out", str(tmp_path / "in"), **options)
    assert rows["7.txt"]["text"].endswith("Write to <email> today.") and not rows["7.txt"]["verbatim"]
    assert rows["8.txt"]["verbatim"]
    assert report["sources"]["files"]["notes"] == {"masked_email": 1}
    assert report["sources"]["files"]["edited_away_bytes"] == len("a.b@mail.org") - len("<email>")


def test_language_filter_is_for_prose(notes, tmp_path):
    german = tmp_path / "german"
    german.mkdir()
    (german / "de.txt").write_text("Das ist der Anfang einer langen Geschichte über den Fluss und das Dorf. " * 2)
    sources = {"notes": str(notes), "german": [str(german)]}
    _, _, rows = run(tmp_path / "out", sources, languages=["en"])
    assert rows["de.txt"]["decision"] == "language" and rows["de.txt"]["reason"] == "language de, kept are en"
    assert rows["note001.txt"]["language"] == "en" and rows["note001.txt"]["score.language"] > 0.65
    assert rows["z_code.py"]["decision"] == "keep" and rows["z_code.py"]["language"] is None


def test_docstrings_and_their_file_share_a_side(tmp_path):
    sources = {
        "code": {"kind": "stdlib", "modules": ["json", "email", "asyncio"]},
        "doc": {"kind": "docstrings", "packages": ["stdlib"], "max_bytes": 100_000_000, "max_documents": 1500},
    }
    config = DataConfig.model_validate({"sources": sources, "split": {"validation": 0.2, "test": 0.2}})
    prepare(config, tmp_path)
    sides: dict[str, set[str]] = {}
    for row in read_rows(tmp_path, ["path", "split", "decision"]):
        if row["decision"] == "keep":
            sides.setdefault(row["path"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values()) and len(sides) > 50


def test_max_documents_and_synthetic_with_a_model(tmp_path):
    sources = {
        "made": {"kind": "synthetic", "templates": ["{a} and {b}"], "slots": {"a": "1..999", "b": "1..999"}, "model": True,
                 "documents": 400, "max_documents": 300},
    }  # fmt: skip
    config = DataConfig.model_validate({"sources": sources, "split": {"validation": 0.1, "test": 0.1}})
    metrics = prepare(config, tmp_path, generate=lambda prompts: [f"It says {prompt}" for prompt in prompts])
    documents = list(read_documents(tmp_path))
    assert metrics["documents_read"] == 300 and all(document.synthetic for document in documents)
    assert documents[0].text.startswith("It says ")


@pytest.mark.parametrize(("files", "options", "message"), [
    ({}, {}, "the corpus is empty: no documents in files"),
    ({"a.txt": ""}, {}, "the corpus is empty"),
    ({"a.txt": " \n "}, {}, "removed all 1 documents, 1 of them by empty; give files with text"),
    ({"a.txt": "One."}, {}, "removed all 1 documents, 1 of them by gopher.words; set `profile: none`"),
    ({"a.txt": article()}, {}, "the validation split came out empty: 1 files or groups are too few"),
    ({f"{n}.txt": article() for n in range(12)}, {}, r"split came out empty.*set data.split.validation=0\.\d+ data"),
    ({f"{n}.txt": article() for n in range(9)}, {"languages": ["fr"]}, "9 of them by language"),
])  # fmt: skip
def test_bad_corpora_end_in_one_line(tmp_path, files, options, message):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "out", str(folder), **options)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_one_large_file_is_a_corpus(tmp_path):
    (tmp_path / "all.txt").write_text("\n".join(article() for _ in range(300)))
    source = {"kind": "files", "paths": [str(tmp_path / "all.txt")], "max_document_bytes": 2048}
    metrics, _, _ = run(tmp_path / "out", {"book": source}, split={"validation": 0.1, "test": 0.1})
    assert metrics["validation_documents"] > 0 and metrics["documents_read"] > 100


@pytest.mark.parametrize("sources", [
    "~/notes", ["a.txt", "b.txt"], {"notes": "a.txt"}, {"notes": {"kind": "files", "paths": ["a.txt"]}},
])  # fmt: skip
def test_paths_stand_for_files(sources):
    config = DataConfig(sources=sources)
    assert all(source.kind == "files" for source in config.sources.values())
    assert DataConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("bad", [
    {"sources": {}}, {"sources": {"x": {"kind": "nothing"}}}, {"sources": {"x": {"kind": "files"}}}, {"mask": ["name"]},
    {"split": {"validation": -0.1}}, {"deduplication": {"threshold": 2}}, {"sources": 3}, {"source": "a"},
])  # fmt: skip
def test_bad_configs_are_refused(bad):
    with pytest.raises(ValidationError):
        DataConfig.model_validate(bad)


def test_default_is_the_embedded_corpus():
    assert list(DataConfig().sources) == ["stdlib", "topics", "docstrings"]
