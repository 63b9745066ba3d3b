"""Which experts a token goes to: routers as values, the record of a routing, and what is measured and asked of it.

    logits (B, T, E) float32 → scores → the `top` best, and a weight for each

| family | router |
| --- | --- |
| Switch (arXiv 2101.03961), top = 1 | `SoftmaxRouter(renormalise=False)` |
| Mixtral (2401.04088), Qwen3-MoE with `norm_topk_prob` | `SoftmaxRouter()` |
| GPT-OSS (2508.10925): softmax over the chosen, which is the same function | `SoftmaxRouter(bias=True)` |
| DeepSeek-V3 (2412.19437) | `SigmoidRouter(groups=8, top_groups=4, scale=2.5)` |

`correction` is a number for each expert that is added for the choice and not for the weights. No gradient reaches it: after
each step it moves against the expert's load (arXiv 2408.15664), which balances without a loss that pulls on the model.

The losses are sums over tokens of a quantity that depends on the token's own row alone. A batch in pieces, or on several
processes, therefore has the loss of the whole. What that gives up: balance is asked of every row, where a loss over the
batch would let a row of one subject use few experts (2501.11873). The correction, which sees the load of a whole step, lets it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from headspring.artifacts.value import Variant
from headspring.models import kernels
from headspring.models.part import Cost, ParameterRule, PartModule, constant, normal


class Router(Variant):
    """The value of a router. `correction` lets balancing move the choice."""

    correction: bool = False

    def check(self, experts: int, top: int) -> None:
        """Raise `ValueError` where `top` of `experts` cannot be chosen."""

    def build(self, width: int, experts: int, top: int) -> "RouterModule":
        raise NotImplementedError


class SoftmaxRouter(Router):
    """Weights are softmax probabilities, divided by the sum of those chosen where `renormalise`. `bias` is added to the
    logits."""

    kind: Literal["softmax"] = "softmax"
    renormalise: bool = True
    bias: bool = False

    def build(self, width: int, experts: int, top: int) -> "RouterModule":
        return SoftmaxRouterModule(self, width, experts, top)


class SigmoidRouter(Router):
    """Weights are sigmoids, divided by the sum of those chosen where `renormalise`, times `scale`.

    The experts stand in `groups`; only those of the `top_groups` best groups can be chosen, where a group is as good as its
    two best experts together.
    """

    kind: Literal["sigmoid"] = "sigmoid"
    renormalise: bool = True
    scale: float = Field(1.0, gt=0)
    groups: int = Field(1, gt=0)
    top_groups: int = Field(1, gt=0)
    correction: bool = True

    def check(self, experts: int, top: int) -> None:
        each = experts // self.groups
        if experts % self.groups:
            raise ValueError(f"experts ({experts}) must be a multiple of groups ({self.groups})")
        if self.top_groups > self.groups or top > self.top_groups * each:
            raise ValueError(f"top ({top}) experts cannot come from {self.top_groups} of {self.groups} groups of {each}")
        if self.groups > 1 and each < 2:
            raise ValueError("a group is judged by its two best experts: it needs two at least")

    def build(self, width: int, experts: int, top: int) -> "RouterModule":
        return SigmoidRouterModule(self, width, experts, top)


@dataclass(frozen=True)
class Routing:
    """Where tokens went. `logits` and `probabilities` (B, T, E) float32, the latter with sum 1; `chosen` (B, T, K) int64 with
    their `weights` (B, T, K) float32; `kept` (B, T, K) bool is False where an expert was full, None where none was."""

    logits: torch.Tensor
    probabilities: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    kept: torch.Tensor | None = None

    def load(self, counted: torch.Tensor) -> torch.Tensor:
        """(E,) float32: how often each expert was chosen by the tokens that are `counted` (B, T) bool."""
        return self._row_load(counted).sum(0)

    def _row_load(self, counted: torch.Tensor) -> torch.Tensor:
        """(B, E) float32."""
        batch, _, experts = self.logits.shape
        ones = counted[..., None].expand_as(self.chosen).flatten(1).float()
        return ones.new_zeros(batch, experts).scatter_add_(1, self.chosen.flatten(1), ones)

    def balance_loss(self, counted: torch.Tensor) -> torch.Tensor:
        """Σ over tokens of E · Σ_e f_e P_e of their row: f_e the share of the row's choices that fell on expert e, with sum 1,
        and P_e its mean probability (arXiv 2101.03961 eq. 4; by row as in 2412.19437 eq. 17). A balanced token gives 1."""
        tokens = counted.sum(1, keepdim=True).float()
        share = self._row_load(counted) / (tokens * self.chosen.shape[-1]).clamp(min=1)
        probability = (self.probabilities * counted[..., None]).sum(1)  # n · P
        return self.logits.shape[-1] * (share * probability).sum()

    def z_loss(self, counted: torch.Tensor) -> torch.Tensor:
        """Σ over tokens of (log Σ_e exp logit_e)², which keeps logits small (arXiv 2202.08906 eq. 5)."""
        return (self.logits.logsumexp(-1).square() * counted).sum()

    def entropy(self, counted: torch.Tensor) -> torch.Tensor:
        """Σ over tokens of the entropy of their probabilities, in nats: log E where the router has no preference."""
        return (torch.special.entr(self.probabilities).sum(-1) * counted).sum()

    def dropped(self, counted: torch.Tensor) -> torch.Tensor:
        """Σ over tokens of the share of their choices that found the expert full."""
        if self.kept is None:
            return self.logits.new_zeros(())
        return ((~self.kept).float().mean(-1) * counted).sum()


class RouterModule(PartModule):
    """x (B, T, D) → logits (B, T, E) float32 → `Routing`."""

    def __init__(self, value: Router, width: int, experts: int, top: int, bias: bool = False):
        super().__init__()
        self.top = top
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts)) if bias else None
        self.correction = nn.Buffer(torch.zeros(experts)) if value.correction else None

    def rules(self) -> dict[str, ParameterRule]:
        width = self.weight.shape[1]
        rules = {"weight": ParameterRule(normal(width**-0.5), "matrix", inputs=width)}
        if self.bias is not None:
            rules["bias"] = ParameterRule(constant(0.0), "vector")
        return rules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        if kernels.multiplies_natively(x):  # a token's logits must not depend on how many stand beside it
            return _Logits.apply(x, self.weight.float(), bias)
        return nn.functional.linear(x.float(), self.weight.float(), bias)

    def route(self, logits: torch.Tensor) -> Routing:
        """Choose experts and weigh them."""
        scores = self.scores(logits)
        wanted = scores.detach() if self.correction is None else scores.detach() + self.correction
        chosen = self.choose(wanted)
        return Routing(logits, self.probabilities(scores), chosen, self.weights(scores.gather(-1, chosen)))

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """How good each expert is, (B, T, E)."""
        raise NotImplementedError

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores with sum 1."""
        return scores

    def choose(self, wanted: torch.Tensor) -> torch.Tensor:
        """The `top` best of scores (B, T, E), (B, T, K) int64."""
        return wanted.topk(self.top, dim=-1).indices

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """What the outputs of the chosen are multiplied with, from their scores, both (B, T, K)."""
        raise NotImplementedError

    def cost(self, name: str) -> Cost:
        experts, width = self.weight.shape
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return Cost(name, parameters, 2.0 * experts * width, 4.0 * (width + experts), 0.0, f"{self.top} of {experts}")


