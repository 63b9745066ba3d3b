"""Rotary positions (RoPE, arXiv 2104.09864): turn channel pairs by an angle that grows with the position.

The product of a query rotated by m·θ and a key rotated by n·θ depends on m − n alone. Pairs are (c, c + R/2) of the R
channels that are rotated, the pairing of `transformers`; files in which neighbours are pairs are read by permuting rows of
the query and key matrices, so that one kernel serves all. What it gives up: angles beyond those of training are new to the
model, which is what a `Scaling` is for.
"""

import functools
import math
from typing import Literal

import torch
from pydantic import Field

from headspring.models import kernels
from headspring.models.context import Context
from headspring.models.part import Cost
from headspring.models.position.base import Position, PositionModule
from headspring.models.position.scaling import Scaling, unscaled


class RoPE(Position):
    """Rotate channel pairs of head vectors by position · theta^(−2c/R).

    `fraction` of the C channels of a head are rotated, the first R = ⌊C · fraction⌋ (an odd R takes one channel more, as in
    `transformers`); the others pass unchanged. `scaling` stretches the rotation to sequences longer than those of training.
    """

    kind: Literal["rope"] = "rope"
    theta: float = Field(10_000.0, gt=0)
    fraction: float = Field(1.0, gt=0, le=1)
    scaling: Scaling | None = None

    def dims(self, channels: int) -> int:
        """R, as it stands in the exponent; may be odd."""
        return int(channels * self.fraction)

    def rotated(self, channels: int) -> int:
        """How many of a head's channels are rotated: R, or the next even number."""
        return 2 * math.ceil(self.dims(channels) / 2)

    def angles(
        self, positions: torch.Tensor, channels: int, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (B or 1, T, R/2) float32, at positions (B or 1, T) int64 of heads with C channels.

        `lengths` (B or 1, T or 1) are the numbers of tokens of the sequences that they stand in (`Context.lengths`), for a
        scaling that depends on it; by default a row ends with its highest position. The attention factor of a scaling
        multiplies both.
        """
        if self.scaling is not None and self.scaling.by_length:
            lengths = positions.amax(-1, keepdim=True) + 1 if lengths is None else lengths
            frequencies = self.scaling.frequencies(self.theta, self.dims(channels), lengths)
        else:
            frequencies = _fixed(self, channels, positions.device)
        angles = positions[..., None].float() * frequencies
        factor = 1.0 if self.scaling is None else self.scaling.multiplier
        return (angles.cos(), angles.sin()) if factor == 1.0 else (angles.cos() * factor, angles.sin() * factor)

    def check(self, channels: int) -> None:
        """Raises `ValueError` where heads of `channels` channels cannot be rotated in pairs."""
        if self.dims(channels) < 2 or self.rotated(channels) > channels:
            raise ValueError(
                f"rotary positions turn pairs: {self.dims(channels)} of {channels} channels (fraction {self.fraction:g}) "
                "cannot be; take an even head_dim or another fraction"
            )
        if self.scaling is not None:
            self.scaling.check(self.dims(channels))

    def build(self, heads: int, channels: int, causal: bool) -> "RoPEModule":
        return RoPEModule(self, channels)


class RoPEModule(PositionModule):
    """Rotates queries and keys."""

    def __init__(self, value: RoPE, channels: int):
        super().__init__()
        value.check(channels)
        self.value, self.channels, self.rotated = value, channels, value.rotated(channels)
        self.key = f"{value!r} {channels}"
        self.by_length = value.scaling is not None and value.scaling.by_length

    def regime(self, length: int) -> int:
        return 0 if self.value.scaling is None else self.value.scaling.regime(length)

    def prepare(self, context: Context) -> None:
        context.once(self.key, lambda: self.value.angles(context.positions, self.channels, context.lengths))

    def rotation(self, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        return context.prepared[self.key]

    @property
    def fuses(self) -> bool:
        return self.rotated == self.channels

    def place(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        cos, sin = context.prepared[self.key]
        if self.rotated == x.shape[-1]:
            return kernels.rotate(x, cos, sin)
        turned = kernels.rotate(x[..., : self.rotated], cos, sin)
        return torch.cat([turned, x[..., self.rotated :]], dim=-1)

    def cost(self, name: str, vectors: int) -> Cost:
        return Cost(name, 0, 3.0 * vectors * self.rotated)


@functools.lru_cache(maxsize=64)
def _fixed(rope: RoPE, channels: int, device: torch.device) -> torch.Tensor:
    """(R/2,) float32, radians a token, where they do not depend on the length."""
    dims = rope.dims(channels)
    if rope.scaling is None:
        return unscaled(rope.theta, dims, device)
    return rope.scaling.frequencies(rope.theta, dims, torch.zeros((), dtype=torch.int64, device=device))
