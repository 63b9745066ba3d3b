"""Where a token stands: rotary positions (RoPE, arXiv 2104.09864), or none (NoPE).

A position value turns queries and keys that stand at given positions into ones whose product depends on the distance.
"""

from typing import Literal

import torch
from pydantic import Field

from headspring.artifacts.value import Value


class RoPE(Value):
    """Rotate channel pairs (c, c + C/2) of head vectors by position · theta^(−2c/C).

    The pairing of halves is the one of Llama and Qwen in `transformers`.
    """

    kind: Literal["rope"] = "rope"
    theta: float = Field(10_000.0, gt=0)

    def tables(self, positions: int, channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (positions, C/2) float32."""
        exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
        angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), self.theta**-exponents)
        return angles.cos(), angles.sin()


class NoPE(Value):
    """No position: attention sees order only through the causal mask."""

    kind: Literal["nope"] = "nope"
