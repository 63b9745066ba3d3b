"""Answers judged by running them."""

import pytest

from headspring.artifacts import UserError, sandbox
from headspring.data.tasks import Task
from headspring.evaluation.execution import documented_functions, functions_pass, outputs_pass
from headspring.text.chat import Message


def doctest_task(expression: str, answer: str, setup: str = "") -> Task:
    messages = (Message(role="user", content=f">>> {expression}\n\nWhat does Python print?"),)
    return Task("id", "doctest", messages, answer, "doctest", "document", 0, 1, setup=setup, expression=expression)


@pytest.mark.parametrize(
    ("answer", "passed"),
    [("6", True), ("7", False), ("", False), ("6 6", False), ("...", False), ("'6'", False), ("six\n6", False)],
)
def test_outputs(answer, passed):
    task = doctest_task("math.factorial(3)", "6", "import math")
    assert outputs_pass([task], [answer]) == [passed]


def test_white_space_and_wrong_documentation():
    tasks = [doctest_task("[1, 2]", "[1, 2]"), doctest_task("1 + 1", "3"), doctest_task("None", ""), doctest_task("1 / 0", "1")]
    assert outputs_pass(tasks, ["[1,2]", "2", "", "1"]) == [False, None, True, None]
    assert outputs_pass(tasks[:1], ["[1,  2] "]) == [True]


def test_leaving_early_is_not_a_pass():
    task = doctest_task("f()", "1", "import os\ndef f():\n    os._exit(0)")
    assert outputs_pass([task], ["1"]) == [None]
    honest = doctest_task("f()", "1", "f = lambda: 1")
    assert outputs_pass([honest], ["1"]) == [True]


def test_functions(documents):
    functions = documented_functions(documents, limit=8)
    assert [function.name for function in functions] == ["triple"]  # `broken` fails its own doctest
    (function,) = functions
    assert function.prompt.endswith('    """') and "result" not in function.prompt
    bodies = [
        "\n    return number + number + number",
        "\n    return 2",
        "\n    return",
        "\n    import os; os._exit(0)",
        "\n    while True: pass",
        "def",
    ]
    assert functions_pass(functions * len(bodies), bodies) == [True, False, False, False, False, False]
    assert functions_pass(functions, ["\n    result = number * 3\n    return result\n"]) == [True]


def test_refuses_where_nothing_isolates(documents, monkeypatch):
    monkeypatch.setattr(sandbox, "_mechanism", lambda: None)
    task = doctest_task("1 + 1", "2")
    with pytest.raises(UserError, match="--unsafe-execution"):
        outputs_pass([task], ["2"])
    assert outputs_pass([task], ["2"], unsafe=True) == [True]
