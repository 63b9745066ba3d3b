"""Sparse attention that saves what its mask hides: a list of keys for each block of queries, then exact attention on those.

    tokens      a a a a a b b b b                two documents, blocks of 2
    layout     [a a][a a][a ·][b b][b b]         every document begins a block of its own
    keys of     └─ block 1, window 3: positions 0 … 3 of document a, as a list

Queries are laid out in blocks, the keys of their lists are gathered, and the call of attention is the ordinary one
(`attend.attention`) with one block a row of the batch; the mask between a block and its list is evaluated element by
element, so that the result is that of the dense form. Time and memory grow as n · (length of a list). Where a list is much
longer than its block, what was gathered is not kept for the backward pass but gathered again.

Why not FlexAttention: on the CPU it has no backward pass, and this is plain torch that runs anywhere. What it gives up:
keys are copied as often as lists name them, which a fused kernel would not do. Copying a key costs about as much as `PRICE`
queries that look at it, so that short blocks do not pay: `worthwhile` compares with one dense call under a mask, by constants
measured on a CPU in float32. A mask whose queries share few keys has no lists worth their copies: see `strided`.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, pad
from torch.utils.checkpoint import checkpoint

from headspring.models.attend import Scoring, attention, seen
from headspring.models.chosen import Chosen, choose
from headspring.models.context import Context, Visibility
from headspring.models.mask import Mask, Strided
from headspring.models.position.base import PositionModule

PRICE = 110  # queries of one block that see a key in the time of gathering it
GAIN = 1.25  # the price of a seen key in a list, in keys of a dense mask
LONG = 4096  # keys from which on the memory of a dense mask decides
COLUMN, LAID_OUT = 2, 600  # the prices of a key formed by `strided` and of its layout, in keys of a dense mask
KEPT = 6  # times the keys: what gathering may keep for the backward pass
ROWS = 1 << 18  # gathered keys at a time, where they are not kept


@dataclass(frozen=True)
class Blocks:
    """Tokens in blocks of `size` that no two documents share; pads are in none.

    `slots` (B or 1, N, size): the token in each slot, the number of tokens where there is none. `places` (B or 1, S): the
    slot of each token, N · size for a pad. `index` (B or 1, N): the number of each block within its document. All int64.
    """

    size: int
    slots: torch.Tensor
    places: torch.Tensor
    index: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """(B or 1, N, size) int64: of each slot in its document."""
        return self.index[..., None] * self.size + torch.arange(self.size, device=self.index.device)

    @property
    def tokens(self) -> int:
        return self.places.shape[1]


@dataclass(frozen=True)
class Lists:
    """Which keys each block of queries reads: `tokens` (B or 1, K or 1, N, L), the number of tokens where a list ends early;
    `positions` of the same shape; and which of them each query `sees`, (B or 1, K or 1, N, size, L) bool."""

    blocks: Blocks
    tokens: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor

    @property
    def relative(self) -> torch.Tensor:
        """(B or 1, K or 1, N, size, L): position of the key − position of the query."""
        return self.positions[..., None, :] - self.blocks.positions[:, None, ..., None]


def worthwhile(mask: Mask, context: Context) -> bool:
    """Whether reading lists of L keys by blocks of b queries is cheaper than reading all S: GAIN · L · (1 + PRICE / b) ≤ S.
    From LONG keys on, a list of half of them is enough, as the dense mask would need S² numbers. Tokens that
    follow a state are few, and read densely."""
    return not context.past and worthwhile_at(mask, context.time)


def worthwhile_at(mask: Mask, time: int) -> bool:
    """The same of a whole sequence of `time` tokens."""
    block = mask.query_block
    if block is None or time < 2 * block:
        return False
    if isinstance(mask, Strided):
        return COLUMN * mask.keys_formed(time) + LAID_OUT <= time
    longest = block * (mask.top + 1) if isinstance(mask, Chosen) else _listed_at(mask, block, time)
    quick = GAIN * longest * (1 + PRICE / block) <= time
    return quick or (time >= LONG and 2 * longest <= time)


def _listed_at(mask: Mask, block: int, time: int) -> int:
    return mask.gathered(torch.tensor(time // block), time).shape[-1]


def lay_out(context: Context, size: int) -> Blocks:
    """The keys of a context in blocks, worked out once."""

    def make() -> Blocks:
        positions = context.key_positions
        tokens = torch.arange(positions.shape[1], device=positions.device)
        starts = positions % size == 0
        if context.padding is not None:
            pads = tokens < context.padding[:, None]
            starts = starts & ~pads
        block = starts.cumsum(1) - 1
        count = max(1, int(block.max()) + 1)
        places = block * size + positions % size
        if context.padding is not None:
            places = torch.where(pads, count * size, places)
        slots = positions.new_full((len(positions), count * size + 1), len(tokens)).scatter(1, places, tokens.expand_as(places))
        index = positions.new_zeros(len(positions), count + 1).scatter(1, torch.where(starts, block, count), positions // size)
        return Blocks(size, slots[:, :-1].unflatten(1, (count, size)), places, index[:, :-1])

    return context.once(f"blocks of {size}", make)


def listed(mask: Mask, context: Context) -> Lists:
    """The lists of a mask that depends on positions alone."""
    assert mask.query_block is not None
    blocks = lay_out(context, mask.query_block)
    block, tokens = torch.arange(blocks.index.shape[1], device=context.device), blocks.tokens
    first = block - blocks.index  # of the document
    positions = mask.gathered(blocks.index, tokens)  # (B', N, L)
    slot = positions + first[..., None] * blocks.size
    inside = (positions >= 0) & (slot < blocks.slots[0].numel())
    slot = torch.where(inside, slot, 0).flatten(1)
    same = first.gather(1, slot // blocks.size).view_as(inside) == first[..., None]  # a list may reach into the next document
    found = blocks.slots.flatten(1).gather(1, slot).view_as(inside)
    keys = torch.where(inside & same, found, tokens)
    sees = mask.allowed(blocks.positions[..., None], positions[..., None, :])
    return _with_everything_seen(blocks, keys[:, None], positions[:, None], sees[:, None])


def chosen(mask: Chosen, blocks: Blocks, asks: torch.Tensor, k: torch.Tensor) -> Lists:
    """The lists that the queries `asks` and keys `k`, (B, K, T, C) each, choose."""
    choice = choices(mask, blocks, asks, k)
    batch, heads = choice.shape[:2]
    first = torch.arange(blocks.index.shape[1], device=k.device) - blocks.index
    offset = torch.arange(mask.block, device=k.device)
    slot = (choice[..., None] * mask.block + offset).flatten(-2)
    slots = blocks.slots.flatten(1)[:, None].expand(batch, heads, -1)
    keys = slots.gather(2, slot.clamp(min=0).flatten(2)).view_as(slot)
    keys = torch.where(slot >= 0, keys, blocks.tokens)
    positions = slot - mask.block * first[:, None, :, None]
    sees = mask.base.allowed(blocks.positions[:, None, ..., None], positions[..., None, :])
    return _with_everything_seen(blocks, keys, positions, sees)


def _with_everything_seen(blocks: Blocks, keys: torch.Tensor, positions: torch.Tensor, sees: torch.Tensor) -> Lists:
    """Keys that a list does not have are hidden; a slot without a query sees all, since a softmax over nothing is NaN."""
    sees = sees & (keys < blocks.tokens)[..., None, :]
    return Lists(blocks, keys, positions, sees | (blocks.slots == blocks.tokens)[:, None, ..., None])


def choices(mask: Chosen, blocks: Blocks, asks: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    def pooled(x: torch.Tensor) -> torch.Tensor:
        return take(x.detach(), blocks.slots.flatten(1)[:, None, None]).unflatten(2, (-1, mask.block))

    return choose(mask, pooled(asks), pooled(k), blocks.index)


def shown(
    mask: Chosen, base: Visibility, blocks: Blocks, asks: torch.Tensor, k: torch.Tensor, time: int, heads: int
) -> Visibility:
    """What is chosen as one dense mask (B, H, T, S), for the last `time` tokens as queries: the definition of the lists."""
    choice = choices(mask, blocks, asks, k)
    batch, groups, count, _ = choice.shape
    looks = torch.zeros(batch, groups, count, count + 1, dtype=torch.bool, device=k.device)
    looks.scatter_(3, torch.where(choice < 0, count, choice), True)
    block = (blocks.places // mask.block).clamp(max=count - 1).expand(batch, -1)
    row = torch.arange(batch, device=k.device)[:, None, None]
    dense = looks[row, :, block[:, -time:, None], block[:, None]].movedim(-1, 1)
    allowed = seen(base, time, k.shape[2], k.device)
    dense = dense if allowed is None else dense & allowed
    return Visibility(dense.repeat_interleave(heads // groups, dim=1), causal=False)


def bias(lists: Lists, position: PositionModule, heads: int, context: Context) -> torch.Tensor | None:
    """What a position adds to the scores between blocks and their lists: (B or 1, H, N, size, L)."""
    if not position.biased:
        return None
    groups = lists.relative.shape[1]
    found = position.between(lists.relative, context)  # (B or 1, K or 1, N, H, size, L)
    assert found is not None
    head = torch.arange(heads, device=found.device)
    return found[:, head * groups // heads, :, head].transpose(0, 1)


def take(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of x (B, K, T, C) by their numbers, (B or 1, K or 1, N, L) with T for a row of zeros → (B · N, K, L, C)."""
    batch, heads, time, channels = x.shape
    table = pad(x, (0, 0, 0, 1)).reshape(-1, channels)
    starts = (time + 1) * torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1)
    return embedding((tokens + starts).transpose(1, 2).flatten(0, 1), table)


