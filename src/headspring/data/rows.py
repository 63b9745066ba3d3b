"""Rows that are held in memory, as data for the training loop: each epoch sees every row once, in another order.

`sample(i)` is a pure function of the index, like that of every source, so that a run resumes by one integer. What a batch of
such rows is, `join` says: texts with a label, tokens with a score each, prompts with a picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch

from headspring.artifacts.errors import UserError
from headspring.data.batch import Visit, pad_left
from headspring.data.permutation import Permutation


class Rows:
    """`rows` in an order that `seed` and the epoch decide; `join` makes a batch of some, which has `.to(device)`."""

    def __init__(self, rows: Sequence[Any], join: Callable[[Sequence[Any]], Any], sequence_length: int, seed: int = 0):
        if not rows:
            raise UserError("there are no rows to train on")
        self.rows, self.join, self.sequence_length, self.seed = rows, join, sequence_length, seed

    def sample(self, index: int) -> Any:
        epoch, place = divmod(index, len(self.rows))
        return self.rows[Permutation(len(self.rows), self.seed, epoch)(place)]

    def collate(self, samples: Sequence[Any]) -> Any:
        return self.join(samples)

    def where(self, document_id: str) -> list[Visit]:
        """Rows are of no document."""
        return []


@dataclass
class OnDevice:
    """A batch whose fields are tensors, None, or mappings of tensors."""

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{field.name: _moved(getattr(self, field.name), device) for field in fields(self)})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return None if value is None else value.to(device)


@dataclass
class LabelledBatch(OnDevice):
    """Texts (B, T) int64 with `padding` (B,) pads on the left, and the index of each one's label (B,) int64."""

    inputs: torch.Tensor
    padding: torch.Tensor | None
    labels: torch.Tensor


@dataclass
class ScoredBatch(OnDevice):
    """The same with a score (B, T) float32 for each token, NaN where there is none."""

    inputs: torch.Tensor
    padding: torch.Tensor | None
    scores: torch.Tensor


def join_labelled(rows: Sequence[tuple[np.ndarray, int]]) -> LabelledBatch:
    """Rows are (tokens, label)."""
    inputs, padding = pad_left([tokens for tokens, _ in rows])
    return LabelledBatch(inputs, padding, torch.tensor([label for _, label in rows]))


def join_scored(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> ScoredBatch:
    """Rows are (tokens, scores), as long as each other."""
    inputs, padding = pad_left([tokens for tokens, _ in rows])
    longest = inputs.shape[1]
    scores = [np.pad(scores, (longest - len(scores), 0), constant_values=np.nan) for _, scores in rows]
    return ScoredBatch(inputs, padding, torch.from_numpy(np.stack(scores)).float())
