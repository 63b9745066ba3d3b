"""What the parts of one forward pass share: where each token stands, what hides it, and what follows from that.

Padding is on the left of a row; packed documents are runs of equal `segments`. Either way a token's position counts from
its own document's (or row's) first token, so that a recurrent mixer needs one fact only: where `positions` is 0, memory
starts anew.

What several layers need (a mask, rotary tables) is worked out once, in `prepare`, before the first block runs: blocks may be
compiled or recomputed, and should find tensors, not decisions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from headspring.models.mask import Causal, Mask

if TYPE_CHECKING:
    from headspring.models.ragged import Ragged


@dataclass(frozen=True)
class Visibility:
    """A mask as tensors. `allowed` (B or 1, 1, T, S) bool is True where a query may look at a key. Without it, `causal` says
    whether the T queries are the T keys in order (each sees those before it), or every query sees every key. A causal query
    sees the keys from `first` (B or 1, T) int64 on, where that is given, which does not decrease along a row; `origin`, alike,
    is where its document begins, where a row has several or pads."""

    allowed: torch.Tensor | None
    causal: bool
    first: torch.Tensor | None = None
    origin: torch.Tensor | None = None

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """(B or 1, 1, T, S) bool; None where nothing is hidden, or only the future is."""
        if self.first is None:
            return self.allowed
        place = torch.arange(self.first.shape[1], device=self.first.device)
        return ((place <= place[:, None]) & (place >= self.first[:, :, None]))[:, None]


@dataclass(frozen=True)
class Context:
    """`time` tokens that follow `past` ones which a state holds.

    `positions` (B or 1, T) int64. `segments` (B, T) numbers packed documents (not with a state); `padding` (B,) int64 counts
    the pads at the left of a row. `memory` (B, M, D) is what a cross-attention reads, `memory_mask` (B, M) True where it
    holds a token; None where a state has read it already. `ragged` tells the sequences of a row apart that holds several.
    """

    time: int
    past: int
    positions: torch.Tensor
    segments: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    ragged: "Ragged | None" = None

    @staticmethod
    def of(
        time: int,
        past: int,
        segments: torch.Tensor | None,
        padding: torch.Tensor | None,
        device: torch.device,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> "Context":
        """Work out the positions."""
        query = torch.arange(past, past + time, device=device)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device)
        if segments is not None:
            starts = torch.ones_like(segments, dtype=torch.bool)
            starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
            first = torch.where(starts, query, 0).cummax(dim=1).values
        if padding is not None:
            first = torch.maximum(first, padding[:, None])
        return Context(time, past, (query - first).clamp(min=0), segments, padding, memory, memory_mask)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make()` gives, worked out for the first part that asks for `key`."""
        if key not in self.prepared:
            self.prepared[key] = make()
        return self.prepared[key]

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def starts(self) -> torch.Tensor | None:
        """(B, T) bool, True at tokens before which memory is empty: pads and the first token of a document. None where
        that is only the very first of the row."""
        if self.segments is None and self.padding is None:
            return None
        return self.once("starts", lambda: self.positions == 0)

    @property
    def pads(self) -> torch.Tensor | None:
        """(B, T) bool, True at the padding of a row; None where there is none."""
        if self.padding is None:
            return None
        query = torch.arange(self.past, self.past + self.time, device=self.device)
        return self.once("pads", lambda: query < self.padding[:, None])  # type: ignore[index]

    @property
    def key_positions(self) -> torch.Tensor:
        """(B or 1, S) int64: those of all tokens so far, which are the keys."""
        if self.segments is not None or self.past == 0:
            return self.positions
        key = torch.arange(self.past + self.time, device=self.device)[None]
        return key if self.padding is None else (key - self.padding[:, None]).clamp(min=0)

    @property
    def relative(self) -> torch.Tensor:
        """(B or 1, T, S) int64: position of the key − position of the query."""
        return self.once("relative", lambda: self.key_positions[:, None, :] - self.positions[:, :, None])

    @property
    def lengths(self) -> torch.Tensor:
        """(B or 1, T or 1) int64: how many tokens of its own row or document, so far, each token stands among."""
        total = self.past + self.time
        if self.segments is None:
            rows = torch.full((1, 1), total, device=self.device)
            return rows if self.padding is None else rows - self.padding[:, None]
        return self.once("lengths", self._document_lengths)

    def _document_lengths(self) -> torch.Tensor:
        assert self.segments is not None
        last = torch.ones_like(self.segments, dtype=torch.bool)
        last[:, :-1] = self.segments[:, 1:] != self.segments[:, :-1]
        places = torch.arange(self.time, device=self.device)
        ends = torch.where(last, places, self.time).flip(1).cummin(dim=1).values.flip(1)
        return self.positions.gather(1, ends) + 1

    def visibility(self, mask: Mask) -> Visibility:
        """Lower a mask for these tokens as queries and all tokens so far as keys."""
        return self.once(repr(mask), lambda: self._lower(mask))

    def _lower(self, mask: Mask) -> Visibility:
        total = self.past + self.time
        in_order = not mask.causal or self.past == 0 or self.time == 1
        if self.segments is None and self.padding is None and mask.shows_all(total) and in_order:
            return Visibility(None, causal=mask.causal and self.past == 0)
        if isinstance(mask, Causal) and not mask.sinks and self.past == 0:
            alone = self.segments is None and self.padding is None
            return Visibility(None, True, self._stretch(mask), None if alone else self._stretch(Causal()))
        key = torch.arange(total, device=self.device)
        seen = mask.allowed(self.positions[:, :, None], self.key_positions[:, None, :])
        if self.segments is not None:
            seen = seen & (self.segments[:, :, None] == self.segments[:, None, :])
        if self.padding is not None:
            seen = seen & (key >= self.padding[:, None, None])
            # A pad's own row would have no key at all, and a softmax over nothing is NaN: let it see itself.
            seen = seen | (key == torch.arange(self.past, total, device=self.device)[:, None])
        return Visibility(seen[:, None], causal=False)

    def _stretch(self, mask: Causal) -> torch.Tensor:
        """(B or 1, T): the first key that each of a row's tokens sees, all up to itself being seen."""
        place = torch.arange(self.time, device=self.device)
        first = place - self.positions
        if mask.window is not None:
            first = torch.maximum(first, place - mask.window + 1)
        return first if self.pads is None else torch.where(self.pads, place, first)
