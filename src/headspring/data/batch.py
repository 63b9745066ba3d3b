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
    """One row of a batch, T tokens long. `targets[t]` is what follows `inputs[t]`, or IGNORE. For an encoder–decoder,
    `source` is what the row is written about."""

    inputs: np.ndarray  # (T,) int64
    targets: np.ndarray  # (T,) int64
    segments: np.ndarray  # (T,) int32: which packed document each input belongs to, 0 … n − 1
    source: np.ndarray | None = None  # (M,) int64


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
    """Samples stacked: B rows of T tokens. `segments` is None where documents may see each other. `source` are the rows'
    sources, if they have any, and `source_padding` the pads at the left of each, None where none has any."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    segments: torch.Tensor | None = None  # (B, T) int32
    source: torch.Tensor | None = None  # (B, M) int64
    source_padding: torch.Tensor | None = None  # (B,) int64

    @property
    def given(self) -> dict[str, torch.Tensor]:
        """What a model's forward takes beside the tokens and their segments; nothing for rows without a source."""
        sides = {"source": self.source, "source_padding": self.source_padding}
        return {name: tensor for name, tensor in sides.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "Batch":
        beside = (None if side is None else side.to(device) for side in (self.segments, self.source, self.source_padding))
        return Batch(self.inputs.to(device), self.targets.to(device), *beside)


def collate(samples: Sequence[Sample], document_mask: bool) -> Batch:
    """Stack samples of equal length; their sources may differ in length."""
    inputs = torch.from_numpy(np.stack([sample.inputs for sample in samples]))
    targets = torch.from_numpy(np.stack([sample.targets for sample in samples]))
    segments = torch.from_numpy(np.stack([sample.segments for sample in samples])) if document_mask else None
    sources = [sample.source for sample in samples if sample.source is not None]
    if not sources:
        return Batch(inputs, targets, segments)
    assert len(sources) == len(samples), "some rows of a batch have a source and some have none"
    return Batch(inputs, targets, segments, *pad_left(sources))


def pad_left(rows: Sequence[np.ndarray], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows (B, T) int64 that end together, and how many pads each begins with, (B,) int64; None where no row has any."""
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    stacked = np.stack([np.pad(row, (longest - len(row), 0), constant_values=pad) for row in rows])
    return torch.from_numpy(stacked), padding if bool(padding.any()) else None
