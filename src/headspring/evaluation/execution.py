"""Answers judged by running them, in the sandbox.

Two measurements:
- Outputs: the model says what an expression prints. The sandbox runs the task's setup, then the expression, and lets
  `doctest` compare with the model's words. The documented output is run the same way first: a task whose documentation
  is wrong on this Python is left out and counted.
- Functions: the model completes a function of a held-out module, given everything above its body. The module is run
  with the completed function in the place of the original, then the function's doctests are. Only functions whose
  original passes its own doctests in the sandbox take part.

A program ends by printing a word that it cannot know beforehand, so that leaving early with exit code 0, or printing
"passed", is not a pass. A program that searches its own process for the word could find it: good enough for measuring
models that were not trained against it, not for a reward.
"""

import ast
import json
import secrets
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headspring.artifacts.sandbox import run_batch
from headspring.data.tasks import Task
from headspring.text.documents import Document

TIMEOUT = 2.0
TRIES = 8  # candidates run for each function wanted: in many modules the originals need more than the sandbox gives
PRELOAD = ("doctest", "math", "decimal", "fractions", "random", "textwrap", "re", "collections", "itertools")

OUTPUT_PROGRAM = """
import doctest, io, json
_setup, _source, _want, _word = json.loads({data!r})
_examples = [doctest.Example(_source, _want)]
_names = {{"__name__": "__main__"}}
exec(compile(_setup, "<setup>", "exec"), _names)
_test = doctest.DocTest(_examples, _names, "task", None, 0, None)
_result = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(_test, out=lambda _: None)
if _result.failed == 0 and _result.attempted == 1:
    print(_word)
"""

FUNCTION_PROGRAM = """
import doctest, json, sys, types
_source, _path, _docstring, _word = json.loads({data!r})
_module = types.ModuleType("candidate")
sys.modules["candidate"] = _module
exec(compile(_source, "<candidate>", "exec"), _module.__dict__)
_names = dict(_module.__dict__)
_test = doctest.DocTestParser().get_doctest(_docstring, _names, _path, None, 0)
_result = doctest.DocTestRunner(verbose=False).run(_test, out=lambda _: None)
if _result.failed == 0 and _result.attempted > 0:
    print(_word)
"""


def outputs_pass(tasks: Sequence[Task], answers: Sequence[str], unsafe: bool = False) -> list[bool | None]:
    """For each doctest task, whether its expression prints the answer; None where the documented output is wrong."""
    said = [(task.setup, task.expression, answer) for task, answer in zip(tasks, answers, strict=True)]
    documented = [(task.setup, task.expression, task.answer) for task in tasks]
    distinct = list(dict.fromkeys([*documented, *said]))
    rows = [[setup, source + "\n", want and want + "\n"] for setup, source, want in distinct]
    passed = dict(zip(distinct, _run(OUTPUT_PROGRAM, rows, unsafe)))
    return [passed[said_one] if passed[true_one] else None for said_one, true_one in zip(said, documented)]


@dataclass(frozen=True)
class DocumentedFunction:
    """A function of a module, cut at its body: `module[:body_start]` ends with its docstring's last line, without the
    line break, with which a body begins (see `completions.py` for the reason).

    Offsets are in characters. `indent` is that of the `def`."""

    module: str
    name: str
    docstring: str
    document_id: str
    body_start: int
    body_end: int
    indent: str

    @property
    def prompt(self) -> str:
        """Everything above the body."""
        return self.module[: self.body_start]

    def completed(self, body: str) -> str:
        """The module with `body` in the place of the original one."""
        return self.module[: self.body_start] + body.rstrip("\n") + "\n" + self.module[self.body_end :]


def documented_functions(
    documents: Sequence[Document], limit: int, max_lines: int = 12, unsafe: bool = False
) -> list[DocumentedFunction]:
    """Functions with doctests and a body of at most `max_lines` lines, whose original passes them in the sandbox."""
    found = [(turn, function) for document in documents for turn, function in enumerate(_functions(document, max_lines))]
    found.sort(key=lambda entry: entry[0])  # each module's first function, then each module's second, …
    candidates = [function for _, function in found[: TRIES * limit]]
    modules = [function.module for function in candidates]
    passed = functions_pass(candidates, [m[f.body_start : f.body_end] for m, f in zip(modules, candidates)], unsafe)
    return [function for function, works in zip(candidates, passed) if works][:limit]


def functions_pass(functions: Sequence[DocumentedFunction], bodies: Sequence[str], unsafe: bool = False) -> list[bool]:
    """Whether each function passes its doctests with this body (indented source lines)."""
    data = [[f.completed(body), f.name, f.docstring] for f, body in zip(functions, bodies, strict=True)]
    return _run(FUNCTION_PROGRAM, data, unsafe)


def _functions(document: Document, max_lines: int) -> Iterator[DocumentedFunction]:
    if document.kind != "code" or ">>>" not in document.text:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    starts = [0]
    for line in document.text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    if len(starts) != document.text.count("\n") + (not document.text.endswith("\n")) + 1:
        return  # other line breaks than \n: ast's line numbers are not ours
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        first, last = node.body[1], node.body[-1]
        assert node.body[0].end_lineno is not None and last.end_lineno is not None
        if not docstring or ">>>" not in docstring or last.end_lineno - first.lineno >= max_lines:
            continue
        start, end = starts[node.body[0].end_lineno], starts[last.end_lineno]
        yield DocumentedFunction(document.text, node.name, docstring, document.id, start - 1, end, " " * node.col_offset)


def _run(program: str, data: Sequence[list[str]], unsafe: bool) -> list[bool]:
    words = [secrets.token_hex(16) for _ in data]
    programs = [program.format(data=json.dumps([*row, word])) for row, word in zip(data, words)]
    outcomes = run_batch(programs, timeout=TIMEOUT, preload=PRELOAD, unsafe=unsafe, workers=2, description="running answers")
    return [outcome.status == "ok" and word in outcome.stdout.split() for outcome, word in zip(outcomes, words)]
