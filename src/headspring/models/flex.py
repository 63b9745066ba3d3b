"""Attention on a GPU under any mask and any change of the scores, by FlexAttention (arXiv 2412.05496).

    mask value ─→ shown(row, head, query, key) ─→ blocks of 128 × 128: skipped where nothing is shown
    scoring    ─→ score(s, row, head, query, key) = softcap · tanh(s / softcap) + bias(key − query)
                  sinks: y · sigmoid(log-sum-exp − sink), a key without a value

Both are functions of one element, written from the same values as every other path, and compiled into one kernel, forward
and backward. So a window, packed documents, a strided pattern or a choice of blocks costs what it shows, and no mask,
bias or pattern is ever a tensor of queries by keys.

Why not everywhere: on the CPU it has no backward pass, and not compiled it forms the whole pattern; there `block_sparse`
and `strided` do the work. A plain causal or full pattern keeps the fused kernel of torch, which is faster. What it gives up:
a compilation for each shape, and few queries after a state are better read densely.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from headspring.models.attend import Scoring
from headspring.models.block_sparse import Blocks
from headspring.models.chosen import Chosen
from headspring.models.context import Context
from headspring.models.mask import Mask
from headspring.models.position.base import PositionModule

BLOCK = 128  # queries and keys of a block that is skipped or not
LEAST = 16  # channels of a head that the compiled kernel takes

Shown = Callable[..., torch.Tensor]  # (row, head, query, key), numbers as tensors → bool


def serves(context: Context, channels: int) -> bool:
    """Whether the compiled kernel can read these tokens: a whole sequence, on a GPU that torch.compile writes kernels for."""
    fits = context.past == 0 and context.ragged is None and context.time >= BLOCK and channels >= LEAST
    return fits and context.device.type == "cuda" and _compiles()


@cache
def _compiles() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


def shown_by(mask: Mask, context: Context) -> Shown:
    """What `Context.visibility` shows, one element at a time."""
    positions, segments, padding, pads = context.positions, context.segments, context.padding, context.pads
    several, everything = len(positions) > 1, not mask.causal and mask.shows_all(context.time)

    def shown(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        of = row if several else 0
        seen = key >= 0 if everything else mask.allowed(positions[of, query], positions[of, key])
        if segments is not None:
            seen = seen & (segments[row, query] == segments[row, key])
        if padding is not None and pads is not None:
            seen = (seen & ~pads[row, key]) | (key == query)  # a softmax over nothing is NaN
        return seen

    return shown


def block_mask(mask: Mask, context: Context) -> Any:
    """The blocks of a mask that depends on positions alone."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows = None if context.segments is None and context.padding is None else len(context.positions)
    whole = context.device.type == "cuda"  # compiled, it never forms queries by keys
    shown = shown_by(mask, context)
    return create_block_mask(shown, rows, None, context.time, context.time, context.device, BLOCK, _compile=whole)


def chosen_block_mask(mask: Chosen, blocks: Blocks, choice: torch.Tensor, context: Context, heads: int) -> Any:
    """The blocks of what queries and keys have chosen, (B, K, N, top + 1) blocks of tokens (`chosen.choose`)."""
    from torch.nn.attention.flex_attention import BlockMask

    batch, groups, count, _ = choice.shape
    looks = torch.zeros(batch, groups, count, count + 1, dtype=torch.bool, device=choice.device)
    looks = looks.scatter_(3, torch.where(choice < 0, count, choice), True)[..., :count]
    own = (blocks.places // mask.block).clamp(max=count - 1).expand(batch, -1)  # (B, T): the block of each token
    base, share = shown_by(mask.base, context), heads // groups

    def shown(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        looked = looks[row, head // share, own[row, query], own[row, key]]
        return base(row, head, query, key) & (looked | (key == query))

    # A tile of 128 × 128 tokens is read where a block that it touches looks at another one that it touches.
    tile = torch.arange(context.time, device=own.device) // BLOCK
    touches = torch.zeros(batch, count, int(tile[-1]) + 1, device=own.device)
    touches[torch.arange(batch, device=own.device)[:, None], own, tile] = 1.0
    read = (touches[:, None].mT @ looks.float() @ touches[:, None]) > 0
    read = (read & torch.ones_like(read).tril()).repeat_interleave(share, dim=1)
    count_read, order = read.sum(-1, dtype=torch.int32), read.int().argsort(dim=-1, descending=True, stable=True).int()
    edges = context.time, context.time
    return BlockMask.from_kv_blocks(count_read, order, BLOCK_SIZE=BLOCK, mask_mod=shown, seq_lengths=edges)


def score_of(
    q: torch.Tensor, scoring: Scoring, position: PositionModule, context: Context
) -> Callable[..., torch.Tensor] | None:
    """What becomes of q · k / sqrt(C), one element at a time; None where nothing does. Numbers are tensors, since a compiler
    writes a kernel for each number it sees."""

    def number(x: float) -> torch.Tensor:
        return torch.full((), x, device=q.device)

    cap = None if scoring.softcap is None else number(scoring.softcap)
    scale = None if scoring.scale is None else number(scoring.scale * q.shape[-1] ** 0.5)
    positions, several = context.positions, len(context.positions) > 1
    if cap is None and scale is None and not position.biased:
        return None

    def score(s: torch.Tensor, row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if scale is not None:
            s = s * scale
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        if position.biased:
            of = row if several else 0
            s = s + position.element(positions[of, key] - positions[of, query], head, context)
        return s

    return score


def flex_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: Any,
    scoring: Scoring,
    position: PositionModule,
    context: Context,
) -> torch.Tensor:
    """q (B, H, T, C), k (B, K, T, C) and v (B, K, T, C') under a block mask → (B, H, T, C')."""
    from torch.nn.attention.flex_attention import AuxRequest

    score, grouped = score_of(q, scoring, position, context), q.shape[1] != k.shape[1]
    kernel = _kernel(q.device.type)
    if scoring.sinks is None:
        return kernel(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=grouped)
    y, found = kernel(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
    return y * torch.sigmoid(found.lse - scoring.sinks[:, None])[..., None].to(y.dtype)


@cache
def _kernel(device: str) -> Any:
    """Compiled once for a process; as it is on the CPU, where only tests call it."""
    from torch.nn.attention.flex_attention import flex_attention as plain

    kernel: Any = torch.compile(plain) if device == "cuda" else plain
    return kernel
