"""Tasks are true to their documents, deterministic, balanced, and their rule can tell right from wrong."""

import ast
import random

import pytest

from headspring.artifacts import UserError
from headspring.data.doctests import examples
from headspring.data.functions import functions
from headspring.data.questions import CHECKS, TEMPLATES, ask
from headspring.data.tasks import Task, TaskConfig, check_answer, counts, fingerprints, mine
from headspring.text.chat import Message
from headspring.text.documents import Document

MODULE = '''"""A módule with bytes beyond ASCII."""
import os


def greet(name, greeting="héllo", *, loud=False):
    """Greet somebody by name."""
    text = greeting + name
    return text.upper() if loud else text


class Store:
    """Holds values.

    >>> import math
    >>> x = math.floor(2.5)
    >>> x + 1
    3
    >>> undefined_name
    4
    """

    def get(self, key, *rest, **options):
        """Return the value of a key."""

        if key not in self.values:
            raise KeyError(key)
        return self.values[key]

    def close(self):
        """Only a docstring."""

    async def each(self):
        for value in self.values:
            yield value
'''


def document(text: str = MODULE, path: str = "m.py", kind: str = "code") -> Document:
    return Document(text, "test", kind, path, 0, len(text.encode()))  # type: ignore[arg-type]


def many_documents(count: int = 30) -> list[Document]:
    return [
        document(MODULE.replace("greet", f"greet{i}").replace("Store", f"S{i}").replace("key", f"key{i}"), f"m{i}.py")
        for i in range(count)
    ]


def test_facts_are_slices_of_the_source():
    found = {function.name: function for function in functions(MODULE, 400)}
    assert list(found) == ["greet", "get", "each"]  # `close` has nothing but a docstring
    greet, get = found["greet"], found["get"]
    assert greet.parameters == ("name", "greeting", "loud")
    assert greet.defaults == (("greeting", '"héllo"'), ("loud", "False"))
    assert greet.returned == "text.upper() if loud else text"
    assert greet.header == 'def greet(name, greeting="héllo", *, loud=False):'
    assert "Greet somebody" not in greet.source and greet.summary == "Greet somebody by name."
    assert get.parameters == ("self", "key", "*rest", "**options") and get.raised == "KeyError"
    assert found["each"].returned == "" and greet.local_names == ("text",)
    ast.parse(greet.source)


@pytest.mark.parametrize("text", [MODULE, MODULE.replace("\n", "\r\n"), "\ufeff" + MODULE], ids=["lf", "crlf", "bom"])
def test_byte_spans_hold_the_function(text):
    content = text.encode()
    for function in functions(text, 400):
        assert content[function.byte_start : function.byte_end].decode().startswith(("def ", "async def "))
        assert function.name in content[function.byte_start : function.byte_end].decode().partition("\n")[0]


def test_doctests_stand_on_their_own():
    docstring = ast.get_docstring(ast.parse(MODULE).body[3])
    assert docstring is not None
    (example,) = examples(docstring)  # `undefined_name` comes from nowhere
    assert (example.setup, example.expression, example.output) == ("import math\nx = math.floor(2.5)", "x + 1", "3")


def test_doctest_setup_keeps_what_changes_the_object_and_drops_the_rest():
    text = ">>> import os\n>>> a = [1]\n>>> b = 5\n>>> a.append(2)\n>>> a\n[1, 2]\n>>> os.getcwd()\n'/'\n"
    text += ">>> c += [1]\n>>> c\n[1]\n"
    assert [(e.setup, e.expression) for e in examples(text)] == [("a = [1]\na.append(2)", "a")]


def test_every_kind_is_mined_and_answers_check_out():
    tasks = mine(many_documents(), TaskConfig(per_kind=20), seed=1)
    assert set(counts(tasks)) >= set(TEMPLATES) - {"doctest"}
    for task in tasks:
        assert check_answer(task, task.answer) and check_answer(task, f"  {task.answer} \n")
        assert task.check == CHECKS[task.kind] and task.messages[-1].role == "user"
        assert not check_answer(task, "") and not check_answer(task, "zebra zebra")
        assert len(task.choices) == (4 if task.check == "choice" else 0)
        if task.choices:
            assert task.answer in task.choices and len(set(task.choices)) == 4


def test_expression_answers_are_what_python_prints():
    tasks = mine(many_documents(200), TaskConfig(kinds=("expression",), per_kind=200), seed=0)
    assert len(tasks) > 50
    assert all(repr(eval(task.expression)) == task.answer for task in tasks)


