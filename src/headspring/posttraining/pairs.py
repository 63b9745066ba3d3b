"""Preference pairs that a model makes itself: its right answer against its wrong answer to the same question.

The model answers each training task several times; the tasks' own rule says which answers are right. A task whose
answers are all right or all wrong teaches no preference and is skipped, and counted. Where the model is never right the
gold answer may stand in as chosen (`gold_as_chosen`); such a pair says so, for it is not a sample of the policy.
The rejected answer is the wrong one the model gives most often.

`PreferencePairs` is the data for the training loop: sample i is one pair, with the reference's log-probabilities beside
it. A pair's token axis is the chosen row followed by the rejected row, `sequence_length` places each; `where` counts so.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from headspring.artifacts import UserError
from headspring.artifacts.files import open_atomic
from headspring.data.batch import IGNORE, Visit
from headspring.data.permutation import Permutation, permutation
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
        raise UserError(f"no preference pair among {len(asked)} tasks: {report.all_right} always right, the rest always wrong; {hint}")
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


@dataclass(frozen=True)
class PairSample:
    """One pair with the reference's summed log-probabilities of its two answers (natural logarithm)."""

    pair: Pair
    reference_chosen: float
    reference_rejected: float


@dataclass
class PairBatch:
    """P pairs as 2P rows, the chosen ones first; padded on the right to T."""

    inputs: torch.Tensor  # (2P, T) int64
    targets: torch.Tensor  # (2P, T) int64, IGNORE outside the answers
    reference: torch.Tensor  # (2P,) float32

    @property
    def pairs(self) -> int:
        return self.inputs.shape[0] // 2

    def to(self, device: torch.device | str) -> "PairBatch":
        return PairBatch(self.inputs.to(device), self.targets.to(device), self.reference.to(device))


def pad_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, answer) rows as inputs and answer-only targets, (B, T) int64 each, T the longest row's inputs.

    A causal model never looks right, so padding there needs no mask; its targets are IGNORE."""
    length = max(len(prompt) + len(answer_ids) for prompt, answer_ids in rows) - 1
    inputs = np.full((len(rows), length), pad_id, dtype=np.int64)
    targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
    for row, (prompt, answer_ids) in enumerate(rows):
        ids = np.array([*prompt, *answer_ids], dtype=np.int64)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class PreferencePairs:
    """A `SampleSource` of pairs: epoch after epoch in a new seeded order, `num_samples` in all.

    `reference` is (n, 2) float: the frozen reference's log-probability of each pair's chosen and rejected answer.
    Pairs longer than `sequence_length` are dropped and counted. The rows of a batch are chosen to be of any length:
    sorting them would make a sample depend on more than its index."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        reference: np.ndarray,
        pad_id: int,
        sequence_length: int,
        seed: int = 0,
        num_samples: int | None = None,
        epochs: int | None = None,
    ):
        if (num_samples is None) == (epochs is None):
            raise ValueError("give num_samples or epochs, one of the two")
        if reference.shape != (len(pairs), 2):
            raise ValueError(f"reference has shape {reference.shape}, expected ({len(pairs)}, 2)")
        kept = [index for index, pair in enumerate(pairs) if pair.length <= sequence_length]
        if not kept:
            raise UserError(f"none of {len(pairs)} pairs fits into {sequence_length} tokens; raise sequence_length")
        self.pairs = [pairs[index] for index in kept]
        self.dropped = len(pairs) - len(kept)
        self.sequence_length, self.seed = sequence_length, seed
        self._reference, self._pad = reference[kept], pad_id
        self.num_samples = num_samples if num_samples is not None else (epochs or 0) * len(self.pairs)

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, index: int) -> PairSample:
        """Pair `index` of the stream; pure, and defined for every index ≥ 0."""
        epoch, place = divmod(index, len(self.pairs))
        item = self._order(epoch)(place)
        chosen, rejected = self._reference[item].tolist()
        return PairSample(self.pairs[item], chosen, rejected)

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        """The pairs' chosen rows, then their rejected rows."""
        pairs = [sample.pair for sample in samples]
        rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
        rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
        reference = [sample.reference_chosen for sample in samples] + [sample.reference_rejected for sample in samples]
        return PairBatch(*pad_rows(rows, self._pad), torch.tensor(reference, dtype=torch.float32))

    def where(self, document_id: str) -> list[Visit]:
        """Every visit among the `num_samples` samples, two a sample: the chosen row's inputs and the rejected row's."""
        epochs = -(-self.num_samples // len(self.pairs))
        visits = []
        for item, pair in enumerate(self.pairs):
            if pair.document_id != document_id:
                continue
            samples = [epoch * len(self.pairs) + self._order(epoch).inverse(item) for epoch in range(epochs)]
            for index in (sample for sample in samples if sample < self.num_samples):
                for start, ids in ((0, pair.chosen_ids), (self.sequence_length, pair.rejected_ids)):
                    end = start + len(pair.prompt_ids) + len(ids) - 1
                    visits.append(Visit(index, start, end, pair.byte_start, pair.byte_end))
        return sorted(visits, key=lambda visit: (visit.sample, visit.start))

    def _order(self, epoch: int) -> Permutation:
        return permutation(len(self.pairs), "pairs", self.seed, epoch)
