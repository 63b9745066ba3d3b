"""Tasks as JSON lines: what a trainer writes beside its model, so that anyone can read what it was taught."""

import json
from collections.abc import Sequence
from pathlib import Path

from headspring.artifacts import UserError
from headspring.artifacts.files import open_atomic
from headspring.data.tasks import Task
from headspring.text.chat import Message

TASKS = "tasks.jsonl"


def write_tasks(tasks: Sequence[Task], folder: Path, name: str = TASKS) -> Path:
    """One task a line, whole or not at all."""
    path = Path(folder) / name
    with open_atomic(path) as file:
        for task in tasks:
            value = {**vars(task), "messages": [message.model_dump() for message in task.messages]}
            file.write((json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
    return path


def read_tasks(folder: Path, name: str = TASKS) -> list[Task]:
    """The tasks that `write_tasks` wrote. Raises `UserError` where there is no such file."""
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; a stage that trains on tasks writes it")
    return [_from_json(json.loads(line)) for line in path.read_text("utf-8", "surrogatepass").splitlines()]


def _from_json(value: dict) -> Task:
    messages = tuple(Message.model_validate(message) for message in value["messages"])
    return Task(**{**value, "messages": messages, "choices": tuple(value["choices"])})
