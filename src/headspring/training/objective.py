"""An objective turns a batch into a summed loss. It is the only thing that differs between trainers.

The loop divides by the count of the whole step, over all micro-batches and processes, so that accumulation and
parallelism never change what is optimised.
"""

from typing import Any, Protocol

import torch

from headspring.artifacts.errors import UserError
from headspring.data.batch import IGNORE, collate
from headspring.models.model import ModelModule
from headspring.models.scoring import cross_entropy_sum


class Objective(Protocol):
    """What `training.loop.train` minimises: Σ loss / Σ count."""

    def count(self, batch: Any) -> int:
        """What the loss of `batch` is averaged over: trained tokens, or pairs."""
        ...

    def loss(self, model: ModelModule, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The summed loss (scalar, nats) and further summed metrics; the loop divides all of them by the count."""
        ...


class NextToken:
    """Cross-entropy of the next token over targets that are not IGNORE: pretraining and SFT, and what an encoder–decoder
    writes about the source of each row."""

    needs_causal = True  # a model that sees what follows would only copy it

    def count(self, batch: Any) -> int:
        return int((batch.targets != IGNORE).sum())

    def loss(self, model: ModelModule, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.needs_causal and not model.config.causal:
            raise UserError(f"a model of kind {model.config.kind!r} sees the next token and cannot be trained to predict it")
        given = getattr(batch, "given", {})
        if given and not model.config.reads_source:
            raise UserError(f"these rows have a source, which a model of kind {model.config.kind!r} cannot read")
        hidden = model(batch.inputs, segments=batch.segments, **given)
        return cross_entropy_sum(model, hidden, batch.targets), {}


@torch.inference_mode()
def held_out_loss(
    model: Any,
    data: Any,
    num_samples: int,
    batch_size: int,
    dtype: torch.dtype,
    document_mask: bool,
    objective: Objective | None = None,
) -> float:
    """Mean loss (default: of the next token), nats a trained token, over samples 0 … num_samples − 1 of `data`, with
    activations in `dtype`."""
    objective, nats, count = objective or NextToken(), 0.0, 0
    join = getattr(data, "collate", None) or (lambda samples: collate(samples, document_mask))
    with model.computing_in(dtype):
        for start in range(0, num_samples, batch_size):
            indices = range(start, min(start + batch_size, num_samples))
            batch = join([data.sample(index) for index in indices]).to(model.device)
            nats += float(objective.loss(model, batch)[0])
            count += objective.count(batch)
    return nats / count
