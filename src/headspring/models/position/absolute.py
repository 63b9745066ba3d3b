"""Absolute positions: a vector for each place, added to the token's embedding.

`Sinusoidal` needs no parameters and no longest sequence: the encoding at an offset k is one linear map of the encoding,
whatever the position (a rotation of each sine–cosine pair; a theorem in the tests). `Learned` is a table that ends.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from headspring.artifacts.value import Variant
from headspring.models.part import Cost, ParameterRule, PartModule, normal


class AbsolutePosition(Variant):
    """Added to the embedding of the token at each position."""

    def build(self, width: int, context: int) -> "AbsolutePositionModule":
        """The module for `width` channels and sequences of up to `context` tokens."""
        raise NotImplementedError


class AbsolutePositionModule(PartModule):
    """positions (B or 1, T) int64 → (B or 1, T, D) float32."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def cost(self, name: str) -> Cost:
        raise NotImplementedError


class Learned(AbsolutePosition):
    """A table with a row for each position (GPT-2, BERT). Position p reads row p + `offset`: 2 in OPT and BART, whose first
    rows are leftovers, and pad + 1 in RoBERTa. `rows` defaults to as many as the model's context needs."""

    kind: Literal["learned"] = "learned"
    rows: int | None = Field(None, gt=0)
    offset: int = Field(0, ge=0)

    def build(self, width: int, context: int) -> "LearnedModule":
        rows = context + self.offset if self.rows is None else self.rows
        if rows < context + self.offset:
            raise ValueError(f"a context of {context} needs {context + self.offset} rows of learned positions, not {rows}")
        return LearnedModule(rows, width, self.offset)


class Sinusoidal(AbsolutePosition):
    """sin(p · θ_i) in channel 2i and cos(p · θ_i) in channel 2i + 1, θ_i = theta^(−2i/D) (arXiv 1706.03762, section 3.5).

    `layout: halves` puts all sines first (Marian, Pegasus). `spacing: inclusive` divides by D/2 − 1, so that the last
    frequency is 1/theta itself (fairseq, Whisper). Position p counts as p + `offset`.
    """

    kind: Literal["sinusoidal"] = "sinusoidal"
    theta: float = Field(10_000.0, gt=1)
    layout: Literal["interleaved", "halves"] = "interleaved"
    spacing: Literal["exclusive", "inclusive"] = "exclusive"
    offset: int = Field(0, ge=0)

    def frequencies(self, width: int) -> torch.Tensor:
        """(D/2,) float64, radians a token."""
        half = width // 2
        steps = half if self.spacing == "exclusive" else half - 1
        return torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(self.theta) / steps))

    def encode(self, positions: torch.Tensor, width: int) -> torch.Tensor:
        """positions (…) int64 → (…, D) float64."""
        angles = (positions + self.offset).double()[..., None] * self.frequencies(width).to(positions.device)
        pairs = angles.sin(), angles.cos()
        return torch.cat(pairs, -1) if self.layout == "halves" else torch.stack(pairs, -1).flatten(-2)

    def build(self, width: int, context: int) -> "SinusoidalModule":
        if width % 2 or width < 4:
            raise ValueError(f"sinusoidal positions need an even width of at least 4, not {width}")
        return SinusoidalModule(self, width, context)


class LearnedModule(AbsolutePositionModule):
    """Rows of `weight` (rows, D)."""

    def __init__(self, rows: int, width: int, offset: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.offset = offset

    def rules(self) -> dict[str, ParameterRule]:
        return {"weight": ParameterRule(normal(0.02), "embedding")}

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(positions + self.offset, self.weight).float()

    def cost(self, name: str) -> Cost:
        rows, width = self.weight.shape
        return Cost(name, rows * width, 1.0 * width, shape=f"{rows} × {width}")


class SinusoidalModule(AbsolutePositionModule):
    """Rows of a table that is computed once, up to the model's context."""

    def __init__(self, value: Sinusoidal, width: int, context: int):
        super().__init__()
        self.table: torch.Tensor
        self.register_buffer("table", value.encode(torch.arange(context), width).float(), persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(positions, self.table)

    def cost(self, name: str) -> Cost:
        return Cost(name, 0, 1.0 * self.table.shape[1], shape="computed")
