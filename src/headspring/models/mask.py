"""Which token may look at which: masks as values, in terms of positions alone.

A mask is a rule on the positions of a query and a key. What else hides a key (it belongs to another packed document, or is
the padding of its row) is the same for every mask and is added by `Context`.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from headspring.artifacts.value import Variant


class Mask(Variant):
    """`allowed(query, key)` of positions that broadcast against each other, int64 → bool.

    `causal`: no query sees a key that comes after it; only such a mask can be cached."""

    causal: ClassVar[bool]

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def shows_all(self, length: int) -> bool:
        """Whether, in a sequence of `length` tokens, nothing is hidden but (for a causal mask) the future."""
        raise NotImplementedError

    def keys_seen(self, length: int) -> float:
        """The number of keys that a query of a sequence of `length` tokens sees, on average."""
        raise NotImplementedError


class Causal(Mask):
    """The keys at a query's own position and before; with a `window`, the last `window` of them, its own included, and the
    first `sinks` of the sequence (arXiv 2309.17453)."""

    kind: Literal["causal"] = "causal"
    window: int | None = Field(None, gt=0)
    sinks: int = Field(0, ge=0)

    causal: ClassVar[bool] = True

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = key <= query
        if self.window is not None:
            near = query - key < self.window
            seen = seen & (near | (key < self.sinks) if self.sinks else near)
        return seen

    def shows_all(self, length: int) -> bool:
        return self.window is None or length <= self.window + self.sinks

    def keys_seen(self, length: int) -> float:
        full = min(length, length if self.window is None else self.window + self.sinks)
        return full - (full - 1) * full / 2 / length


class Full(Mask):
    """Every key (an encoder); with a `window`, those at most `window` away on either side."""

    kind: Literal["full"] = "full"
    window: int | None = Field(None, gt=0)

    causal: ClassVar[bool] = False

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if self.window is None:
            return torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool, device=key.device)
        return (query - key).abs() <= self.window

    def shows_all(self, length: int) -> bool:
        return self.window is None or length <= self.window + 1

    def keys_seen(self, length: int) -> float:
        if self.window is None or length <= self.window + 1:
            return float(length)
        return 2 * self.window + 1 - self.window * (self.window + 1) / length
