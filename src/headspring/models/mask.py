"""Which token may look at which: masks as values, in terms of positions alone.

A mask is a rule on the positions of a query and a key. What else hides a key (it belongs to another packed document, or is
the padding of its row) is the same for every mask and is added by `Context`.

    Causal(window=4)     LocalGlobal(window=3, every=4)     Strided(stride=4, local=2)
    ■                    ■                                  ■
    ■ ■                  ■ ■                                ■ ■
    ■ ■ ■                ■ ■ ■                              · ■ ■
    ■ ■ ■ ■              · ■ ■ ■                            · · ■ ■
    · ■ ■ ■ ■            · · ■ ■ ■                          ■ · · ■ ■
    · · ■ ■ ■ ■          · · · ■ ■ ■                        · ■ · · ■ ■
    · · · ■ ■ ■ ■        · · · ■ ■ ■ ■                      · · ■ · · ■ ■

A mask that hides most keys also says which ones it leaves for a block of queries side by side (`gathered`); `block_sparse`
reads those alone. Masks that a layer's own queries and keys decide are in `chosen`.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from headspring.artifacts.value import Variant

BLOCK = 128  # queries that share a list of keys, at most
RUN = 16  # queries that share a strided window, at least


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

    @property
    def query_block(self) -> int | None:
        """How many queries side by side should share a list of keys; None where a list would hold nearly all of them."""
        return None

    def gathered(self, index: torch.Tensor, length: int) -> torch.Tensor:
        """Positions of all keys that a document's blocks of queries with numbers `index` (…) may see, each at most once:
        (…, L) int64, filled up with −1, in documents of at most `length` tokens."""
        raise NotImplementedError


def stretch(index: torch.Tensor, block: int, before: int, after: int = 0) -> torch.Tensor:
    """The positions from `before` tokens ahead of a block to `after` tokens behind it: (…,) → (…, before + block + after)."""
    places = index[..., None] * block + torch.arange(-before, block + after, device=index.device)
    return places.clamp(min=-1)


def only_before(columns: torch.Tensor, near: torch.Tensor, index: torch.Tensor, block: int, window: int) -> torch.Tensor:
    """`near` (…, N), and those of the `columns` (… or 1, M) that come before a window that long."""
    start = index[..., None] * block - window + 1
    return torch.cat([torch.where(columns < start, columns, -1), near], dim=-1)


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

    @property
    def query_block(self) -> int | None:
        return None if self.window is None else min(self.window, BLOCK)

    def gathered(self, index: torch.Tensor, length: int) -> torch.Tensor:
        assert self.window is not None and self.query_block is not None
        near = stretch(index, self.query_block, self.window - 1)
        sinks = torch.arange(self.sinks, device=index.device)
        return only_before(sinks, near, index, self.query_block, self.window)


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

    @property
    def query_block(self) -> int | None:
        return None if self.window is None else min(self.window, BLOCK)

    def gathered(self, index: torch.Tensor, length: int) -> torch.Tensor:
        assert self.window is not None and self.query_block is not None
        places = stretch(index, self.query_block, self.window, self.window)
        return torch.where(places < length, places, -1)


class LocalGlobal(Mask):
    """The last `window` keys, the first `globals` of the sequence, and the last one of every stretch of `every`: tokens that
    all later ones see (the causal half of Longformer, arXiv 2004.05150, and of BigBird, 2007.14062, without its random
    blocks; with `every`, the fixed pattern of 1904.10509)."""

    kind: Literal["local_global"] = "local_global"
    window: int = Field(gt=0)
    globals: int = Field(0, ge=0)
    every: int | None = Field(None, gt=1)

    causal: ClassVar[bool] = True

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & ((query - key < self.window) | self._global(key))

    def _global(self, key: torch.Tensor) -> torch.Tensor:
        first = key < self.globals
        return first if self.every is None else first | (key % self.every == self.every - 1)

    def shows_all(self, length: int) -> bool:
        return length <= self.window + self.globals

    def keys_seen(self, length: int) -> float:
        place = torch.arange(length)
        before = self._global(place).cumsum(0).roll(self.window)  # global keys that a query's window has left behind
        return float((place + 1).clamp(max=self.window).sum() + before[self.window :].sum()) / length

    @property
    def query_block(self) -> int:
        return min(self.window, BLOCK)

    def gathered(self, index: torch.Tensor, length: int) -> torch.Tensor:
        place = torch.arange(length, device=index.device)
        near = stretch(index, self.query_block, self.window - 1)
        return only_before(place[self._global(place)], near, index, self.query_block, self.window)


class Strided(Mask):
    """The last `local` keys, and before those every key whose distance is a multiple of `stride` (arXiv 1904.10509, section
    4.2). Neighbours share no such key, so that this has no lists: `strided` reads it by columns."""

    kind: Literal["strided"] = "strided"
    stride: int = Field(gt=1)
    local: int = Field(1, gt=0)

    causal: ClassVar[bool] = True

    @model_validator(mode="after")
    def _reaches_beyond(self) -> "Strided":
        if self.local > self.stride:
            raise ValueError(f"local ({self.local}) must not exceed the stride ({self.stride})")
        return self

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        distance = query - key
        return (distance >= 0) & ((distance < self.local) | (distance % self.stride == 0))

    def shows_all(self, length: int) -> bool:
        return length <= self.local

    def keys_seen(self, length: int) -> float:
        place = torch.arange(length)
        return float(((place + 1).clamp(max=self.local) + place // self.stride).sum()) / length

    @property
    def query_block(self) -> int:
        return self.stride

    @property
    def run(self) -> int:
        """Queries that read their window together: the shortest run of at least half a window that divides the stride."""
        least = min(self.stride, max(RUN, self.local // 2))
        return next(run for run in range(least, self.stride + 1) if self.stride % run == 0)

    @property
    def reach(self) -> int:
        """Runs before its own that a query's window reaches into."""
        return -(-(self.local - 1) // self.run)

    def keys_formed(self, length: int) -> float:
        """The keys that a query of a sequence of `length` tokens is multiplied with, on average, seen or not."""
        return self.run * (1 + self.reach) + length / self.stride / 2
