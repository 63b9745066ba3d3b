"""A weight matrix as whole numbers: w[o, i] = scales[o, g] · values[o, i] (+ minimums[o, g]), g = ⌊i / group⌋.

This is what rounding, GPTQ, a GGUF block format and a quantized folder all give, before `packed` puts it in the order in
which a product reads it. It says nothing of how the numbers were found, and nothing of how they are stored:

| from | bits | group | minimums |
| --- | --- | --- | --- |
| int8 by output channel | 8 | all inputs | no |
| int4 | 4 | 16 … 256 | as wanted |
| GGUF Q8_0 · Q5_0 | 8 | 32 | no |
| GGUF Q4_0 | 4 | 32 | no |
| GGUF Q4_1, Q4_K · Q5_1, Q5_K | 4 · 8 | 32 | yes |
| GGUF Q6_K | 8 | 16 | no |

Values are −128 … 127 in 8 bits and −8 … 7 in 4, or 0 … 15 where there are minimums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SIGNED, UNSIGNED = (-8, 7), (0, 15)  # four bits
CHUNK = 1 << 16  # numbers that are worked on together, so that they stay in the cache


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """`values` (O, I) int8, `scales` and `minimums` (O, G) float32, with G a divisor of I."""

    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.values.shape
        return outputs, inputs

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    @property
    def by_channel(self) -> bool:
        """Whether it is plain int8: one scale for each output and nothing else."""
        return self.bits == 8 and self.scales.shape[1] == 1 and self.minimums is None

    @property
    def num_bits(self) -> int:
        """Of all values, scales and minimums, these in float16."""
        numbers = self.scales.numel() * (1 if self.minimums is None else 2)
        return self.values.numel() * self.bits + 16 * numbers

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(O, I), exactly the formula of this file: in float32, rounded after the product and the sum, and then to `dtype`."""
        whole = torch.empty(self.shape, dtype=dtype)
        some = max(1, CHUNK // self.shape[1])
        minimums = [None] * len(whole) if self.minimums is None else self.minimums.split(some)
        for values, scales, minimum, rows in zip(self.values.split(some), self.scales.split(some), minimums, whole.split(some)):
            wide = values.float().unflatten(1, (-1, self.group)).mul_(scales[:, :, None])
            rows.copy_((wide if minimum is None else wide.add_(minimum[:, :, None])).flatten(1))
        return whole

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """(…, I) float32 of outputs (…) int64: what an embedding reads."""
        flat = indices.reshape(-1)
        minimums = None if self.minimums is None else self.minimums[flat]
        chosen = QuantizedMatrix(self.values[flat], self.scales[flat], minimums, self.bits)
        return chosen.dequantized().view(*indices.shape, -1)

    def split(self, sizes: Sequence[int]) -> "list[QuantizedMatrix]":
        """Runs of so many outputs."""
        minimums = [None] * len(sizes) if self.minimums is None else self.minimums.split(list(sizes))
        parts = zip(self.values.split(list(sizes)), self.scales.split(list(sizes)), minimums, strict=True)
        return [QuantizedMatrix(values, scales, minimum, self.bits) for values, scales, minimum in parts]


def beside(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """The inverse of `split`: matrices with the same bits, inputs and groups, their outputs one after the other."""
    minimums = [matrix.minimums for matrix in matrices if matrix.minimums is not None]
    values, scales = torch.cat([matrix.values for matrix in matrices]), torch.cat([matrix.scales for matrix in matrices])
    return QuantizedMatrix(values, scales, torch.cat(minimums) if minimums else None, matrices[0].bits)
