"""Preference pairs as data for the training loop.

Sample i is one pair with the frozen reference's log-probabilities beside it, so that training runs no second model. A
pair's token axis is the chosen row followed by the rejected row, `sequence_length` places each; `where` counts so.
Rows are padded on the right to the longest of their batch: a causal model never looks there. What this gives up: pairs
are not sorted by length, since a sample must depend on its index alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, Visit
from headspring.data.permutation import Epochs
from headspring.posttraining.pairs import Pair


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

    Padding lies on the right, where a causal model never looks; its targets are IGNORE."""
    length = max(len(prompt) + len(answer_ids) for prompt, answer_ids in rows) - 1
    inputs = np.full((len(rows), length), pad_id, dtype=np.int64)
    targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
    for row, (prompt, answer_ids) in enumerate(rows):
        ids = np.array([*prompt, *answer_ids], dtype=np.int64)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class PreferencePairs:
    """A `SampleSource` of pairs: epoch after epoch in a new seeded order, `num_samples` in all (None: one epoch).

    `reference` is (n, 2) float: the frozen reference's log-probability of each pair's chosen and rejected answer.
    Pairs longer than `sequence_length` are dropped and counted."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        reference: np.ndarray,
        pad_id: int,
        sequence_length: int,
        seed: int = 0,
        num_samples: int | None = None,
    ):
        if reference.shape != (len(pairs), 2):
            raise ValueError(f"reference has shape {reference.shape}, expected ({len(pairs)}, 2)")
        kept = [index for index, pair in enumerate(pairs) if pair.length <= sequence_length]
        if not kept:
            raise UserError(f"none of {len(pairs)} pairs fits into {sequence_length} tokens; raise sequence_length")
        self.pairs = [pairs[index] for index in kept]
        self.dropped = len(pairs) - len(kept)
        self.sequence_length = sequence_length
        self._reference, self._pad = reference[kept], pad_id
        self._order = Epochs(len(kept), "pairs", seed)
        self.num_samples = len(kept) if num_samples is None else num_samples

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, index: int) -> PairSample:
        """Pair `index` of the stream; pure, and defined for every index ≥ 0."""
        item = self._order(index)
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
        visits = []
        for item, pair in enumerate(self.pairs):
            if pair.document_id != document_id:
                continue
            for index in self._order.places(item, self.num_samples):
                for start, ids in ((0, pair.chosen_ids), (self.sequence_length, pair.rejected_ids)):
                    end = start + len(pair.prompt_ids) + len(ids) - 1
                    visits.append(Visit(index, start, end, pair.byte_start, pair.byte_end))
        return sorted(visits, key=lambda visit: (visit.sample, visit.start))
