"""Preference pairs that a model makes itself: its right answer against its wrong answer to the same question.

The model answers each training task several times; the tasks' own rule says which answers are right. A task whose
answers are all right or all wrong teaches no preference and is skipped, and counted. Where the model is never right the
gold answer may stand in as chosen (`gold_as_chosen`); such a pair says so, for it is not a sample of the policy.
The rejected answer is the wrong one the model gives most often.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headspring.artifacts import UserError
from headspring.artifacts.files import open_atomic
from headspring.data.tasks import Task
from headspring.posttraining.answers import Answer, Answerer, answer, prompt_ids

PAIRS = "pairs.jsonl"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as token ids, with the task and the bytes of the document they come from."""

    task_id: str
    kind: str
    document_id: str
    byte_start: int
    byte_end: int
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen: str
    rejected: str
    chosen_origin: Literal["model", "gold"]

    @property
    def length(self) -> int:
        """Inputs of the longer of its two rows."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids)) - 1


@dataclass(frozen=True)
class PairReport:
    """What became of the tasks: every one is in exactly one of the counts."""

    pairs: int = 0
    all_right: int = 0
    all_wrong: int = 0
    gold_chosen: int = 0  # among `pairs`
    right_rate: float = 0.0  # of all sampled answers


def make_pairs(
    lm: Answerer,
    tasks: Sequence[Task],
    *,
    num_answers: int = 4,
    max_tokens: int = 48,
    temperature: float = 1.0,
    gold_as_chosen: bool = False,
    seed: int = 0,
) -> tuple[list[Pair], PairReport]:
    """Pairs from the model's own answers, in the tasks' order. Tasks answered by likelihood (`choice`) are left out.

    Raises `UserError` where no task gave a pair."""
    asked = [task for task in tasks if task.check != "choice"]
    answers = answer(lm, asked, num_answers, max_tokens, temperature, seed)
    found = [_pair(lm.tokenizer, task, row, gold_as_chosen) for task, row in zip(asked, answers)]
    pairs = [pair for pair in found if pair is not None]
    flat = [item.right for row in answers for item in row]
    report = PairReport(
        pairs=len(pairs),
        all_right=sum(all(item.right for item in row) for row in answers),
        all_wrong=sum(pair is None and not any(item.right for item in row) for pair, row in zip(found, answers)),
        gold_chosen=sum(pair.chosen_origin == "gold" for pair in pairs),
        right_rate=sum(flat) / max(len(flat), 1),
    )
    if not pairs:
        hint = "ask for more answers or a higher temperature" if report.all_right else "set gold_as_chosen or train sft longer"
        raise UserError(f"no preference pair among {len(asked)} tasks: {report.all_right} always right, the rest never; {hint}")
    return pairs, report


def _pair(tokenizer: Any, task: Task, answers: Sequence[Answer], gold_as_chosen: bool) -> Pair | None:
    right = [item for item in answers if item.right]
    wrong = [item for item in answers if not item.right]
    if not wrong or not (right or gold_as_chosen):
        return None
    prompt = prompt_ids(tokenizer, task)
    if right:
        best = _most_frequent(right)
        chosen_ids, chosen = best.token_ids, best.text
    else:
        whole = [int(token) for token in tokenizer.render(task.conversation).ids]
        chosen_ids, chosen = tuple(whole[len(prompt) :]), task.answer
    worst = _most_frequent(wrong)
    return Pair(
        task_id=task.id,
        kind=task.kind,
        document_id=task.document_id,
        byte_start=task.byte_start,
        byte_end=task.byte_end,
        prompt_ids=tuple(prompt),
        chosen_ids=chosen_ids,
        rejected_ids=worst.token_ids,
        chosen=chosen,
        rejected=worst.text,
        chosen_origin="model" if right else "gold",
    )


def _most_frequent(answers: Sequence[Answer]) -> Answer:
    """The answer sampled most often; among equals the first."""
    return Counter(answers).most_common(1)[0][0]


def write_pairs(pairs: Sequence[Pair], folder: Path) -> Path:
    """One JSON object a line, whole or not at all."""
    path = Path(folder) / PAIRS
    with open_atomic(path) as file:
        for pair in pairs:
            file.write((json.dumps(asdict(pair), ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
    return path


def read_pairs(folder: Path) -> list[Pair]:
    """The pairs that `write_pairs` wrote."""
    path = Path(folder) / PAIRS
    if not path.is_file():
        raise UserError(f"{path}: no such file; it is written by the preference stage")
    return [_from_json(line) for line in path.read_bytes().splitlines()]


def _from_json(line: bytes) -> Pair:
    value = json.loads(line.decode("utf-8", "surrogatepass"))
    ids = {name: tuple(value[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Pair(**{**value, **ids})
