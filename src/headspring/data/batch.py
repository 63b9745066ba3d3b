"""What every trainer's data has in common: samples that are a pure function of their index, and their exact inverse.

`sample(i)` depends on the config and `i` alone. Step `s` of a run with batches of `B` samples trains on samples
`s·B … s·B + B − 1`, however many processes share the work, so that resuming needs one integer.
`where(document)` is the inverse: every place at which a document's tokens are a sample's inputs or targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

IGNORE = -100  # a target that carries no loss; PyTorch's own convention


@dataclass(frozen=True)
class Sample:
    """One row of a batch, T tokens long. `targets[t]` is what follows `inputs[t]`, or IGNORE."""

    inputs: np.ndarray  # (T,) int64
    targets: np.ndarray  # (T,) int64
    segments: np.ndarray  # (T,) int32: which packed document each input belongs to, 0 … n − 1


@dataclass(frozen=True)
class Visit:
    """Tokens `start … end − 1` of sample `sample` are bytes `byte_start … byte_end − 1` of a document's text."""

    sample: int
    start: int
    end: int
    byte_start: int
    byte_end: int


class SampleSource(Protocol):
    """Data for the training loop."""

    sequence_length: int

    def sample(self, index: int) -> Sample: ...

    def where(self, document_id: str) -> list[Visit]:
        """All visits among the samples of this run, in order of sample. A removed duplicate has its survivor's visits."""
        ...


@dataclass
class Batch:
    """Samples stacked: B rows of T tokens. `segments` is None where documents may see each other."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    segments: torch.Tensor | None = None  # (B, T) int32

    def to(self, device: torch.device | str) -> "Batch":
        segments = None if self.segments is None else self.segments.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), segments)


def collate(samples: Sequence[Sample], document_mask: bool) -> Batch:
    """Stack samples of equal length."""
    inputs = torch.from_numpy(np.stack([sample.inputs for sample in samples]))
    targets = torch.from_numpy(np.stack([sample.targets for sample in samples]))
    segments = torch.from_numpy(np.stack([sample.segments for sample in samples])) if document_mask else None
    return Batch(inputs, targets, segments)
