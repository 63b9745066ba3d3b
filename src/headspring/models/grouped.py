"""Products of slices of rows with a matrix of their own each, and the way of the rows there and back.

    y[start_e : end_e] = x[start_e : end_e] W_eᵀ + b_e

(token, choice) pairs are laid out by expert. Three ways to multiply them:

| where | forward and backward |
| --- | --- |
| bfloat16 on a CPU with native products | packed matrices (`expert_matrices`), the same for training, scoring and serving |
| bfloat16 on a GPU | `grouped_mm`, one launch for all slices |
| elsewhere | torch's product of each slice |

The first gives a row its bits from that row and its expert alone, whoever else goes to the expert. The last does not, and in
bfloat16 torch compiles a product for its sizes when it first runs, which takes thirty times as long as the product itself,
while how many rows an expert has is new in every step. So slices are filled up there to whole `TILE`s with rows that nobody
reads, and a few sizes come back again and again.

Everything here gathers rows or multiplies them, forward and backward, and never adds to a place twice, so that results do
not depend on the order of threads.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headspring.models import kernels
from headspring.models.expert_matrices import NativeGroupedLinear, slices

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


def lay_out(chosen: torch.Tensor, kept: torch.Tensor | None, experts: int, tiled: bool = True) -> Layout:
    """Pairs by expert and, for one expert, in order, filled up to whole tiles where `tiled` and worth it. chosen (N, K) int64;
    kept (N, K) bool, None where all are."""
    pairs, dropped = chosen.flatten(), None
    if kept is not None:
        dropped = ~kept.flatten()
        pairs = torch.where(dropped, experts, pairs)
    counts = torch.bincount(pairs, minlength=experts)[:experts]
    tile = TILE if tiled and len(pairs) >= TILE * experts else 1
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


def collect(rows: torch.Tensor, weights: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Σ over k of weights[n, k] · the row of pair (n, k): rows (M, D), weights (N, K) float32 → (N, D) in the rows' dtype,
    summed in float32 in the order of k. Nothing comes from a pair that was dropped."""
    return _Collect.apply(rows, weights, layout)


def over_choices(pairs: torch.Tensor) -> torch.Tensor:
    """Σ over k of (N, K, D). One addition a choice: torch's own sum over a short dimension takes five times as long."""
    return functools.reduce(torch.add, pairs.unbind(1))


def grouped_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], ends: Sequence[int]
) -> torch.Tensor:
    """(M, inputs) → (M, Σ outputs) in the dtype of x, of several matrices side by side: weights (E, outputs, inputs), biases
    (E, outputs); the rows of expert e end at `ends[e]`, and the last of them is M."""
    if kernels.multiplies_natively(x):
        y = NativeGroupedLinear.apply(x, tuple(ends), *weights)
    else:
        parts = [_grouped_linear(x, weight, ends) for weight in weights]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return add_biases(y, biases, ends)


def add_biases(y: torch.Tensor, biases: Sequence[torch.Tensor], ends: Sequence[int]) -> torch.Tensor:
    """y (M, Σ outputs) plus the bias of each row's expert."""
    if not biases:
        return y
    sizes = torch.tensor([end - start for start, end in slices(ends)], device=y.device)
    return y + torch.cat([bias.to(y.dtype) for bias in biases], dim=-1).repeat_interleave(sizes, dim=0)


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    if fits_grouped_kernel(x, weight):
        offsets = torch.tensor(ends, dtype=torch.int32, device=x.device)
        return torch.nn.functional.grouped_mm(x, weight.to(x.dtype).mT, offs=offsets)
    return _GroupedLinear.apply(x, weight, tuple(ends))


def fits_grouped_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether one kernel can take all slices: rows must be whole 16 bytes."""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weight.shape[1:])


def _rows(pairs: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(N·K, D) → (M, D), 0 for fillers."""
    return pairs.index_select(0, layout.pair_of_row).index_fill_(0, layout.fillers, 0.0)


def _pairs(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(M, D) → (N·K, D), 0 where dropped."""
    pairs = rows.index_select(0, layout.row_of_pair) if len(rows) else rows.new_zeros(len(layout.row_of_pair), rows.shape[1])
    return pairs if layout.dropped is None else pairs.masked_fill_(layout.dropped[:, None], 0.0)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, layout):
        ctx.layout = layout
        return tokens.index_select(0, layout.pair_of_row // layout.top).index_fill_(0, layout.fillers, 0.0)

    @staticmethod
    def backward(ctx, gradient):
        return over_choices(_pairs(gradient, ctx.layout).unflatten(0, (-1, ctx.layout.top))), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, layout):
        ctx.save_for_backward(rows, weights)
        ctx.layout = layout
        if kernels.use_native(rows):
            return kernels.built().combine(rows, weights.contiguous(), _places(layout))
        pairs = _pairs(rows, layout).unflatten(0, (-1, layout.top))
        return over_choices(pairs.float() * weights[..., None]).to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (rows, weights), layout = ctx.saved_tensors, ctx.layout
        if kernels.use_native(rows):
            grad_rows = torch.empty_like(rows).index_fill_(0, layout.fillers, 0.0)
            weights = weights.contiguous()
            operators, gradient = kernels.built(), gradient.contiguous()
            return grad_rows, operators.combine_backward(gradient, rows, weights, _places(layout), grad_rows), None
        wide = gradient.float()[:, None]
        pairs = _pairs(rows, layout).unflatten(0, (-1, layout.top))
        grad_weights = (wide * pairs.float()).sum(-1)
        return _rows((wide * weights[..., None]).to(rows.dtype).flatten(0, 1), layout), grad_weights, None


def _places(layout: Layout) -> torch.Tensor:
    """(N, K) int64: the row of each pair, -1 where it was dropped."""
    place = layout.row_of_pair if layout.dropped is None else layout.row_of_pair.masked_fill(layout.dropped, -1)
    return place.view(-1, layout.top)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ends):
        if any(ctx.needs_input_grad):  # one cast for both directions; without a gradient only what is used is cast
            weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.ends = ends
        y = x.new_empty(len(x), weight.shape[1])
        for expert, (start, end) in enumerate(slices(ends)):
            if end > start:
                torch.mm(x[start:end], weight[expert].to(x.dtype).T, out=y[start:end])
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        for expert, (start, end) in enumerate(slices(ctx.ends)):
            if end > start:
                upstream = gradient[start:end]
                torch.mm(upstream, weight[expert], out=grad_x[start:end])
                grad_weight[expert] = upstream.T @ x[start:end]
        return grad_x, grad_weight, None
