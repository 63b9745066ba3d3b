"""The one log-probability path: hidden states → log p(target), for training, evaluation, post-training and serving.

The head's logits are made for `CHUNK` rows at a time and never as a whole: at 8,192 tokens and a vocabulary of 50,000 a
float32 logits tensor would take 1.6 GB. Rows whose target is IGNORE cost nothing: they are left out before the head.

Two functions share one chunk. `cross_entropy_sum` is the training loss: every row has the same weight, so that the
gradient is formed while the chunk is at hand, in place of its logits. `log_probs` gives one value a token and lets each
have its own gradient (DPO needs that); its backward pass makes the chunk again.
"""

from typing import Protocol

import torch

from headspring.data.batch import IGNORE
from headspring.models import kernels

CHUNK = 1024


class HasHead(Protocol):
    """A model, as far as scoring is concerned: the matrix (V, D) that turns hidden states into logits."""

    @property
    def output_weight(self) -> torch.Tensor: ...


def cross_entropy_sum(model: HasHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Σ −log p(target) in nats, a float32 scalar, over the targets that are not IGNORE.

    hidden (..., D), targets (...) int64. No target at all gives 0, with zero gradients.
    """
    rows, kept = _kept(hidden, targets)
    return _CrossEntropySum.apply(rows, model.output_weight, kept)


def log_probs(model: HasHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) in nats, (...) float32; 0 where the target is IGNORE. hidden (..., D), targets (...) int64."""
    rows, kept = _kept(hidden, targets)
    values = _LogProbs.apply(rows, model.output_weight, kept)
    return torch.zeros(targets.shape, device=hidden.device).masked_scatter(targets != IGNORE, values)


def _kept(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows (N, D) and targets (N,) that carry a loss."""
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    keep = flat != IGNORE
    return (rows, flat) if bool(keep.all()) else (rows[keep], flat[keep])


def _losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """−log p (N,) float32 and softmax − one-hot (N, V) in the dtype of `logits`, whose memory may be reused."""
    if kernels.use_native(logits):
        losses = kernels.built().cross_entropy(logits, targets, 1.0)
        return losses, logits
    wide = logits.float()
    log_normaliser = wide.logsumexp(-1, keepdim=True)
    losses = (log_normaliser - wide.gather(-1, targets[:, None])).squeeze(-1)
    gradient = (wide - log_normaliser).exp()
    gradient[torch.arange(len(targets), device=logits.device), targets] -= 1.0
    return losses, gradient.to(logits.dtype)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets):
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        narrow = weight.to(rows.dtype)
        if not any(ctx.needs_input_grad[:2]):
            for start in range(0, len(rows), CHUNK):
                logits = rows[start : start + CHUNK] @ narrow.T
                total += _losses_and_gradient(logits, targets[start : start + CHUNK])[0].sum()
            return total
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            losses, gradient = _losses_and_gradient(chunk @ narrow.T, targets[start : start + CHUNK])
            total += losses.sum()
            grad_rows[start : start + CHUNK] = gradient @ narrow
            grad_weight += gradient.T @ chunk
        ctx.save_for_backward(grad_rows, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, gradient):
        grad_rows, grad_weight = ctx.saved_tensors
        return grad_rows * gradient.to(grad_rows.dtype), grad_weight * gradient.to(grad_weight.dtype), None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets):
        narrow = weight.to(rows.dtype)
        values = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), CHUNK):
            logits = rows[start : start + CHUNK] @ narrow.T
            values[start : start + CHUNK] = -_losses_and_gradient(logits, targets[start : start + CHUNK])[0]
        ctx.save_for_backward(rows, weight, targets)
        return values

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, targets = ctx.saved_tensors
        narrow = weight.to(rows.dtype)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            _, per_row = _losses_and_gradient(chunk @ narrow.T, targets[start : start + CHUNK])
            per_row = per_row * -gradient[start : start + CHUNK, None].to(per_row.dtype)
            grad_rows[start : start + CHUNK] = per_row @ narrow
            grad_weight += per_row.T @ chunk
        return grad_rows, grad_weight.to(weight.dtype), None
