"""An objective turns a batch into a summed loss. It is the only thing that differs between trainers.

The loop divides by the count of the whole step, over all micro-batches and processes, so that accumulation and
parallelism never change what is optimised.
"""

from typing import Any, Protocol

import torch

from headspring.data.batch import IGNORE
from headspring.models.decoder import DecoderModule
from headspring.models.scoring import cross_entropy_sum


class Objective(Protocol):
    """What `training.loop.train` minimises: Σ loss / Σ count."""

    def count(self, batch: Any) -> int:
        """What the loss of `batch` is averaged over: trained tokens, or pairs."""
        ...

    def loss(self, model: DecoderModule, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The summed loss (scalar, nats) and further summed metrics; the loop divides all of them by the count."""
        ...


class NextToken:
    """Cross-entropy of the next token over targets that are not IGNORE: pretraining and SFT."""

    def count(self, batch: Any) -> int:
        return int((batch.targets != IGNORE).sum())

    def loss(self, model: DecoderModule, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden = model(batch.inputs, segments=batch.segments)
        return cross_entropy_sum(model, hidden, batch.targets), {}
