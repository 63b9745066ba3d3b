"""Tasks with a checkable answer: how often a model is right, by kind of task.

The tasks are mined from the evaluation's own documents (`data.tasks.mine`) or read from JSONL files. Every model, base
models too, gets the same rendered conversation and answers greedily. The rules:
- An answer is right when the model stopped by itself and `check_answer` accepts the text. For a task whose answer is
  one line the end of a line is a stop, so that a base model, which was never taught to end a turn, has a chance too.
- A choice is the one whose mean log-probability per byte of text, given the conversation, is highest. No sampling, so
  that a model of any size can be measured; chance is 1 / number of choices.
- `doctest` and `expression` tasks are judged twice: here against the documented output, and by `execution.py`.

An answer gets room for twice the right one's tokens, plus a few: what is still running there cannot be right, and
waiting for it would only take time.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from headspring.artifacts import UserError
from headspring.artifacts.files import write_atomic
from headspring.data.questions import Check, Kind
from headspring.data.tasks import Task, check_answer
from headspring.evaluation.compression import continuation_log_probs
from headspring.posttraining.rates import difference
from headspring.text.chat import Message

TASKS = "tasks.jsonl"
SPARE_TOKENS = 8
CHECKS = ("exact", "set", "contains", "choice", "parses")


@dataclass(frozen=True)
class Answer:
    """What a model made of one task. `correct` is None where nothing was decided (a prompt longer than the context)."""

    id: str
    kind: str
    document_id: str
    prompt: str
    expected: str
    answer: str
    correct: bool | None


def answer_tasks(
    lm: Any, tasks: Sequence[Task], max_tokens: int = 96, batch_size: int = 64, batch_tokens: int = 8192
) -> list[Answer]:
    """One greedy answer, or one choice, for each task."""
    prompts = [chat_prompt(lm, task.messages) for task in tasks]
    fits = [len(prompt) + SPARE_TOKENS < lm.context for prompt in prompts]
    choosing = [i for i, task in enumerate(tasks) if task.check == "choice" and fits[i]]
    writing = [i for i, task in enumerate(tasks) if task.check != "choice" and fits[i]]
    texts: dict[int, str] = {}
    chosen = _choose(lm, [tasks[i] for i in choosing], [prompts[i] for i in choosing], batch_tokens)
    texts.update(zip(choosing, chosen))
    stopped = dict.fromkeys(choosing, True)
    written = _write(lm, [tasks[i] for i in writing], [prompts[i] for i in writing], max_tokens, batch_size)
    for i, (text, ended) in zip(writing, written):
        texts[i], stopped[i] = text, ended
    return [_judge(task, texts.get(i), stopped.get(i, False)) for i, task in enumerate(tasks)]


def chat_prompt(lm: Any, messages: Sequence[Message]) -> list[int]:
    """The ids up to where the assistant's turn begins. Not `lm.chat_ids`: base models are asked too, on purpose."""
    return lm.tokenizer.render(messages, add_generation_prompt=True).ids.tolist()


def _judge(task: Task, text: str | None, stopped: bool) -> Answer:
    correct = None if text is None else stopped and check_answer(task, text)
    prompt = task.messages[-1].content
    return Answer(task.id, task.kind, task.document_id, prompt, task.answer, text or "", correct)


