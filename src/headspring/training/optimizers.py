"""AdamW for everything, or Muon for the hidden matrices with AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; arXiv 2502.16982) replaces a matrix's momentum by the
nearest semi-orthogonal matrix, found by five Newton–Schulz steps. Matrices of one shape are stacked and orthogonalised as
one batch of products, which on a CPU is several times faster than one by one. Which parameter belongs where is not guessed
from its name: the model's `rules_by_name` says so, and a parameter in no group is an error.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from headspring.artifacts.value import Value
from headspring.models import kernels
from headspring.models.model import ModelModule

Rate = Annotated[float, Field(gt=0)]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the quintic iteration


class AdamW(Value):
    """Decoupled weight decay (arXiv 1711.05101), on matrices and embeddings only."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = Field(0.1, ge=0)


class Muon(Value):
    """Muon for matrices at `learning_rate`; AdamW for embeddings, head and vectors at their own rates.

    The update of an (m, n) matrix is scaled by sqrt(max(1, m / n)), so that one rate serves every shape.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: Rate = 0.02
    momentum: float = Field(0.95, ge=0, lt=1)
    newton_schulz_steps: int = Field(5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    embedding_rate: Rate = 0.01
    head_rate: Rate = 0.004
    vector_rate: Rate = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-10


OptimizerConfig = Annotated[AdamW | Muon, Field(discriminator="kind")]


def build_optimizers(model: ModelModule, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Optimizers that together hold every trainable parameter exactly once."""
    groups: dict[str, list[nn.Parameter]] = defaultdict(list)
    multipliers: dict[nn.Parameter, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = model.rules_by_name[name]
            groups[rule.group].append(parameter)
            multipliers[parameter] = rule.rate
    if isinstance(config, AdamW):
        decayed = [*groups["matrix"], *groups["embedding"], *groups["head"]]
        rate, decay = config.learning_rate, config.weight_decay
        optimizers: list[torch.optim.Optimizer] = [
            _adamw([(decayed, rate, decay), (groups["vector"], rate, 0.0)], multipliers, config.betas, config.epsilon)
        ]
    else:
        rates = {"embedding": config.embedding_rate, "head": config.head_rate, "vector": config.vector_rate}
        rest = [(groups[name], rate, 0.0) for name, rate in rates.items()]
        optimizers = [_adamw(rest, multipliers, config.betas, config.epsilon)]
        if groups["matrix"]:
            optimizers.append(MuonOptimizer(groups["matrix"], config))
    _assert_complete(model, optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _adamw(
    groups: Iterable[tuple[list[nn.Parameter], float, float]], multipliers: dict[nn.Parameter, float], betas, epsilon
) -> torch.optim.AdamW:
    """One group of settings for each rate. The decay of a step, rate · weight_decay, does not depend on the multiplier."""
    settings = []
    for params, rate, decay in groups:
        for multiplier in sorted({multipliers[p] for p in params}, reverse=True):
            same = [p for p in params if multipliers[p] == multiplier]
            settings.append({"params": same, "lr": rate * multiplier, "weight_decay": decay / multiplier})
    return torch.optim.AdamW(settings, betas=betas, eps=epsilon, fused=True)


def _assert_complete(model: ModelModule, optimizers: list[torch.optim.Optimizer]) -> None:
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held)) and set(held) == wanted, "the optimizers' parameters are not the model's"


class MuonOptimizer(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. Matrices (m, n) of equal shape are updated together; (E, m, n) are E of them."""

    def __init__(self, parameters: list[nn.Parameter], config: Muon):
        defaults = {
            "lr": config.learning_rate,
            "momentum": config.momentum,
            "steps": config.newton_schulz_steps,
            "weight_decay": config.weight_decay,
        }
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            shapes[parameter.shape].append(parameter)
        super().__init__([{"params": same} for same in shapes.values()], defaults)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for parameter in params:
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            rows, columns = params[0].shape[-2:]
            keep = 1 - group["lr"] * group["weight_decay"]
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            whole = [(p.data, p.grad.contiguous(), self.state[p]["momentum"]) for p in params if p.grad is not None]
            # A stack of matrices (an expert each) is that many matrices.
            views = [[x.view(-1, rows, columns) for x in three] for three in whole]
            matrices = [(p, g, m) for three in views for p, g, m in zip(*three, strict=True)]
            update = _update_natively if _has_native(matrices) else _update_plainly
            update(matrices, group["steps"], group["momentum"], keep, rate)


Matrices = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # of each its value, gradient and momentum


def _update_plainly(matrices: Matrices, steps: int, momentum: float, keep: float, rate: float) -> None:
    """value ← keep · value − rate · orthogonalised momentum: the definition of a step."""
    values, gradients, sums = (list(column) for column in zip(*matrices))
    torch._foreach_lerp_(sums, gradients, 1 - momentum)
    directions = orthogonalise(torch.stack(torch._foreach_lerp(gradients, sums, momentum)), steps)
    if keep != 1:
        torch._foreach_mul_(values, keep)
    torch._foreach_add_(values, list(directions.to(values[0].dtype)), alpha=-rate)


def _has_native(matrices: Matrices) -> bool:
    whole = all(tensor.is_contiguous() and tensor.dtype == torch.float32 for matrix in matrices for tensor in matrix)
    return whole and kernels.use_products(matrices[0][0], *matrices[0][0].shape, dtype=torch.float32)


def _update_natively(matrices: Matrices, steps: int, momentum: float, keep: float, rate: float) -> None:
    """The same as one operator: a matrix stays in the cache from its gradient to its new value."""
    kernels.built().muon(matrices, NEWTON_SCHULZ, steps, momentum, keep, rate)


def orthogonalise(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly, of (N, m, n): singular values near 1. Computed in bfloat16.

    The quintic iteration X ← aX + (bA + cA²)X with A = XXᵀ, and the coefficients of Jordan et al., which trade exactness
    (singular values end within about 0.7 … 1.2) for speed near zero.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
