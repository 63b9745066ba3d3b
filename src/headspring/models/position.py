"""Where a token stands: rotary positions (RoPE, arXiv 2104.09864), or none (NoPE).

A position value turns queries and keys that stand at given positions into ones whose product depends on the distance.
"""

import functools
from typing import Literal

import torch
from pydantic import Field

from headspring.artifacts.value import Variant


class Position(Variant):
    """How attention knows where its queries and keys stand."""


class RoPE(Position):
    """Rotate channel pairs (c, c + C/2) of head vectors by position · theta^(−2c/C).

    The pairing of halves is the one of Llama and Qwen in `transformers`.
    """

    kind: Literal["rope"] = "rope"
    theta: float = Field(10_000.0, gt=0)

    def angles(self, positions: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (B or 1, T, C/2) float32, at positions (B or 1, T) int64 of heads with C channels."""
        angles = positions[..., None].float() * _frequencies(self, channels, positions.device)
        return angles.cos(), angles.sin()


@functools.lru_cache(maxsize=64)
def _frequencies(rope: RoPE, channels: int, device: torch.device) -> torch.Tensor:
    """(C/2,) float32, radians a token."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    return rope.theta**-exponents


class NoPE(Position):
    """No position: attention sees order only through the causal mask."""

    kind: Literal["nope"] = "nope"
