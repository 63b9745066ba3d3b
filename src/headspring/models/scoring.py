"""The one log-probability path: hidden states → log p(target), for training, evaluation, post-training and serving.

The head's logits are made for `CHUNK` rows at a time and never as a whole: at 8,192 tokens and a vocabulary of 50,000 a
float32 logits tensor would take 1.6 GB. Rows whose target is IGNORE cost nothing: they are left out before the head.

Two functions share one chunk. `cross_entropy_sum` is the training loss: every row has the same weight, so that the
gradient is formed while the chunk is at hand, in place of its logits. `log_probs` gives one value a token and lets each
have its own gradient (DPO needs that); its backward pass makes the chunk again.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from headspring.artifacts.errors import UserError
from headspring.data.batch import IGNORE
from headspring.models import kernels
from headspring.models.kernels.packed import PackedMatrix, pack_bf16

if TYPE_CHECKING:
    from headspring.models.model import ModelModule

CHUNK = 1024


class HasHead(Protocol):
    """A model, as far as scoring is concerned: how hidden states become logits (see `ModelModule`)."""

    @property
    def output_weight(self) -> torch.Tensor | None: ...

    @property
    def output_bias(self) -> torch.Tensor | None: ...

    @property
    def softcap(self) -> float | None: ...

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor: ...


def cross_entropy_sum(model: HasHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Σ −log p(target) in nats, a float32 scalar, over the targets that are not IGNORE.

    hidden (..., D), targets (...) int64. No target at all gives 0, with zero gradients.
    """
    rows, kept = _kept(hidden, targets)
    if model.output_weight is None:
        return -_of_logits(rows, kept).sum()
    return _CrossEntropySum.apply(model.head_input(rows), model.output_weight, model.output_bias, _how(model), kept)


def log_probs(model: HasHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) in nats, (...) float32; 0 where the target is IGNORE. hidden (..., D), targets (...) int64."""
    rows, kept = _kept(hidden, targets)
    if model.output_weight is None:
        values = _of_logits(rows, kept)
    else:
        values = _LogProbs.apply(model.head_input(rows), model.output_weight, model.output_bias, _how(model), kept)
    return torch.zeros(targets.shape, device=hidden.device).masked_scatter(targets != IGNORE, values)


def log_probs_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) in nats, (N,) float32, of logits (N, V) float32 that were made already; by the same sums as `log_probs`."""
    return -_losses_and_gradient(logits.clone(), targets)[0]


def _kept(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows (N, D) and targets (N,) that carry a loss."""
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    keep = flat != IGNORE
    return (rows, flat) if bool(keep.all()) else (rows[keep], flat[keep])


def _of_logits(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) (N,) of rows (N, V) that are logits already: an n-gram model's hidden states are its log-probabilities."""
    return rows.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@dataclass(frozen=True)
class _How:
    """What the head does beside its parameters: a cap on the logits, and the packed matrix of a model that serves."""

    softcap: float | None
    packed: PackedMatrix | None
    learns: bool


def _how(model: HasHead) -> _How:
    packed, learns = getattr(model, "packed_head", None), torch.is_grad_enabled()
    return _How(model.softcap, packed, learns)


class _Head:
    """The head in the dtype of the rows, and the gradients that are summed for it over chunks."""

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: _How, *, learns: bool):
        packed = None if learns and how.packed is not None and how.packed.kind == "bf16" else how.packed
        if learns and packed is not None:
            raise UserError("this model is quantized and cannot be trained: load it again without")
        self.weight = weight if packed is not None else weight.to(rows.dtype)
        self.bias = None if bias is None else bias.to(rows.dtype)
        self.packed, self.softcap = packed, how.softcap
        if self.packed is None and kernels.multiplies_natively(rows):
            self.packed = pack_bf16(self.weight)
        self.grad_weight: torch.Tensor | None = None
        self.grad_bias: torch.Tensor | None = None

    def losses(self, rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """−log p (N,) float32 of a chunk of rows (N, D), and its gradient (N, V) in what the matrix gives."""
        logits = kernels.multiply(rows, self.weight, self.bias, self.packed)
        if self.softcap is None:
            return _losses_and_gradient(logits, targets)
        bounded = torch.tanh(logits.float() / self.softcap)
        slope = 1.0 - bounded.square()
        # Not rounded again, so that the losses are those of `ModelModule.logits`.
        losses, gradient = _losses_and_gradient(self.softcap * bounded, targets)
        return losses, (gradient * slope).to(rows.dtype)

    def add(self, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        """Sum the head's own gradients, in float32."""
        self.grad_weight = kernels.weight_gradient(gradient, rows, self.grad_weight)
        if self.bias is not None:
            bias = gradient.sum(0, dtype=torch.float32)
            self.grad_bias = bias if self.grad_bias is None else self.grad_bias.add_(bias)

    def gradients(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What was summed, in the dtypes of the parameters."""
        for_weight = torch.zeros_like(weight) if self.grad_weight is None else self.grad_weight.to(weight.dtype)
        if bias is None:
            return for_weight, None
        return for_weight, torch.zeros_like(bias) if self.grad_bias is None else self.grad_bias.to(bias.dtype)


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
    def forward(ctx, rows, weight, bias, how, targets):
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        learns = how.learns and any(ctx.needs_input_grad)
        head = _Head(rows, weight, bias, how, learns=learns)
        grad_rows = torch.empty_like(rows) if learns else None
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            losses, gradient = head.losses(chunk, targets[start : start + CHUNK])
            total += losses.sum()
            if grad_rows is not None:
                grad_rows[start : start + CHUNK] = gradient @ head.weight
                head.add(gradient, chunk)
        if learns:
            ctx.save_for_backward(grad_rows, *head.gradients(weight, bias))
        return total

    @staticmethod
    def backward(ctx, gradient):
        scaled = (None if saved is None else saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors)
        return *scaled, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, how, targets):
        head = _Head(rows, weight, bias, how, learns=how.learns and any(ctx.needs_input_grad))
        values = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), CHUNK):
            values[start : start + CHUNK] = -head.losses(rows[start : start + CHUNK], targets[start : start + CHUNK])[0]
        ctx.save_for_backward(rows, weight, bias, targets)
        ctx.how = how
        return values

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, bias, targets = ctx.saved_tensors
        head = _Head(rows, weight, bias, ctx.how, learns=True)
        grad_rows = torch.empty_like(rows)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            _, per_row = head.losses(chunk, targets[start : start + CHUNK])
            per_row = per_row * -gradient[start : start + CHUNK, None].to(per_row.dtype)
            grad_rows[start : start + CHUNK] = per_row @ head.weight
            head.add(per_row, chunk)
        return grad_rows, *head.gradients(weight, bias), None, None


@torch.no_grad()
def divergence(model: "ModelModule", hidden: torch.Tensor, other: "ModelModule", other_hidden: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) in nats (...) float32, of the next token's distribution: p of `model` at hidden (..., D),
    q of `other` at its own hidden states."""
    pairs = zip(*(rows.reshape(-1, rows.shape[-1]).split(CHUNK) for rows in (hidden, other_hidden)), strict=True)
    values = []
    for rows, other_rows in pairs:
        p, q = model.logits(rows).log_softmax(-1), other.logits(other_rows).log_softmax(-1)
        values.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(values).view(hidden.shape[:-1])
