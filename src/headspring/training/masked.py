"""Masked language modelling: the objective of encoders, and how well they do on held-out text.

The sum is that of next-token training, −Σ log p(target) over the targets that are not IGNORE. What differs is the data
(`data.masking`): a target stands at its own place, which the input hides, and not one place later. The loss is therefore
not comparable with a decoder's, and gives no bits per byte: the tokens of a text are guessed from one another.
"""

import math
from collections.abc import Callable

import torch

from headspring.data.batch import IGNORE, collate
from headspring.data.masking import MaskedSamples
from headspring.models.model import ModelModule
from headspring.training.objective import NextToken, held_out_loss


class MaskedTokens(NextToken):
    """Cross-entropy of the tokens that were hidden, each at its own place."""

    needs_causal = False


def masked_validation(
    model: ModelModule, data: MaskedSamples, rows: int, batch_size: int, dtype: torch.dtype, document_mask: bool
) -> Callable[[], dict[str, float]]:
    """A function that measures, over samples 0 … rows − 1, the loss (nats a hidden token), the perplexity, and the share
    of hidden tokens that the model ranks first."""

    def measure() -> dict[str, float]:
        loss = held_out_loss(model, data, rows, batch_size, dtype, document_mask, MaskedTokens())
        right = guessed_right(model, data, rows, batch_size, dtype, document_mask)
        return {"loss": loss, "perplexity": math.exp(min(loss, 80.0)), "accuracy": right}

    return measure


@torch.inference_mode()
def guessed_right(
    model: ModelModule, data: MaskedSamples, rows: int, batch_size: int, dtype: torch.dtype, document_mask: bool
) -> float:
    """The share of hidden tokens whose own logit is the largest."""
    right, count = 0, 0
    with model.computing_in(dtype):
        for start in range(0, rows, batch_size):
            samples = [data.sample(index) for index in range(start, min(start + batch_size, rows))]
            batch = collate(samples, document_mask).to(model.device)
            hidden = batch.targets != IGNORE
            logits = model.logits(model(batch.inputs, segments=batch.segments)[hidden])
            right += int((logits.argmax(-1) == batch.targets[hidden]).sum())
            count += int(hidden.sum())
    return right / max(1, count)
