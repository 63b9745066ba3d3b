"""Positions as a bias on the scores of attention, a number for each head and distance.

A bias sees distances only, so that it is right behind padding, in packed documents and with a cache, where all that has to
be known is which position a key has. The distance form −slope · |query − key| of ALiBi and the form slope · key of some
checkpoints give the same softmax; the first keeps near keys, which matter, near 0, where a low precision is fine.
What biases give up: the scores' bias is a tensor (B or 1, H, T, S), which a fused kernel reads instead of computing.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from headspring.models.context import Context
from headspring.models.part import Cost, ParameterRule, normal
from headspring.models.position.base import Position, PositionModule

SHARED = "shared score bias"


class ALiBi(Position):
    """score − scale · slope · |query − key| (arXiv 2108.12409), with slopes 2^(−steepest·h/H) for heads h = 1 … H where H is a
    power of two. Otherwise the slopes of the power of two below, then every second of those above (BLOOM's and MPT's rule).

    Falcon multiplies the bias with the scores by 1 / sqrt(head_dim): that is `scale`.
    """

    kind: Literal["alibi"] = "alibi"
    steepest: float = Field(8.0, gt=0)
    scale: float = Field(1.0, gt=0)

    def slopes(self, heads: int) -> torch.Tensor:
        """(H,) float32, positive."""
        below = 2 ** math.floor(math.log2(heads))
        exponents = [self.steepest * head / below for head in range(1, below + 1)]
        exponents += [self.steepest * odd / (2 * below) for odd in range(1, 2 * (heads - below), 2)]
        return self.scale * 2.0 ** -torch.tensor(exponents, dtype=torch.float32)

    def build(self, heads: int, channels: int, causal: bool) -> "ALiBiModule":
        return ALiBiModule(self, heads)


class T5Bias(Position):
    """score + table[bucket(key − query), head] (arXiv 1910.10683, section 2.1).

    Half of the `buckets` hold one distance each, the others grow logarithmically up to `max_distance`. Where queries also
    see later keys, one half of the buckets is for those. T5 has one table, in its first layer: `SharedBias` in the others.
    """

    kind: Literal["t5_bias"] = "t5_bias"
    buckets: int = Field(32, ge=4)
    max_distance: int = Field(128, gt=1)

    def build(self, heads: int, channels: int, causal: bool) -> "T5BiasModule":
        exact = self.buckets // 2 if causal else self.buckets // 4
        if self.max_distance <= exact:
            raise ValueError(f"max_distance ({self.max_distance}) must exceed the {exact} distances with a bucket of their own")
        return T5BiasModule(self, heads, causal)


class SharedBias(Position):
    """The score bias of the first layer that has a `T5Bias`."""

    kind: Literal["shared_bias"] = "shared_bias"

    def build(self, heads: int, channels: int, causal: bool) -> "SharedBiasModule":
        return SharedBiasModule(heads)


def buckets_of(relative: torch.Tensor, buckets: int, max_distance: int, causal: bool) -> torch.Tensor:
    """The bucket of each key − query position, int64 → int64. The logarithm is taken in float32, as in the reference."""
    if causal:
        first, distance = torch.zeros_like(relative), (-relative).clamp(min=0)
    else:
        buckets //= 2
        first, distance = buckets * (relative > 0), relative.abs()
    exact = buckets // 2
    spread = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + spread.clamp(min=0).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class ScoreBiasModule(PositionModule):
    """Adds `between` of all queries and keys, which the context then holds under `key`."""

    biased = True

    def bias(self, context: Context) -> torch.Tensor:
        return context.once(self.key, lambda: self.between(context.relative, context))

    def between(self, relative: torch.Tensor, context: Context) -> torch.Tensor:
        raise NotImplementedError


class ALiBiModule(ScoreBiasModule):
    """−slope · distance."""

    def __init__(self, value: ALiBi, heads: int):
        super().__init__()
        self.value, self.heads, self.key = value, heads, f"{value!r} {heads}"

    def prepare(self, context: Context) -> None:
        context.once(f"slopes {self.key}", lambda: self.value.slopes(self.heads).to(context.device))

    def element(self, relative: torch.Tensor, head: torch.Tensor, context: Context) -> torch.Tensor:
        return -context.prepared[f"slopes {self.key}"][head] * relative.abs().float()

    def between(self, relative: torch.Tensor, context: Context) -> torch.Tensor:
        slopes = self.value.slopes(self.heads).to(relative.device)
        return -slopes[:, None, None] * relative.unsqueeze(-3).abs().float()


class T5BiasModule(ScoreBiasModule):
    """A row of `weight` (buckets, H) for each distance."""

    learned = True

    def __init__(self, value: T5Bias, heads: int, causal: bool):
        super().__init__()
        self.value, self.causal = value, causal
        self.weight = nn.Parameter(torch.empty(value.buckets, heads))
        self.key = f"{value!r} {id(self)}"  # tables differ where values are equal

    def rules(self) -> dict[str, ParameterRule]:
        return {"weight": ParameterRule(normal(0.02), "vector")}

    def prepare(self, context: Context) -> None:
        context.once(SHARED, lambda: self)

    def between(self, relative: torch.Tensor, context: Context) -> torch.Tensor:
        places = buckets_of(relative, self.value.buckets, self.value.max_distance, self.causal)
        return nn.functional.embedding(places, self.weight.float()).movedim(-1, -3)

    def element(self, relative: torch.Tensor, head: torch.Tensor, context: Context) -> torch.Tensor:
        return self.weight.float()[buckets_of(relative, self.value.buckets, self.value.max_distance, self.causal), head]

    def cost(self, name: str, vectors: int) -> Cost:
        return Cost(name, self.weight.numel(), shape=f"{self.value.buckets} × {self.weight.shape[1]}")


class SharedBiasModule(ScoreBiasModule):
    """Has the table of a layer before it, and where that has made the whole bias, that."""

    key, learned = SHARED, True

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def prepare(self, context: Context) -> None:
        owner = context.prepared.get(SHARED)
        if owner is None:
            raise ValueError("a shared_bias position needs a layer before it with a t5_bias")
        if owner.weight.shape[1] != self.heads:
            raise ValueError(f"a shared_bias of {self.heads} heads cannot read a t5_bias of {owner.weight.shape[1]}")

    def bias(self, context: Context) -> torch.Tensor:
        return context.prepared[SHARED].bias(context)

    def between(self, relative: torch.Tensor, context: Context) -> torch.Tensor:
        return context.prepared[SHARED].between(relative, context)

    def element(self, relative: torch.Tensor, head: torch.Tensor, context: Context) -> torch.Tensor:
        return context.prepared[SHARED].element(relative, head, context)
