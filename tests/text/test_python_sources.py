"""The embedded corpus: spans point at the bytes they claim, and nothing is imported."""

import ast
import inspect
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from headspring.artifacts import UserError
from headspring.text.sources import Docstrings, Reading, StandardLibrary, Topics
from headspring.text.sources.python import module_name, python_files

STDLIB = Path(sysconfig.get_paths()["stdlib"])
MODULE = '''"""A module about nothing.

Over two lines — with a dash."""
raise RuntimeError("imported")

class Thing(Base):
    """A thing that is documented at some length."""
    def __init__(self, size: int = 3, *rest, flag=None): ...

    async def use(self, x) -> "Thing":
        r"""Use it, \\d times; more than forty characters long.

        >>> 1 + 1
        2
        """

def outer():
    def inner(a, /, b):
        """An inner function, documented with enough characters."""

def short():
    """Too short."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "quietpackage"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "things.py").write_text(MODULE)
    (folder / "other.py").write_text('"""Another module with a docstring of sufficient length."""\r\nx = 1\r\n', newline="")
    (folder / "template.py").write_text('"""{{ not }} python at all, though it ends in .py""" {% if %}')
    (folder / "tests" / "test_things.py").write_text('"""A test module, which no corpus should have in it."""')
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def docstrings(**options):
    reading = Reading()
    return list(Docstrings(packages=["quietpackage"], **options).read("doc", reading)), reading


def test_docstrings_have_name_signature_and_the_span_of_their_literal(package):
    documents, reading = docstrings()
    things = {document.metadata["name"]: document for document in documents if document.path.endswith("things.py")}
    assert list(things) == [
        "quietpackage.things", "quietpackage.things.Thing", "quietpackage.things.Thing.use",
        "quietpackage.things.outer.inner",
    ]  # fmt: skip
    signatures = [document.metadata["signature"] for document in things.values()]
    assert signatures == [None, "Thing(self, size: int=3, *rest, flag=None)", "use(self, x) -> 'Thing'", "inner(a, /, b)"]
    content = (package / "things.py").read_bytes()
    for document in things.values():
        literal = content[document.start : document.end].decode()
        assert inspect.cleandoc(ast.literal_eval(literal)) == document.text
        assert (document.kind, document.verbatim, document.split_group) == ("prose", False, document.path)
    assert ">>> 1 + 1\n2" in things["quietpackage.things.Thing.use"].text
    assert reading.counts["doc"] == {"files_not_python": 1}


def test_a_span_counts_carriage_returns(package):
    documents, _ = docstrings()
    other = next(document for document in documents if document.path == "quietpackage:other.py")
    literal = (package / "other.py").read_bytes()[other.start : other.end]
    assert ast.literal_eval(literal.decode()) == other.text


def test_max_bytes_and_min_characters(package):
    assert sum(len(document.text) for document in docstrings(max_bytes=150)[0]) <= 150
    assert "Too short." in [document.text for document in docstrings(min_characters=5)[0]]


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(UserError, match="'no_such_package' is not installed"):
        list(Docstrings(packages=["no_such_package"]).read("doc", Reading()))


def test_the_standard_library_is_verbatim_and_without_tests():
    documents = list(StandardLibrary(modules=["json", "statistics"]).read("stdlib", Reading()))
    assert [document.path for document in documents][:2] == ["stdlib:json/__init__.py", "stdlib:json/decoder.py"]
    for document in documents:
        content = (STDLIB / document.path.removeprefix("stdlib:")).read_bytes()
        assert document.verbatim and document.kind == "code"
        assert document.text.encode() == content[document.start : document.end]
    paths = [file.as_posix() for _, file in python_files("stdlib")]
    assert paths == sorted(paths) and len(paths) > 400
    unwanted = ("test/", "idlelib/", "site-packages/", "_sysconfigdata", "pydoc_data/", "lib2to3/tests/")
    assert not [path for path in paths if path.startswith(unwanted)]


def test_topics_are_found_without_importing_them():
    topics = list(Topics().read("topics", Reading()))
    if not topics:
        assert not (STDLIB / "pydoc_data" / "topics.py").exists()
        return
    by_name = {document.metadata["topic"]: document for document in topics}
    content = (STDLIB / "pydoc_data" / "topics.py").read_bytes()
    document = by_name["lambda"]
    assert ast.literal_eval("(" + content[document.start : document.end].decode() + ")").strip("\n") == document.text
    assert len({document.split_group for document in topics}) == len(topics)


def test_module_names():
    assert module_name("sympy:core/__init__.py") == "sympy.core"
    assert module_name("stdlib:json/decoder.py") == "json.decoder"


def test_two_readings_are_equal(package):
    first, second = (list(islice(StandardLibrary().read("s", Reading()), 5)) for _ in range(2))
    assert first == second and docstrings()[0] == docstrings()[0]
