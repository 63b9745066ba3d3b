"""Stretching rotary positions to sequences longer than those of training: how the frequencies θ_i = theta^(−2i/R) change.

| value | frequencies | source |
| --- | --- | --- |
| `Linear` | θ_i / factor | arXiv 2306.15595 |
| `DynamicNTK` | theta grows with the length of the sequence | "dynamically scaled RoPE" (emozilla, 2023) |
| `YaRN` | fast pairs as they are, slow ones / factor, a ramp between; sharper softmax | arXiv 2309.00071 |
| `Llama3` | by wavelength against the context of training, a blend between | arXiv 2407.21783 |
| `LongRoPE` | each pair / a factor found by search, one list for short and one for long sequences | arXiv 2402.13753 |

Two depend on the length of the sequence: a token that makes it longer changes how every earlier one is rotated. The length
is that of each row's or packed document's own tokens (`transformers` takes the longest of the batch, so that a row's result
depends on its neighbours). A state whose memory was made for another length is read anew: see `regime`. Numbers are those of
`transformers` to 1e-6.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from headspring.artifacts.value import Variant

Factor = Annotated[float, Field(ge=1)]
Length = Annotated[int, Field(gt=1)]


def unscaled(theta: float, dims: int, device: torch.device) -> torch.Tensor:
    """theta^(−2i/R) for R = `dims`, (R/2,) float32, radians a token."""
    return 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)


class Scaling(Variant):
    """`multiplier` multiplies cos and sin, and so the scores by its square. `by_length`: frequencies depend on the length."""

    by_length: ClassVar[bool] = False

    @property
    def multiplier(self) -> float:
        return 1.0

    def frequencies(self, theta: float, dims: int, lengths: torch.Tensor) -> torch.Tensor:
        """Radians a token, (…, R/2) float32, in sequences of `lengths` (…) int64 tokens."""
        raise NotImplementedError

    def regime(self, length: int) -> int:
        """Lengths with the same number rotate alike, and share a cache."""
        return 0

    def check(self, dims: int) -> None:
        """Raises `ValueError` where it cannot work with `dims` rotated channels."""


class Linear(Scaling):
    """Positions divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: Factor

    def frequencies(self, theta: float, dims: int, lengths: torch.Tensor) -> torch.Tensor:
        return unscaled(theta, dims, lengths.device) / self.factor


class DynamicNTK(Scaling):
    """theta · (factor · L / L₀ − (factor − 1))^(R / (R − 2)) for sequences of L > L₀ = `original_context` tokens."""

    kind: Literal["dynamic_ntk"] = "dynamic_ntk"
    factor: Factor
    original_context: Length

    by_length: ClassVar[bool] = True

    def frequencies(self, theta: float, dims: int, lengths: torch.Tensor) -> torch.Tensor:
        beyond = lengths.clamp(min=self.original_context).float() / self.original_context
        stretched = theta * (self.factor * beyond - (self.factor - 1)) ** (dims / (dims - 2))
        exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=lengths.device) / dims
        return 1.0 / stretched[..., None] ** exponents

    def regime(self, length: int) -> int:
        return max(length, self.original_context)

    def check(self, dims: int) -> None:
        if dims <= 2:
            raise ValueError(f"dynamic NTK scaling needs more than {dims} rotated channels")


class YaRN(Scaling):
    """Pairs that turn more than `beta_fast` times in `original_context` tokens stay, those below `beta_slow` are divided by
    `factor`, with a linear ramp between; `truncate` rounds the ends of the ramp outwards to whole pairs.

    The attention factor is 0.1 ln(factor) + 1, or with `mscale` and `mscale_all_dim` (DeepSeek, arXiv 2405.04434) the ratio
    (0.1 · mscale · ln(factor) + 1) / (0.1 · mscale_all_dim · ln(factor) + 1).
    """

    kind: Literal["yarn"] = "yarn"
    factor: Factor
    original_context: Length
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    attention_factor: float | None = Field(None, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def multiplier(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.sharpening(self.mscale) / self.sharpening(self.mscale_all_dim)
        return self.sharpening(1.0)

    def sharpening(self, mscale: float) -> float:
        """0.1 · mscale · ln(factor) + 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def frequencies(self, theta: float, dims: int, lengths: torch.Tensor) -> torch.Tensor:
        low, high = (self._pair(turns, theta, dims) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        kept = unscaled(theta, dims, lengths.device)
        pairs = torch.arange(len(kept), dtype=torch.float32, device=lengths.device)
        ramp = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return kept / self.factor * ramp + kept * (1 - ramp)

    def _pair(self, turns: float, theta: float, dims: int) -> float:
        """The pair i, as a real number, that turns `turns` times: θ_i · L₀ = 2π · turns."""
        return dims * math.log(self.original_context / (2 * math.pi * turns)) / (2 * math.log(theta))


class Llama3(Scaling):
    """Wavelengths shorter than `original_context` / `high_frequency_factor` stay, those longer than `original_context` /
    `low_frequency_factor` are stretched by `factor`, with a blend between."""

    kind: Literal["llama3"] = "llama3"
    factor: Factor = 8.0
    low_frequency_factor: float = Field(1.0, gt=0)
    high_frequency_factor: float = Field(4.0, gt=0)
    original_context: Length = 8192

    def frequencies(self, theta: float, dims: int, lengths: torch.Tensor) -> torch.Tensor:
        kept = unscaled(theta, dims, lengths.device)
        turns = self.original_context * kept / (2 * math.pi)  # in the context of training
        low, high = self.low_frequency_factor, self.high_frequency_factor
        share = ((turns - low) / (high - low)).clamp(0, 1) if high != low else (turns > low).float()
        return (1 - share) * kept / self.factor + share * kept


class LongRoPE(Scaling):
    """θ_i divided by `short[i]` in sequences of up to `original_context` tokens, by `long[i]` in longer ones.

    The attention factor defaults to sqrt(1 + ln(factor) / ln(original_context)), in both.
    """

    kind: Literal["longrope"] = "longrope"
    factor: float = Field(gt=0)
    original_context: Length
    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float | None = Field(None, gt=0)

    by_length: ClassVar[bool] = True

    @property
    def multiplier(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context)) if self.factor > 1 else 1.0

    def frequencies(self, theta: float, dims: int, lengths: torch.Tensor) -> torch.Tensor:
        short, long = (torch.tensor(list(factors), device=lengths.device) for factors in (self.short, self.long))
        factors = torch.where((lengths > self.original_context)[..., None], long, short)
        return unscaled(theta, dims, lengths.device) / factors

    def regime(self, length: int) -> int:
        return int(length > self.original_context)

    def check(self, dims: int) -> None:
        pairs = math.ceil(dims / 2)
        for name, factors in (("short", self.short), ("long", self.long)):
            if len(factors) != pairs or min(factors) <= 0:
                raise ValueError(
                    f"longrope needs {pairs} positive {name} factors, one for each rotated pair, not {len(factors)}"
                )
