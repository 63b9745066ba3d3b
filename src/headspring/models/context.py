"""What the parts of one forward pass share: where each token stands, what hides it, and what follows from that.

Padding is on the left of a row; packed documents are runs of equal `segments`. Either way a token's position counts from
its own document's (or row's) first token, so that a recurrent mixer needs one fact only: where `positions` is 0, memory
starts anew.

What several layers need (a mask, rotary tables) is worked out once, in `prepare`, before the first block runs: blocks may be
compiled or recomputed, and should find tensors, not decisions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from headspring.models.mask import Mask


@dataclass(frozen=True)
class Visibility:
    """A mask as tensors. `allowed` (B or 1, 1, T, S) bool is True where a query may look at a key. Without it, `causal` says
    whether the T queries are the T keys in order (each sees those before it), or every query sees every key."""

    allowed: torch.Tensor | None
    causal: bool


@dataclass(frozen=True)
class Context:
    """`time` tokens that follow `past` ones which a state holds.

    `positions` (B or 1, T) int64. `segments` (B, T) numbers packed documents (not with a state); `padding` (B,) int64 counts
    the pads at the left of a row. `memory` (B, M, D) is what a cross-attention reads, `memory_mask` (B, M) True where it
    holds a token; None where a state has read it already.
    """

    time: int
    past: int
    positions: torch.Tensor
    segments: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    prepared: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        time: int,
        past: int,
        segments: torch.Tensor | None,
        padding: torch.Tensor | None,
        device: torch.device,
        **memory: torch.Tensor | None,
    ) -> "Context":
        """Work out the positions."""
        query = torch.arange(past, past + time, device=device)
        positions = query[None]
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
        if segments is not None:
            starts = torch.ones_like(segments, dtype=torch.bool)
            starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
            first = torch.where(starts, query, torch.zeros_like(query)).cummax(dim=1).values
            positions = positions - first
            if padding is not None:
                positions = positions.clamp(min=0)
        return Context(time, past, positions, segments, padding, **memory)

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

    def visibility(self, mask: Mask) -> Visibility:
        """Lower a mask for these tokens as queries and all tokens so far as keys."""
        return self.once(repr(mask), lambda: self._lower(mask))

    def _lower(self, mask: Mask) -> Visibility:
        total = self.past + self.time
        in_order = not mask.causal or self.past == 0 or self.time == 1
        if self.segments is None and self.padding is None and mask.shows_all(total) and in_order:
            return Visibility(None, causal=mask.causal and self.past == 0)
        key = torch.arange(total, device=self.device)
        key_positions = key[None]
        if self.padding is not None:
            key_positions = (key_positions - self.padding[:, None]).clamp(min=0)
        if self.segments is not None:
            key_positions = self.positions
        seen = mask.allowed(self.positions[:, :, None], key_positions[:, None, :])
        if self.segments is not None:
            seen = seen & (self.segments[:, :, None] == self.segments[:, None, :])
        if self.padding is not None:
            seen = seen & (key >= self.padding[:, None, None])
            # A pad's own row would have no key at all, and a softmax over nothing is NaN: let it see itself.
            seen = seen | (key == torch.arange(self.past, total, device=self.device)[:, None])
        return Visibility(seen[:, None], causal=False)
