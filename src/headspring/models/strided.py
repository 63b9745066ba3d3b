"""Strided attention without gathering: tokens in rows as long as the stride, so that what is far stands in the same column.

    stride 4     row 0   0  1  2  3          query 10 sees, before its window, 6 and 2:
                 row 1   4  5 [6] 7          the column above it
                 row 2   8  9 (10) …

The scores of a query are two products, with the tokens of the rows just before it (a window) and with its column; one
softmax goes over both. The columns are as many causal attentions of n / stride tokens each, so that all of it costs
n · (window + n / stride) and copies nothing but the layout. Rows are read some at a time; their pattern is formed again for the
backward pass, and memory grows with the sequence.

Why not lists of keys (`block_sparse`): neighbours share no column, and a list for a block of them would name each block's
worth of keys around every multiple of the stride, of which a query sees one. What it gives up: the pattern of some rows is
formed in float32 outside a fused kernel, which the kernel for full attention makes up for until `worthwhile`'s length.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from headspring.models.attend import Scoring
from headspring.models.block_sparse import Blocks, lay_out, take
from headspring.models.context import Context
from headspring.models.mask import Strided
from headspring.models.position.base import PositionModule

SCORES = 1 << 20  # numbers of a pattern that are held at a time in training


Biases = tuple[torch.Tensor | None, torch.Tensor | None]


def columns(mask: Strided, position: PositionModule, context: Context) -> tuple[Blocks, Biases]:
    """The tokens in rows of a stride, and what a position adds to the scores of windows and of columns."""
    blocks = lay_out(context, mask.stride)
    near, far = relative(mask, blocks)
    return blocks, (position.between(near, context), position.between(far, context))


def relative(mask: Strided, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Position of the key − that of the query, the same in every document: (run, L) of a run's queries and the keys of its
    window, and (N, N) of the rows of a column."""
    run, rows = mask.run, torch.arange(blocks.index.shape[1], device=blocks.index.device)
    key = torch.arange(-mask.reach * run, run, device=rows.device)
    return key - torch.arange(run, device=rows.device)[:, None], mask.stride * (rows - rows[:, None])


