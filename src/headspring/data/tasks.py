"""Tasks: questions mined from documents, each with an answer that a rule can check.

One noun serves three stages: SFT trains on a task's conversation, DPO ranks a model's own answers by `check_answer`,
evaluation counts right answers on documents never trained on. Every task names its document and the bytes it was made
from. Mining reads documents in an order drawn from the seed and gives each function to the kinds that have the fewest
tasks, so that kinds are balanced, each is capped, and the same documents, config and seed give the same tasks.
The caller decides which documents: training tasks from the training split, evaluation tasks from the test split.
"""

import ast
import hashlib
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from headspring.artifacts import UserError, Value
from headspring.data.doctests import Example, examples
from headspring.data.functions import Function, docstrings, functions, parse
from headspring.data.questions import CHECKS, TEMPLATES, Check, Kind, Question, ask
from headspring.text.chat import Message
from headspring.text.documents import Document

NUM_CHOICES = 4


@dataclass(frozen=True)
class Task:
    """A question with its answer and the rule that checks an answer.

    `byte_start`, `byte_end`: the bytes of the document's text (UTF-8) that the question was made from. A `doctest`
    (or `expression`) task asks what `expression` prints after `setup` (source lines); `answer` is what it should be."""

    id: str
    kind: Kind
    messages: tuple[Message, ...]
    answer: str
    check: Check
    document_id: str
    byte_start: int
    byte_end: int
    choices: tuple[str, ...] = ()
    setup: str = ""
    expression: str = ""

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The prompt's turns and the right answer as the assistant's turn."""
        return (*self.messages, Message(role="assistant", content=self.answer))


class TaskConfig(Value):
    """Which tasks to mine, how many, and how long they may be (characters)."""

    kinds: tuple[Kind, ...] = tuple(TEMPLATES)
    per_kind: int = Field(default=600, gt=0)
    per_document: int = Field(default=8, gt=0)  # of each kind
    per_function: int = Field(default=1, gt=0)  # questions about one function
    max_source: int = Field(default=400, gt=0)
    max_answer: int = Field(default=80, gt=0)
    max_written: int = Field(default=160, gt=0)  # a function the model is asked to write


def mine(
    documents: Iterable[Document], config: TaskConfig, seed: int = 0, exclude: Collection[str] = frozenset()
) -> list[Task]:
    """The tasks of these documents, in a seeded order that mixes the kinds.

    `exclude` holds what must not be asked about, such as the `fingerprints` of the documents another split holds out.
    Raises `UserError` where the documents hold no task at all."""
    if not config.kinds:
        raise UserError(f"tasks.kinds is empty; name at least one of {', '.join(TEMPLATES)}")
    miner = _Miner(config, seed, exclude)
    for document in sorted(documents, key=lambda document: _digest(seed, document.id)):
        if miner.full:
            break
        miner.read(document)
    tasks = miner.finish()
    if not tasks:
        raise UserError("no task could be made from these documents: tasks need Python source or docstrings with doctests")
    random.Random(f"order:{seed}").shuffle(tasks)
    return tasks


def fingerprints(documents: Iterable[Document], config: TaskConfig) -> set[str]:
    """Fingerprints of all that `config` could ask about in these documents; pass them to `mine(exclude=)`."""
    found: set[str] = set()
    for document in documents:
        if document.kind == "code":
            found.update(map(_fingerprint, functions(document.text, config.max_source)))
        found.update(_fingerprint(example) for example, _, _ in _examples(document))
    return found


def check_answer(task: Task, text: str) -> bool:
    """Whether `text` answers the task. White space runs, kinds of quotes and surrounding backticks do not matter.

    - exact, choice, doctest: equal to the answer
    - set: the same comma-separated items in any order
    - contains: the answer occurs in the text
    - parses: the text is Python, and where the answer defines a function, so does the text, by the same name

    For a doctest this compares with the documented output; running it is the evaluation's business."""
    given, wanted = _normalise(text), _normalise(task.answer)
    match task.check:
        case "exact" | "choice" | "doctest":
            return given == wanted
        case "set":
            return sorted(re.split(r" ?, ?", given)) == sorted(re.split(r" ?, ?", wanted))
        case "contains":
            return wanted in given
        case "parses":
            return _first_definition(text) == _first_definition(task.answer) is not None