def _write(
    lm: Any, tasks: Sequence[Task], prompts: Sequence[list[int]], max_tokens: int, batch_size: int
) -> list[tuple[str, bool]]:
    """(text, stopped by itself) of the greedy answers. Tasks that share stop rules run together, by length."""
    found: list[tuple[str, bool]] = [("", False)] * len(tasks)
    groups: dict[tuple[bool, int], list[int]] = {}
    for i, task in enumerate(tasks):
        one_line = "\n" not in task.answer and task.check != "parses"
        room = max_tokens
        if task.check in ("exact", "set", "doctest"):
            room = 2 * len(lm.tokenizer.encode(task.answer)) + SPARE_TOKENS
        groups.setdefault((one_line, min(max_tokens, 16 * -(-room // 16))), []).append(i)
    for (one_line, room), members in sorted(groups.items()):
        generations = lm.generate(
            [prompts[i] for i in members],
            max_tokens=room,
            temperature=0.0,
            stop=("\n",) if one_line else (),
            batch_size=batch_size,
            progress="answering tasks",
        )
        for i, generation in zip(members, generations):
            found[i] = (generation.text, generation.finish_reason == "stop")
    return found


def _choose(lm: Any, tasks: Sequence[Task], prompts: Sequence[list[int]], batch_tokens: int) -> list[str]:
    """The choice with the highest mean log-probability per byte, for each task; the first of a tie."""
    pairs, places = [], []
    for i, (task, prompt) in enumerate(zip(tasks, prompts)):
        for choice in task.choices:
            pairs.append((prompt, lm.tokenizer.encode(choice)[: lm.context - len(prompt)]))
            places.append((i, choice))
    scores = continuation_log_probs(lm, pairs, batch_tokens)
    best = [(-np.inf, "")] * len(tasks)
    for (i, choice), score in zip(places, scores):
        per_byte = score / max(1, len(choice.encode()))
        if per_byte > best[i][0]:
            best[i] = (per_byte, choice)
    return [choice for _, choice in best]


def read_set(path: Path | str) -> list[Task]:
    """The tasks of a JSONL file: one object a line with `prompt` (or `messages`) and `answer`, and optionally `choices`
    and `check` (exact, set, contains, choice, parses; default exact, or choice where there are choices).

    The file's stem becomes the kind. Raises `UserError` with file and line for what cannot be read."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable UTF-8 file ({error})") from error
    tasks = [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not tasks:
        raise UserError(f"{path}: holds no task; each line is a JSON object with prompt and answer")
    return tasks


def _parse(path: Path, number: int, line: str) -> Task:
    try:
        row = json.loads(line)
        messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        answer, choices = row["answer"], tuple(row.get("choices", ()))
        check = row.get("check", "choice" if choices else "exact")
        if not all(isinstance(text, str) for text in (answer, *choices)):
            raise ValueError("answer and choices must be texts")
        if check not in CHECKS:
            raise ValueError(f"check is {check!r}; it must be one of {', '.join(CHECKS)}")
        if (check == "choice") != bool(choices) or (choices and answer not in choices):
            raise ValueError("check choice needs choices that hold the answer, and no other check has choices")
        if not messages:
            raise ValueError("messages is empty")
        prompt = tuple(Message.model_validate(message) for message in messages)
    except KeyError as error:
        raise UserError(f"{path}:{number}: no {error.args[0]}; a line needs prompt (or messages) and answer") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}:{number}: not a task: {str(error).splitlines()[0]}") from error
    kind, check = cast(Kind, path.stem), cast(Check, check)
    return Task(f"{path.name}:{number}", kind, prompt, answer, check, f"{path.name}:{number}", 0, 0, choices)


def write_answers(answers: Sequence[Answer], folder: Path) -> None:
    """`folder/tasks.jsonl`, one answer a line."""
    write_atomic(Path(folder) / TASKS, "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))


def paired_difference(before: Path, after: Path, kind: str | None = None, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of accuracy after − before on the tasks that two evaluation folders share, with the 95 %
    interval of a paired bootstrap. Raises `UserError` where they share none."""
    old, new = _correct(before, kind), _correct(after, kind)
    shared = [task for task in old if task in new]
    if not shared:
        raise UserError(f"{before} and {after} share no answered task; were they evaluated on the same data?")
    found = difference([old[task] for task in shared], [new[task] for task in shared], seed)
    return found["mean"], found["low"], found["high"]


def _correct(folder: Path, kind: str | None) -> dict[str, bool]:
    try:
        lines = (Path(folder) / TASKS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{folder}: no {TASKS}; evaluate with tasks first") from error
    rows = [json.loads(line) for line in lines]
    return {row["id"]: row["correct"] for row in rows if row["correct"] is not None and kind in (None, row["kind"])}