def strided_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Strided,
    blocks: Blocks,
    biases: Biases,
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of q (B, H, T, C) to the keys k and values v (B, K, T, ·) that a strided mask shows → (B, H, T, C'), 0 for
    pads. `blocks` has blocks of a stride; `biases` are those of `relative`, (H, run, L) and (H, N, N), or None."""
    batch, count, stride = len(q), blocks.index.shape[1], mask.stride
    groups = k.shape[1]
    slots = blocks.slots[:, None]
    rows = [take(x, slots).unflatten(0, (batch, count)).transpose(1, 2) for x in (q, k, v)]  # (B, H or K, N, stride, C)
    rows[0] = rows[0].unflatten(1, (groups, -1))
    step = max(1, int(SCORES / (batch * q.shape[1] * stride * mask.keys_formed(count * stride))))
    parts = []
    for start in range(0, count, step):
        part = _Rows(mask, blocks, scoring, biases, start, min(start + step, count))
        if torch.is_grad_enabled():
            parts.append(checkpoint(part.answer, *rows, use_reentrant=False))
        else:
            parts.append(part.answer(*rows))
    y = torch.cat(parts, dim=3).flatten(1, 2).flatten(2, 3)  # (B, H, N · stride, C')
    return take(y, blocks.places[:, None, None])


@dataclass(frozen=True)
class _Rows:
    """The rows from `start` to `end`, as queries."""

    mask: Strided
    blocks: Blocks
    scoring: Scoring
    biases: Biases
    start: int
    end: int

    def answer(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (B, K, G, N, stride, C), k and v (B, K, N, stride, ·) → (B, K, G, rows, stride, C')."""
        near = self._near(q, k)
        pattern = self._softmax(torch.cat([near, self._far(q, k)], dim=-1)).to(v.dtype)
        near, far = pattern.split([near.shape[-1], self.end], dim=-1)
        windows = self._windows(v)  # (B, K, runs, L, C')
        runs = near.unflatten(4, (-1, self.mask.run)).flatten(3, 4).transpose(2, 3).flatten(3, 4)
        shape = q.shape[2], self.mask.run
        y = (runs @ windows).unflatten(3, shape).transpose(2, 3).flatten(3, 4).unflatten(3, (-1, self.mask.stride))
        columns = far.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # (B, K, stride, G · rows, end)
        other = columns @ v[:, :, : self.end].transpose(2, 3)
        return y + other.unflatten(3, (q.shape[2], -1)).permute(0, 1, 3, 4, 2, 5)

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """(B, K, N, stride, C) → (B, K, runs, L, C): for each run of queries, the tokens of its window, which ends with it."""
        run, before = self.mask.run, self.mask.reach
        first, last = self.start * self.mask.stride // run, self.end * self.mask.stride // run
        runs = x[:, :, : self.end].flatten(2, 3).unflatten(2, (-1, run))[:, :, max(0, first - before) :]
        runs = pad(runs, (0, 0, 0, 0, max(0, before - first), 0))
        return torch.cat([runs[:, :, at : at + last - first] for at in range(before + 1)], dim=3)

    def _near(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scores of the window: (B, K, G, rows, stride, L) float32."""
        run, groups = self.mask.run, q.shape[1:3]
        queries = q[:, :, :, self.start : self.end].flatten(3, 4).unflatten(3, (-1, run)).transpose(2, 3).flatten(3, 4)
        scores = (self._scaled(queries) @ self._windows(k).float().mT).unflatten(3, (groups[1], run)).transpose(2, 3)
        distance = -relative(self.mask, self.blocks)[0]
        runs = torch.arange(self.mask.stride // run, device=q.device)[:, None] * run + torch.arange(run, device=q.device)
        position = self.blocks.index[:, self.start : self.end, None, None] * self.mask.stride + runs
        position = position.flatten(1, 2)  # (B or 1, runs, run): of each query in its document
        shown = (distance >= 0) & (distance < self.mask.local) & (distance <= position[..., None])
        scores = self._shown(scores, shown[:, None, None], self.biases[0], groups)
        return scores.flatten(3, 4).unflatten(3, (-1, self.mask.stride))

    def _far(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scores of the column: (B, K, G, rows, stride, end) float32."""
        columns = q[:, :, :, self.start : self.end].permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # (B, K, stride, G · rows, C)
        scores = self._scaled(columns) @ k[:, :, : self.end].transpose(2, 3).float().mT
        scores = scores.unflatten(3, (q.shape[2], -1)).permute(0, 1, 3, 4, 2, 5)
        key, query = (torch.arange(*edges, device=q.device) for edges in ((0, self.end), (self.start, self.end)))
        first = query - self.blocks.index[:, self.start : self.end]  # the row that a document begins with
        shown = (key < query[:, None]) & (key >= first[..., None])
        bias = None if self.biases[1] is None else self.biases[1][:, self.start : self.end, None, : self.end]
        return self._shown(scores, shown[:, None, None, :, None], bias, q.shape[1:3])

    def _scaled(self, q: torch.Tensor) -> torch.Tensor:
        return q.float() * (q.shape[-1] ** -0.5 if self.scoring.scale is None else self.scoring.scale)

    def _shown(
        self, scores: torch.Tensor, shown: torch.Tensor, bias: torch.Tensor | None, groups: tuple[int, ...]
    ) -> torch.Tensor:
        """With the soft-cap and the bias, −∞ where a key is hidden."""
        if self.scoring.softcap is not None:
            scores = self.scoring.softcap * torch.tanh(scores / self.scoring.softcap)
        if bias is not None:
            bias = bias.unflatten(0, groups)
            scores = scores + bias.reshape(*groups, *(1,) * (scores.dim() - 1 - bias.dim()), *bias.shape[2:])
        return scores.masked_fill(~shown, float("-inf"))

    def _softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """Over keys; a sink enters the denominator only."""
        if self.scoring.sinks is None:
            return scores.softmax(dim=-1)
        sinks = self.scoring.sinks.float().view(*scores.shape[1:3], 1, 1, 1)
        return torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1).softmax(dim=-1)[..., :-1]