def test_tasks_lead_back_to_their_document():
    documents = {item.id: item for item in many_documents()}
    for task in mine(documents.values(), TaskConfig(per_kind=30), seed=0):
        span = documents[task.document_id].text.encode()[task.byte_start : task.byte_end].decode()
        if task.kind == "returns":
            assert f"return {task.answer}" in span
        elif task.kind in ("name", "default", "raises", "docstring", "summary", "doctest"):
            assert task.answer in span


def test_mining_is_deterministic_and_ignores_the_order_of_documents():
    documents, config = many_documents(), TaskConfig(per_kind=10)
    first = mine(documents, config, seed=3)
    shuffled = list(documents)
    random.Random(0).shuffle(shuffled)
    assert mine(shuffled, config, seed=3) == first
    assert mine(documents, config, seed=4) != first
    assert len({task.id for task in first}) == len(first)


def test_caps_and_balance():
    tasks = mine(many_documents(60), TaskConfig(kinds=("name", "parameters", "returns"), per_kind=9, per_document=1))
    assert counts(tasks) == {"name": 9, "parameters": 9, "returns": 9}
    seen = [(task.kind, task.document_id) for task in tasks]
    assert len(set(seen)) == len(seen)


def test_a_function_is_asked_about_once_and_held_out_functions_never():
    documents, config = many_documents(10), TaskConfig(per_kind=50)
    twice = [*documents, *(document(item.text, f"copy/{item.path}") for item in documents)]
    prompts = [task.messages[0].content for task in mine(twice, config)]
    assert len(prompts) == len(set(prompts))
    held_out = fingerprints(documents[:9], config)
    assert {task.document_id for task in mine(documents, config, exclude=held_out)} == {documents[9].id}
    assert len({task.document_id for task in mine(documents, config)}) == 10  # the control: without it all are asked


def test_has_parameter_is_balanced():
    tasks = mine(many_documents(200), TaskConfig(kinds=("has_parameter",), per_kind=200, per_document=3))
    share = sum(task.answer == "yes" for task in tasks) / len(tasks)
    assert 0.3 < share < 0.7


@pytest.mark.parametrize(
    ("check", "answer", "text", "right"),
    [
        ("exact", "a + 'b'", 'a  +\n"b"', True),
        ("exact", "name", "`name`", True),
        ("exact", "name", "name2", False),
        ("set", "self, name", "name,self", True),
        ("set", "self, name", "self, name, name", False),
        ("set", "self, name", "self", False),
        ("contains", "42", "it is 42.", True),
        ("contains", "42", "it is 4 2", False),
        ("parses", "def f(x):\n    return x", "def f(x):\n  return 2 * x", True),
        ("parses", "def f(x):\n    return x", "def g(x):\n  return x", False),
        ("parses", "def f(x):\n    return x", "def f(x): return (", False),
        ("parses", "x = 1", "y = 2", True),
        ("parses", "x = 1", "", False),
        ("doctest", "[1, 2]", "[1, 2]", True),
    ],
)
def test_the_rule(check, answer, text, right):
    task = Task("0", "name", (Message(role="user", content="?"),), answer, check, "d", 0, 1)
    assert check_answer(task, text) is right


def test_text_that_is_not_python_yields_nothing():
    broken = [document("def f(:\n  pass"), document("print 'two'"), document("\0"), document("# nothing here\n")]
    with pytest.raises(UserError, match="no task"):
        mine(broken, TaskConfig())
    with pytest.raises(UserError, match="no task"):
        mine([], TaskConfig())


def test_unknown_kinds_and_empty_lists_are_refused():
    with pytest.raises(ValueError):
        TaskConfig(kinds=("riddle",))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="kinds is empty"):
        mine(many_documents(), TaskConfig(kinds=()))


def test_prompts_hold_braces_and_strange_text_unchanged():
    text = 'def f(a):\n    return "{source} {0} {" + a\n'
    (function,) = functions(text, 400)
    question = ask("returns", function, random.Random(0), 80, 160)
    assert question is not None and question.answer == '"{source} {0} {" + a' and text.strip() in question.prompt


def test_prose_documents_give_doctests():
    prose = document("Adds.\n\n>>> 1 + 1\n2\n", kind="prose")
    (task,) = mine([prose], TaskConfig())
    assert (task.kind, task.answer, task.expression) == ("doctest", "2", "1 + 1")