class _Miner:
    """The tasks so far. One instance reads all documents of one call of `mine`."""

    def __init__(self, config: TaskConfig, seed: int, exclude: Collection[str]):
        self.config, self.seed = config, seed
        self.seen = set(exclude)
        self.tasks: list[Task] = []
        self.count: Counter[Kind] = Counter()
        self.summaries: dict[str, None] = {}  # an ordered set: what wrong choices are drawn from

    @property
    def open_kinds(self) -> list[Kind]:
        return [kind for kind in self.config.kinds if self.count[kind] < self.config.per_kind]

    @property
    def full(self) -> bool:
        return not self.open_kinds

    def read(self, document: Document) -> None:
        rng = random.Random(f"{self.seed}:{document.id}")
        in_document: Counter[Kind] = Counter()
        if document.kind == "code" and any(kind != "doctest" for kind in self.open_kinds):
            for function in functions(document.text, self.config.max_source):
                self._ask(document, function, in_document, rng)
        if "doctest" in self.open_kinds:
            for example, start, end in _examples(document):
                self._ask_doctest(document, example, start, end, in_document, rng)

    def _ask(self, document: Document, function: Function, in_document: Counter[Kind], rng: random.Random) -> None:
        if (fingerprint := _fingerprint(function)) in self.seen:
            return
        self.seen.add(fingerprint)
        if function.summary:
            self.summaries[function.summary] = None
        kinds = [kind for kind in self.open_kinds if kind != "doctest" and in_document[kind] < self.config.per_document]
        rng.shuffle(kinds)
        asked = 0
        for kind in sorted(kinds, key=lambda kind: self.count[kind]):
            if asked == self.config.per_function:
                break
            question = ask(kind, function, rng, self.config.max_answer, self.config.max_written)
            if question is not None:
                self._add(document, kind, question, function.byte_start, function.byte_end)
                in_document[kind] += 1
                asked += 1

    def _ask_doctest(
        self, document: Document, example: Example, start: int, end: int, in_document: Counter[Kind], rng: random.Random
    ) -> None:
        fingerprint = _fingerprint(example)
        if fingerprint in self.seen or "doctest" not in self.open_kinds or in_document["doctest"] >= self.config.per_document:
            return
        self.seen.add(fingerprint)
        setup = "".join(f">>> {line}\n" for line in example.setup.splitlines())
        prompt = rng.choice(TEMPLATES["doctest"]).format(setup=setup, expression=example.expression)
        question = Question(prompt, example.output, example.expression)
        self._add(document, "doctest", question, start, end, example.setup)
        in_document["doctest"] += 1

    def _add(self, document: Document, kind: Kind, question: Question, start: int, end: int, setup: str = "") -> None:
        identity = f"{kind}\0{document.id}\0{start}\0{question.prompt}".encode("utf-8", "surrogatepass")
        task = Task(
            id=hashlib.blake2b(identity, digest_size=16).hexdigest(),
            kind=kind,
            messages=(Message(role="user", content=question.prompt),),
            answer=question.answer,
            check=CHECKS[kind],
            document_id=document.id,
            byte_start=start,
            byte_end=end,
            setup=setup,
            expression=question.expression,
        )
        self.tasks.append(task)
        self.count[kind] += 1

    def finish(self) -> list[Task]:
        """The tasks, those of kind `summary` with their wrong choices, which come from other functions."""
        return [task for task in map(self._with_choices, self.tasks) if task is not None]

    def _with_choices(self, task: Task) -> Task | None:
        if task.check != "choice":
            return task
        others = [summary for summary in self.summaries if _normalise(summary) != _normalise(task.answer)]
        if len(others) < NUM_CHOICES - 1:
            return None
        rng = random.Random(f"choices:{self.seed}:{task.id}")
        choices = [task.answer, *rng.sample(others, NUM_CHOICES - 1)]
        rng.shuffle(choices)
        return Task(**{**vars(task), "choices": tuple(choices)})


def _examples(document: Document) -> Iterator[tuple[Example, int, int]]:
    """The document's doctests with the byte span of the docstring they stand in."""
    if ">>>" not in document.text:
        return
    if document.kind == "code":
        spans: Iterable[tuple[str, int, int]] = docstrings(document.text)
    else:
        spans = [(document.text, 0, len(document.text.encode("utf-8", "surrogatepass")))]
    for text, start, end in spans:
        for example in examples(text):
            yield example, start, end


class HasKind(Protocol):
    @property
    def kind(self) -> str: ...


def counts(items: Sequence[HasKind]) -> dict[str, int]:
    """Tasks (or what was made of tasks) by kind, in the order of the kinds' names."""
    return dict(sorted(Counter(item.kind for item in items).items()))


def _digest(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest()


def _fingerprint(item: Function | Example) -> str:
    """Equal for functions (or examples) that differ in nothing but white space, wherever they stand."""
    parts = (item.setup, item.expression) if isinstance(item, Example) else (item.summary, " ".join(item.source.split()))
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _normalise(text: str) -> str:
    return " ".join(text.split()).strip("`").strip().replace('"', "'")


def _first_definition(text: str) -> str | None:
    """The name of the function that `text` starts with, "" for other Python, None for what does not parse."""
    tree = parse(text.strip())
    if tree is None or not tree.body:
        return None
    first = tree.body[0]
    return first.name if isinstance(first, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
