"""Keys and values in pages of 32 tokens, which any sequence may own, share or give back: the memory of an engine.

One pool of pages a layer; which page holds which tokens of whom is said by tables (`ragged.Ragged.tables`), the same for all
layers that forget alike. Values lie transposed, channels down and tokens across, because that is how attention's second
product reads them (`kernels/cpp/paged.h`); so a page is used where it lies and never copied. What is not written yet is zero.
`Int8Pages` keep a byte a number and a scale for each token and head: half the memory, and a rounding of about 0.4 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headspring.models import kernels
from headspring.models.ragged import PAGE, Ragged
from headspring.models.soft_tokens import PlacedVectors
from headspring.models.state import LayerState, ReadingStates

ALIGNMENT = 64  # bytes of a cache line


class Pages:
    """The pool of one layer: keys (P, K, PAGE, C) and values (P, K, C, PAGE). `group`: see `Ragged.tables`. The first pool of a
    model keeps what `fused_block` has made of its layers, so that the one goes with the other."""

    fused: Any = None

    def __init__(
        self, count: int, kv_heads: int, channels: int, dtype: torch.dtype, device: torch.device, group: int | None = None
    ):
        self.group = group
        self.keys = untouched_zeros((count, kv_heads, PAGE, channels), dtype, device)
        self.values = untouched_zeros((count, kv_heads, channels, PAGE), dtype, device)

    def write(self, k: torch.Tensor, v: torch.Tensor, ragged: Ragged) -> None:
        """Store the keys and values (N, K, C) of the row's tokens."""
        kernels.write_pages(k, v, self, ragged.slots(self.group))

    def store(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """The definition of `kernels.write_pages`."""
        pages, places = slots // PAGE, slots % PAGE
        self.keys[pages, :, places], self.values[pages, :, :, places] = k, v

    def gather(self, number: int, ragged: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of one sequence, those of this step included, (1, K, S, C) each."""
        pages, length = self._pages_of(number, ragged)
        keys = self.keys[pages].transpose(0, 1).flatten(1, 2)[:, :length]
        values = self.values[pages].permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
        return keys[None], values[None]

    def gather_several(self, rows: slice, ragged: Ragged, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` keys and values of several sequences, (B, K, length, C) each; what stands behind the end of one
        is anybody's."""
        pages = ragged.tables[self.group][rows, : -(-length // PAGE)].long()
        keys = self.keys[pages].transpose(1, 2).flatten(2, 3)[:, :, :length]
        values = self.values[pages].permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :length]
        return keys, values

    def _pages_of(self, number: int, ragged: Ragged) -> tuple[torch.Tensor, int]:
        length = ragged.past[number] + ragged.counts[number]
        return ragged.tables[self.group][number, : -(-length // PAGE)].long(), length

    def copy(self, source: int, target: int) -> None:
        """Fill one page with what another holds."""
        for pool in self.tensors:
            pool[target] = pool[source]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values

    @property
    def bytes_per_page(self) -> int:
        return sum(pool[0].numel() * pool.element_size() for pool in self.tensors)


class Int8Pages(Pages):
    """The same in a byte a number: x ≈ q · scale, the scale of a token's head being its largest number / 127."""

    def __init__(
        self, count: int, kv_heads: int, channels: int, dtype: torch.dtype, device: torch.device, group: int | None = None
    ):
        super().__init__(count, kv_heads, channels, torch.int8, device, group)
        self.dtype = dtype
        self.key_scales = torch.zeros(count, kv_heads, PAGE, dtype=torch.float32, device=device)
        self.value_scales = torch.zeros(count, kv_heads, PAGE, dtype=torch.float32, device=device)

    def store(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        (k, k_scales), (v, v_scales) = quantized(k), quantized(v)
        super().store(k, v, slots)
        pages, places = slots // PAGE, slots % PAGE
        self.key_scales[pages, :, places], self.value_scales[pages, :, places] = k_scales, v_scales

    def gather(self, number: int, ragged: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
        pages, length = self._pages_of(number, ragged)
        keys, values = super().gather(number, ragged)
        scales = (pool[pages].transpose(0, 1).flatten(1)[:, :length, None] for pool in (self.key_scales, self.value_scales))
        return tuple((whole * scale).to(self.dtype) for whole, scale in zip((keys, values), scales))  # type: ignore[return-value]

    def gather_several(self, rows: slice, ragged: Ragged, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = ragged.tables[self.group][rows, : -(-length // PAGE)].long()
        gathered = zip(super().gather_several(rows, ragged, length), (self.key_scales, self.value_scales))
        keys, values = ((whole * scales[pages].transpose(1, 2).flatten(2)[..., :length, None]) for whole, scales in gathered)
        return keys.to(self.dtype), values.to(self.dtype)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.key_scales, self.value_scales


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory where they are first written: on a CPU the system gives such pages, and torch would fill them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    room = np.zeros(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return torch.from_numpy(room[start : room.size - ALIGNMENT + start]).view(dtype).view(shape)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, K, C) → int8 (N, K, C) and scales (N, K) float32."""
    scales = x.float().abs().amax(-1) / 127
    return (x.float() / scales.clamp(min=1e-30)[..., None]).round().to(torch.int8), scales


@dataclass
class BatchState:
    """The memory of a model for the sequences of one step: a layer has pages, or a state for each sequence; one that reads
    another sequence too has `ReadingStates`. `soft` are vectors that stand in the row in the place of tokens."""

    ragged: Ragged
    layers: Sequence[Pages | Sequence[LayerState] | ReadingStates]
    soft: PlacedVectors | None = None
