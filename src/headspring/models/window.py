"""The memory of a sliding window: the first few keys and values of a row and its last ones, however long the text is.

    places   0 1 2 …………………… 93 94 95 96 97 98       window 4, 2 sinks, 98 tokens read
    kept     ■ ■             ■  ■  ■  ■  ■            `base` = 93: the window, and some before it to rewind to

The last tokens lie in a buffer of twice the window. Where it is full, what is still needed moves to its front: a copy of a
window for each window of tokens, and every call gives a view. A rewind that goes back further than the buffer reads the row
again from its start (`State.rewind`), which is right and slow; up to `SPARE` tokens are always free.
"""

import copy

import torch

from headspring.models.context import Context, Visibility
from headspring.models.mask import Causal

SPARE = 16  # tokens before the window that stay, to rewind to


def room(window: int, capacity: int) -> int:
    """Tokens in the buffer of a row."""
    return min(capacity, 2 * (window + SPARE))


class WindowState:
    """Keys and values of one attention layer whose queries see the last `window` of them and the first `sinks` of a row."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        mask: Causal,
        capacity: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        assert mask.window is not None
        self.window, self.sinks = mask.window, mask.sinks
        self.length = self.base = 0  # tokens read; the place of the first one in the buffer
        self.recent = torch.zeros(2, batch, kv_heads, room(mask.window, capacity), channels, dtype=dtype, device=device)
        self.first = torch.zeros(2, batch, kv_heads, mask.sinks, channels, dtype=dtype, device=device)

    def append(self, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, K, T, C) keys and values of rows that begin with `padding` (B,) pads. Returns those that they may look
        at: the first time, just these; later the sinks, the last window − 1 before them, and these."""
        past, new = self.length, torch.stack([k, v])
        held = min(past, self.window - 1)
        known = self.recent[:, :, :, : past - self.base]
        if self.sinks:
            self._note_sinks(new, padding)
        if known.shape[3] + new.shape[3] <= self.recent.shape[3]:
            self.recent[:, :, :, past - self.base : past - self.base + new.shape[3]] = new
            seen = self.recent[:, :, :, past - self.base - held : past - self.base + new.shape[3]]
        else:
            seen = torch.cat([known[:, :, :, known.shape[3] - held :], new], dim=3)
            kept = torch.cat([known, new], dim=3)[:, :, :, -(self.window + SPARE) :]
            self.recent[:, :, :, : kept.shape[3]] = kept
            self.base = past + new.shape[3] - kept.shape[3]
        self.length += new.shape[3]
        if self.sinks and past:
            seen = torch.cat([self.first, seen], dim=3)
        return seen[0], seen[1]

    def _note_sinks(self, new: torch.Tensor, padding: torch.Tensor | None) -> None:
        """Keep those of the new keys and values that are the first of their row."""
        batch, time = new.shape[1], new.shape[3]
        start = torch.zeros(batch, dtype=torch.int64, device=new.device) if padding is None else padding
        place = start[:, None] + torch.arange(self.sinks, device=new.device) - self.length
        arrived = ((place >= 0) & (place < time))[None, :, None, :, None]
        found = new.gather(3, place.clamp(0, time - 1)[None, :, None, :, None].expand_as(self.first))
        self.first = torch.where(arrived, found, self.first)

    def select(self, rows: torch.Tensor) -> None:
        self.recent, self.first = self.recent[:, rows], self.first[:, rows]

    def last_boundary(self, length: int) -> int:
        return length if self.base <= max(0, length - self.window + 1) else 0

    def rewind_to(self, length: int) -> None:
        self.length = length
        self.base = min(self.base, length)  # 0 where nothing is left: a buffer begins with the row then

    def copy(self, capacity: int) -> "WindowState":
        other = copy.copy(self)
        kept = self.recent[:, :, :, : self.length - self.base]
        held = max(kept.shape[3], room(self.window, capacity))
        other.recent = self.recent.new_zeros(*kept.shape[:3], held, kept.shape[4])
        other.recent[:, :, :, : kept.shape[3]] = kept
        return other

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in (self.recent, self.first))


def held_positions(mask: Causal, context: Context) -> torch.Tensor:
    """(B or 1, S) int64: positions of the keys that a `WindowState` gives to tokens which follow others."""
    return (_held_places(mask, context) - _pads(context)).clamp(min=0)


def held_visibility(mask: Causal, context: Context) -> Visibility:
    """What tokens which follow others see of the keys that a `WindowState` gives."""
    places = _held_places(mask, context)
    start = context.past - min(context.past, (mask.window or 1) - 1)
    seen = mask.allowed(context.positions[:, :, None], held_positions(mask, context)[:, None, :])
    recent = torch.arange(places.shape[1], device=context.device) >= mask.sinks
    # A sink that is still among the last ones would be seen twice.
    once = torch.where(recent, places >= _pads(context), places < start)
    itself = places[:, None] == torch.arange(context.past, context.past + context.time, device=context.device)[:, None]
    return Visibility(((seen & once[:, None]) | (itself & recent))[:, None], causal=False)


def _pads(context: Context) -> torch.Tensor | int:
    return 0 if context.padding is None else context.padding[:, None]


def _held_places(mask: Causal, context: Context) -> torch.Tensor:
    """(B or 1, S) int64: the sinks of each row, then the last ones in order."""
    start = context.past - min(context.past, (mask.window or 1) - 1)
    sinks = _pads(context) + torch.arange(mask.sinks, device=context.device)[None]
    recent = torch.arange(start, context.past + context.time, device=context.device)[None]
    return torch.cat([sinks, recent.expand(len(sinks), -1)], dim=1)