class _Logits(torch.autograd.Function):
    """x (..., D) bfloat16, weight (E, D) and bias (E,) or None float32 → (..., E) float32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return kernels.built().router_logits(x.contiguous(), weight.contiguous(), bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return (gradient @ weight).to(x.dtype), flat.T @ x.flatten(0, -2).float(), grad_bias


class SoftmaxRouterModule(RouterModule):
    def __init__(self, value: SoftmaxRouter, width: int, experts: int, top: int):
        super().__init__(value, width, experts, top, bias=value.bias)
        self.renormalise = value.renormalise

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        return normalised(scores) if self.renormalise else scores


class SigmoidRouterModule(RouterModule):
    def __init__(self, value: SigmoidRouter, width: int, experts: int, top: int):
        super().__init__(value, width, experts, top)
        self.value = value

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        return normalised(scores)

    def choose(self, wanted: torch.Tensor) -> torch.Tensor:
        if self.value.groups > 1:
            groups = wanted.unflatten(-1, (self.value.groups, -1))
            best = groups.topk(2, dim=-1).values.sum(-1).topk(self.value.top_groups, dim=-1).indices
            open_groups = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            wanted = groups.masked_fill(~open_groups[..., None], -math.inf).flatten(-2)
        return super().choose(wanted)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        return (normalised(scores) if self.value.renormalise else scores) * self.value.scale


def normalised(scores: torch.Tensor) -> torch.Tensor:
    """Scores divided by their sum, which 1e-20 keeps from being 0."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def within_capacity(chosen: torch.Tensor, experts: int, factor: float) -> torch.Tensor:
    """(B, T, K) bool: whether an expert still had room for a token in its row, chosen (B, T, K) int64.

    Each expert takes ceil(factor · T · K / E) tokens of a row, the earliest first, so that no token's fate depends on later
    ones (first choices before second ones, as in arXiv 2006.16668, would let it).
    """
    _, time, top = chosen.shape
    limit = math.ceil(factor * time * top / experts)
    taken = nn.functional.one_hot(chosen.flatten(1), experts).cumsum(1)  # (B, T·K, E)
    place = taken.gather(-1, chosen.flatten(1)[..., None])
    return (place <= limit).view_as(chosen)
