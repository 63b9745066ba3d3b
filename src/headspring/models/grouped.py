"""Products of slices of rows with a matrix of their own each, and the way of the rows there and back.

    y[start_e : end_e] = x[start_e : end_e] W_eᵀ + b_e

(token, choice) pairs are laid out by expert. Where experts have many rows each, a slice is filled up to whole `TILE`s with
rows that nobody reads: a CPU's bfloat16 product is compiled for its sizes when it first runs, which takes thirty times as
long as the product itself, and how many rows an expert has is new in every step. With tiles a few sizes come back again and
again. On a GPU `grouped_mm` is one launch for all slices; on a CPU it is this loop without the tiles.

Everything here gathers rows or multiplies them, forward and backward, and never adds to a place twice, so that results do
not depend on the order of threads.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TILE = 64


@dataclass(frozen=True)
class Layout:
    """Where pairs stand: pair n · K + k of token n is row `row_of_pair` (N·K,), unless it is `dropped` (N·K,) bool; row i is
    pair `pair_of_row` (M,), unless it is one of the `fillers`. The rows of expert e end at `ends[e]`. Indices are int64."""

    top: int
    ends: tuple[int, ...]
    row_of_pair: torch.Tensor
    pair_of_row: torch.Tensor
    fillers: torch.Tensor
    dropped: torch.Tensor | None


def lay_out(chosen: torch.Tensor, kept: torch.Tensor | None, experts: int) -> Layout:
    """Pairs by expert and, for one expert, in order. chosen (N, K) int64; kept (N, K) bool, None where all are."""
    pairs, dropped = chosen.flatten(), None
    if kept is not None:
        dropped = ~kept.flatten()
        pairs = torch.where(dropped, experts, pairs)
    counts = torch.bincount(pairs, minlength=experts)[:experts]
    tile = TILE if len(pairs) >= TILE * experts else 1
    sizes = (counts + tile - 1) // tile * tile
    ends: list[int] = sizes.cumsum(0).tolist()
    order = pairs.argsort(stable=True)
    if dropped is not None:
        order = order[: int(counts.sum())]
    expert = pairs[order]
    shift = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)  # by how much fillers push an expert's rows back
    rows = torch.arange(len(order), device=chosen.device) + shift[expert]
    row_of_pair = torch.zeros_like(pairs).index_copy_(0, order, rows)
    pair_of_row = pairs.new_full((ends[-1],), -1).index_copy_(0, rows, order)
    fillers = (pair_of_row < 0).nonzero()[:, 0]
    return Layout(chosen.shape[1], tuple(ends), row_of_pair, pair_of_row.clamp(min=0), fillers, dropped)


def dispatch(tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The rows of tokens (N, D), (M, D)."""
    return _Dispatch.apply(tokens, layout)


def collect(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The pairs of rows (M, D), (N, K, D); 0 where one was dropped."""
    return _Collect.apply(rows, layout)


def over_choices(pairs: torch.Tensor) -> torch.Tensor:
    """Σ over k of (N, K, D). One addition a choice: torch's own sum over a short dimension takes five times as long."""
    return functools.reduce(torch.add, pairs.unbind(1))


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ends: Sequence[int]) -> torch.Tensor:
    """(M, inputs) → (M, outputs) in the dtype of x. weight (E, outputs, inputs), bias (E, outputs); the rows of expert e end
    at `ends[e]`, and the last of them is M."""
    if fits_grouped_kernel(x, weight):
        offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
        y = torch.nn.functional.grouped_mm(x, weight.to(x.dtype).mT, offs=offsets)
    else:
        y = _GroupedLinear.apply(x, weight, tuple(ends))
    if bias is None:
        return y
    sizes = torch.tensor([end - start for start, end in _slices(ends)], device=x.device)
    return y + bias.to(y.dtype).repeat_interleave(sizes, dim=0)


def fits_grouped_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether one kernel can take all slices: rows must be whole 16 bytes."""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weight.shape[1:])


def _slices(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip((0, *ends[:-1]), ends))


def _rows(pairs: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(N·K, D) → (M, D), 0 for fillers."""
    return pairs[layout.pair_of_row].index_fill_(0, layout.fillers, 0.0)


def _pairs(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(M, D) → (N·K, D), 0 where dropped."""
    pairs = rows[layout.row_of_pair] if len(rows) else rows.new_zeros(len(layout.row_of_pair), rows.shape[1])
    return pairs if layout.dropped is None else pairs.masked_fill_(layout.dropped[:, None], 0.0)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, layout):
        ctx.layout = layout
        return tokens[layout.pair_of_row // layout.top].index_fill_(0, layout.fillers, 0.0)

    @staticmethod
    def backward(ctx, gradient):
        return over_choices(_pairs(gradient, ctx.layout).unflatten(0, (-1, ctx.layout.top))), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, layout):
        ctx.layout = layout
        return _pairs(rows, layout).unflatten(0, (-1, layout.top))

    @staticmethod
    def backward(ctx, gradient):
        return _rows(gradient.flatten(0, 1), ctx.layout), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ends):
        if any(ctx.needs_input_grad):  # one cast for both directions; without a gradient only what is used is cast
            weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.ends = ends
        y = x.new_empty(len(x), weight.shape[1])
        for expert, (start, end) in enumerate(_slices(ends)):
            if end > start:
                torch.mm(x[start:end], weight[expert].to(x.dtype).T, out=y[start:end])
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for expert, (start, end) in enumerate(_slices(ctx.ends)):
            if end > start:
                upstream = gradient[start:end]
                torch.mm(upstream, weight[expert], out=grad_x[start:end])
                grad_weight[expert] = upstream.T @ x[start:end]
        return grad_x, grad_weight, None