def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists, scoring: Scoring) -> torch.Tensor:
    """Attention of q (B, H, T, C) to the keys k and values v (B, K, T, ·) that its blocks list → (B, H, T, C'); 0 for pads.
    `scoring.bias` (… , N, size, L) is between a block's queries and its list."""
    batch, count = len(q), lists.blocks.index.shape[1]

    def part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, end: int) -> torch.Tensor:
        queries = take(q, lists.blocks.slots[:, None, start:end])
        tokens = lists.tokens[:, :, start:end]
        sees = _as_batch(lists.sees[:, :, start:end], batch, q.shape[1])
        added = None if scoring.bias is None else _as_batch(scoring.bias[:, :, start:end], batch, q.shape[1])
        y = attention(queries, take(k, tokens), take(v, tokens), Visibility(sees, causal=False), scoring.with_bias(added))
        return y.unflatten(0, (batch, -1))

    longest = lists.tokens.shape[-1]
    if longest <= KEPT * lists.blocks.size or not torch.is_grad_enabled():
        y = part(q, k, v, 0, count)
    else:
        step = max(1, ROWS // (batch * k.shape[1] * longest))
        parts = [(start, min(start + step, count)) for start in range(0, count, step)]
        y = torch.cat([checkpoint(part, q, k, v, *edges, use_reentrant=False) for edges in parts], dim=1)
    return take(y.transpose(1, 2).flatten(2, 3), lists.blocks.places[:, None, None])


def _as_batch(x: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """(B or 1, H or K or 1, N, …) → (B · N, H or 1, …)."""
    if 1 < x.shape[1] < heads:
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    return x.transpose(1, 2).expand(batch, *(-1,) * (x.dim() - 1)).flatten(0, 1)
