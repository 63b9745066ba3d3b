"""Masks that are learned: a block of queries looks at its own block of keys, and at the earlier blocks that it chooses.

    choice(i) = the `top` best of score(mean of the queries of block i − 1, mean of the keys of block j),  j < i

Mixture of Block Attention (arXiv 2502.13189) and Native Sparse Attention (2502.11089) let a query choose by pooled keys;
here the queries of a block choose together, so that they share one list of keys (`block_sparse`). Two rules keep this
causal, and the same whether tokens come at once or one by one: only blocks that are complete are pooled, and a block asks
with the queries of the block before it, which are all known when its first token comes. Every group of heads with a key
head of its own chooses for itself.

No gradient goes through a choice; it goes to keys that were chosen, and these get chosen more. What this gives up: a query
that turns to a new subject waits for the next block, and a state also keeps the pooled queries' parts, a third more.
"""

import math
from functools import cache
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch.nn.functional import normalize

from headspring.models.mask import Causal, Mask


class Chosen(Mask):
    """In blocks of `block` tokens; each looks at itself and at up to `top` blocks before it."""

    block: int = Field(64, gt=0)
    top: int = Field(4, gt=0)

    causal: ClassVar[bool] = True

    @property
    def base(self) -> Mask:
        """What holds whatever is chosen."""
        return Causal()

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        raise TypeError("what a chosen mask shows depends on queries and keys: see `choose`")

    def shows_all(self, length: int) -> bool:
        return length <= self.block

    def keys_seen(self, length: int) -> float:
        """Where as many blocks are chosen as there may be."""
        place = torch.arange(length)
        return float((place % self.block + 1 + (place // self.block).clamp(max=self.top) * self.block).sum()) / length

    @property
    def query_block(self) -> int:
        return self.block

    def scores(self, asks: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """How well each pooled query (…, N, C) likes each pooled key (…, N, C): (…, N, N), −∞ where not at all."""
        raise NotImplementedError


class Routed(Chosen):
    """The blocks whose pooled keys have the largest products with the pooled query."""

    kind: Literal["routed"] = "routed"

    def scores(self, asks: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        return asks @ means.mT

    def shows_all(self, length: int) -> bool:
        return length <= self.block * (self.top + 1)


class Hashed(Chosen):
    """The latest blocks whose pooled keys fall into the same bucket as the pooled query in one of the `rounds`: the angular
    hash of Reformer (arXiv 2001.04451, section 2), bucket(x) = argmax [xR; −xR] for a random R drawn by `seed`."""

    kind: Literal["hashed"] = "hashed"
    buckets: int = Field(8, ge=2)
    rounds: int = Field(2, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _buckets_are_pairs(self) -> "Hashed":
        if self.buckets % 2:
            raise ValueError(f"buckets ({self.buckets}) must be even: each random direction makes two")
        return self

    def scores(self, asks: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        meet = (self._hash(asks)[..., :, None, :] == self._hash(means)[..., None, :, :]).any(-1)
        latest = torch.arange(means.shape[-2], device=means.device, dtype=means.dtype)
        return torch.where(meet, latest, -math.inf)

    def _hash(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, rounds) int64."""
        directions = _directions(self.seed, self.rounds, x.shape[-1], self.buckets // 2).to(x)
        turned = torch.einsum("...c,rcd->...rd", normalize(x, dim=-1), directions)
        return torch.cat([turned, -turned], dim=-1).argmax(dim=-1)


@cache
def _directions(seed: int, rounds: int, channels: int, count: int) -> torch.Tensor:
    """(rounds, C, count) float32."""
    return torch.randn(rounds, channels, count, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def choose(mask: Chosen, asks: torch.Tensor, keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The blocks that each block looks at, itself last: (B, K, N, top + 1) int64, −1 where it finds no more.

    asks and keys (B, K, N, b, C), zeros where a block has no token; index (B or 1, N): each block's number in its document.
    """
    means, asks = keys.float().mean(-2), asks.float().mean(-2).roll(1, dims=2)
    block = torch.arange(index.shape[-1], device=index.device)
    candidates = (block < block[:, None]) & (block >= (block - index)[..., None])  # earlier ones of the same document
    scores = mask.scores(asks, means).masked_fill(~candidates[:, None], -math.inf)
    best = scores.topk(min(mask.top, len(block)), dim=-1)
    found = torch.where(best.values > -math.inf, best.indices, -1)
    return torch.cat([found, block[:, None].expand(*found.shape[:3], 1)], dim=-1)
