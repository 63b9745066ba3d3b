"""Tiled attention with an online softmax: what FlashAttention does (arXiv 2205.14135, 2307.08691), in lines one can read.

                 keys →  tile 0   tile 1   tile 2
    queries  tile 0     [  ■    |        |        ]       a query's row is read tile by tile and keeps three things:
      ↓      tile 1     [  ■    |   ■    |        ]       m, the largest score so far;  n, the sum of exp(score − m);
             tile 2     [  ■    |   ■    |   ■    ]       y, the values weighed by exp(score − m)

    a new tile of scores s:   m' = max(m, max s),   n ← n · e^(m − m') + Σ e^(s − m'),   y ← y · e^(m − m') + e^(s − m') v

At the end y / n is the answer, and L = m + log n all that the backward pass needs besides: it makes each tile's pattern
again as p = e^(s − L) and, with D = Σ g ⊙ y for the gradient g of the answer,

    dv = pᵀ g        ds = p ⊙ (g vᵀ − D)        dq = ds k · scale        dk = dsᵀ q · scale

No more than one tile of the pattern exists at any time: memory grows with the sequence, operations with its square as before.
It is a text to read and a reference to test; the calls that train are in `attend`, and the kernel for this machine's
bfloat16 does the same in `kernels/cpp/attention.cpp`.
"""

import math
from collections.abc import Iterator

import torch


def tiled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None, tile: int = 64
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v. q, k (B, H, T, C) and v (B, H, T, C'), float32 or float64 → (B, H, T, C')."""
    return _Tiled.apply(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale, tile)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale, tile):
        y, log_sums = v.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1])
        for rows in _tiles(q.shape[2], tile):
            largest = q.new_full((*q.shape[:2], rows.stop - rows.start, 1), -math.inf)
            total, weighed = torch.zeros_like(largest), y[:, :, rows]
            for columns in _tiles(rows.stop if causal else k.shape[2], tile):
                scores = _scores(q, k, rows, columns, causal, scale)
                peak = torch.maximum(largest, scores.amax(-1, keepdim=True))
                shrink, weights = (largest - peak).exp(), (scores - peak).exp()
                total = total * shrink + weights.sum(-1, keepdim=True)
                weighed = weighed * shrink + weights @ v[:, :, columns]
                largest = peak
            y[:, :, rows] = weighed / total
            log_sums[:, :, rows] = (largest + total.log())[..., 0]
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.settings = causal, scale, tile
        return y

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, y, log_sums = ctx.saved_tensors
        causal, scale, tile = ctx.settings
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        shift = (gradient * y).sum(-1, keepdim=True)
        for rows in _tiles(q.shape[2], tile):
            for columns in _tiles(rows.stop if causal else k.shape[2], tile):
                pattern = (_scores(q, k, rows, columns, causal, scale) - log_sums[:, :, rows, None]).exp()
                d_scores = pattern * (gradient[:, :, rows] @ v[:, :, columns].mT - shift[:, :, rows])
                dv[:, :, columns] += pattern.mT @ gradient[:, :, rows]
                dq[:, :, rows] += d_scores @ k[:, :, columns] * scale
                dk[:, :, columns] += d_scores.mT @ q[:, :, rows] * scale
        return dq, dk, dv, None, None, None


def _scores(q: torch.Tensor, k: torch.Tensor, rows: slice, columns: slice, causal: bool, scale: float) -> torch.Tensor:
    """One tile of scores, −∞ where a key comes after the query."""
    scores = q[:, :, rows] @ k[:, :, columns].mT * scale
    if not causal or columns.stop <= rows.start + 1:
        return scores
    query = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    return scores.masked_fill(torch.arange(columns.start, columns.stop, device=q.device) > query, -math.inf)


def _tiles(length: int, tile: int) -> Iterator[slice]:
    for start in range(0, length, tile):
        yield slice(start, min(start + tile, length))
