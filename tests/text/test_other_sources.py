"""Translations, synthetic text and Hugging Face data sets."""

import builtins
import json

import pytest
from pydantic import ValidationError

from headspring.artifacts import UserError
from headspring.text.sources import HuggingFaceDataset, Reading, Synthetic, Translations
from headspring.text.sources.translations import parse_catalogue

CATALOGUE = """# Header
msgid ""
msgstr ""
"Language: de\\n"

#: here.py:3
msgid "The page does not exist anywhere."
msgstr ""
"Die Seite gibt es "
"nirgends — \\"wirklich\\"."

#, fuzzy
msgid "A guess that nobody has checked yet"
msgstr "Eine ungeprüfte Vermutung von jemandem"
msgctxt "verb"
msgid "Open the window over there"
msgstr "Mach das Fenster dort auf"
msgid "%d file is in this folder"
msgid_plural "%d files are in this folder"
msgstr[0] "%d Datei ist in diesem Ordner"
msgstr[1] "%d Dateien sind in diesem Ordner"

msgid "Not translated by anybody so far"
msgstr ""

#~ msgid "Obsolete since some time ago"
#~ msgstr "Seit einiger Zeit überholt"
"""


@pytest.fixture
def catalogues(tmp_path, monkeypatch):
    french = CATALOGUE.replace("Mach das Fenster dort auf", "Ouvre la fenêtre là-bas")
    for language, text in (("de", CATALOGUE), ("fr", french)):
        folder = tmp_path / "polyglot" / "locale" / language / "LC_MESSAGES"
        folder.mkdir(parents=True)
        (folder / "django.po").write_text(text)
    (tmp_path / "polyglot" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "polyglot"


def test_entries_and_the_bytes_they_stand_in():
    content = CATALOGUE.encode()
    entries = list(parse_catalogue(content, "x.po"))
    assert [(entry.msgid[:8], entry.context) for entry in entries] == [("The page", ""), ("Open the", "verb")]
    assert entries[0].msgstr == 'Die Seite gibt es nirgends — "wirklich".'
    span = content[entries[0].start : entries[0].end].decode()
    assert span.startswith('msgstr ""\n') and span.endswith('\\"wirklich\\"."\n')
    assert content[entries[1].start : entries[1].end] == b'msgstr "Mach das Fenster dort auf"\n'


def test_languages_are_aligned_and_stay_together(catalogues):
    documents = list(Translations(packages=["polyglot"]).read("t", Reading()))
    by_language = {language: [d for d in documents if d.language == language] for language in ("en", "de", "fr")}
    assert [len(group) for group in by_language.values()] == [2, 2, 2]
    keys = [[d.metadata["msgid_hash"] for d in group] for group in by_language.values()]
    assert keys[0] == keys[1] == keys[2] and len(set(keys[0])) == 2
    assert all(d.split_group == d.metadata["msgid_hash"] for d in documents)
    pairs = list(Translations(packages=["polyglot"], languages=["fr"]).pairs())
    assert [(pair.language, pair.translation) for pair in pairs][1] == ("fr", "Ouvre la fenêtre là-bas")


def test_packages_without_catalogues_and_broken_ones_are_named(catalogues):
    with pytest.raises(UserError, match=r"no \.po catalogue in xx in package 'polyglot'"):
        list(Translations(packages=["polyglot"], languages=["xx"]).read("t", Reading()))
    with pytest.raises(UserError, match="'no_such_package' is not installed"):
        list(Translations(packages=["no_such_package"]).read("t", Reading()))
    with pytest.raises(UserError, match=r"x\.po: line 1 is not part of a \.po catalogue"):
        list(parse_catalogue(b"hello\n", "x.po"))
    with pytest.raises(UserError, match="the entry at byte"):
        list(parse_catalogue(b'msgid "a"\nmsgstr "bad \\x escape"\n', "x.po"))


TEMPLATE = {"templates": ["{name} has {n} apples.", "{name} left."], "slots": {"name": ["Ada", "Alan"], "n": "2..9"}}


def test_templates_are_seeded_and_always_synthetic():
    few, many = (list(Synthetic(**TEMPLATE, documents=n).read("s", Reading(seed=3))) for n in (20, 50))
    assert few == many[:20] and all(document.synthetic for document in many)
    assert {document.metadata["template"] for document in many} == {0, 1}
    other = list(Synthetic(**TEMPLATE, documents=20).read("s", Reading(seed=4)))
    assert [document.text for document in other] != [document.text for document in few]


def test_a_model_writes_from_the_templates():
    def shout(prompts):
        return [prompt.upper() for prompt in prompts]

    documents = list(Synthetic(**TEMPLATE, documents=20, model=True).read("s", Reading(generate=shout)))
    assert all(d.text == d.metadata["prompt"].upper() and d.synthetic for d in documents) and len(documents) == 20
    with pytest.raises(UserError, match="needs a model"):
        list(Synthetic(**TEMPLATE, model=True).read("s", Reading()))
    with pytest.raises(UserError, match="gave 0 texts for 16 prompts"):
        list(Synthetic(**TEMPLATE, model=True).read("s", Reading(generate=lambda prompts: [])))


@pytest.mark.parametrize(("slots", "message"), [
    ({"name": ["Ada"]}, "slot {n} has no choices"), ({"name": ["Ada"], "n": "9..2"}, "neither a range"),
    ({"name": [], "n": "1..2"}, "'name' has no choices"), ({"name": ["A"], "n": "1..2", "z": ["x"]}, "in no template"),
])  # fmt: skip
def test_slots_must_fit_the_templates(slots, message):
    with pytest.raises(ValidationError, match=message):
        Synthetic(templates=TEMPLATE["templates"], slots=slots)


def test_a_local_data_set(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n}", "n": n}) + "\n" for n in range(5)))
    options = {"dataset": "json", "data_files": [str(tmp_path / "rows.jsonl")], "metadata_fields": ["n"]}
    documents = list(HuggingFaceDataset(**options).read("h", Reading()))
    assert [(d.text, d.metadata["n"]) for d in documents] == [(f"row {n}", n) for n in range(5)]
    assert documents[0].path == "datasets:json:train" and documents[0].split_group.endswith("#0")
    with pytest.raises(UserError, match=r"no text in field 'body' \(it has: text, n\)"):
        list(HuggingFaceDataset(**options, text_field="body").read("h", Reading()))


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'headspring\[datasets\]'"):
        list(HuggingFaceDataset(dataset="x").read("h", Reading()))
