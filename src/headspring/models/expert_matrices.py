"""The matrices of experts as native products read them: packed, one expert after another.

    gate, up (E, F, D) → for each expert one matrix (2F, D), where both have one form     out (E, D, F) → for each one (D, F)

Products with them give a row of the result from that row of x and its expert alone, bit for bit, whoever else is in the batch
and however many rows an expert has. Training packs its weights anew in every step and uses the same products
(`NativeGroupedLinear`), so that what a trainer scores is what the engine computes. The gradient of x multiplies by the
transposed matrices, packed too; that of the weights is summed in float32.

Why not one product for all experts at once: a product of one expert is large enough to share out among threads, and a
decoding step reads the few experts that it chose. What it gives up: a packed copy of the weights in memory, which is what
every packed model pays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headspring.models import kernels
from headspring.models.kernels.packed import PANEL, Kind, PackedMatrix, join, pack_bf16, round_to_int8
from headspring.models.kernels.packing import version


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """For each expert, `inward` are the matrices that read x (gate and up in one, or both), `outward` is the last one.
    `versions` are those of the parameters that were packed."""

    inward: tuple[tuple[PackedMatrix, ...], ...]
    outward: tuple[PackedMatrix, ...]
    versions: tuple[int, ...] = ()

    @property
    def kind(self) -> Kind:
        """Of all matrices."""
        return self.outward[0].kind

    @staticmethod
    def of(gate: Sequence[PackedMatrix], up: Sequence[PackedMatrix], out: Sequence[PackedMatrix]) -> "PackedExperts":
        """Gate and up are joined, expert by expert, where they have one form."""
        pairs = ((join(pair),) if pair[0].form == pair[1].form else pair for pair in zip(gate, up, strict=True))
        return PackedExperts(tuple(pairs), tuple(out))

    @staticmethod
    @torch.no_grad()
    def of_floats(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, kind: Kind = "bf16") -> "PackedExperts":
        """gate and up (E, F, D), out (E, D, F), rounded to bfloat16, or to 255 values an output (int8)."""
        both = side_by_side((gate, up), torch.bfloat16 if kind == "bf16" else gate.dtype)
        if kind == "bf16":
            inward, outward = pack_each(both), pack_each(out.detach().to(torch.bfloat16))
        else:
            inward, outward = (tuple(map(round_to_int8, weight)) for weight in (both, out))
        return PackedExperts(tuple((matrix,) for matrix in inward), outward, versions_of(gate, up, out))

    @property
    def matrices(self) -> tuple[PackedMatrix, ...]:
        """All of them, expert by expert."""
        return tuple(matrix for inward, outward in zip(self.inward, self.outward) for matrix in (*inward, outward))


def versions_of(*weights: torch.Tensor) -> tuple[int, ...]:
    """Other numbers after any of them has changed."""
    return tuple(map(version, weights))


def slices(ends: Sequence[int]) -> list[tuple[int, int]]:
    """Where the rows of each expert begin and end."""
    return list(zip((0, *ends[:-1]), ends))


def side_by_side(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Weights (E, Oᵢ, I) → (E, Σ Oᵢ, I) in `dtype`, written once."""
    if len(weights) == 1:
        return weights[0].detach().to(dtype)
    sizes = [weight.shape[1] for weight in weights]
    joined = torch.empty(len(weights[0]), sum(sizes), weights[0].shape[2], dtype=dtype)
    torch._foreach_copy_(list(joined.split(sizes, dim=1)), [weight.detach() for weight in weights])
    return joined


def pack_each(weight: torch.Tensor) -> tuple[PackedMatrix, ...]:
    """weight (E, O, I) bfloat16 → a packed matrix (O, I) for each expert, parts of one where outputs fill panels."""
    experts, outputs, _ = weight.shape
    if outputs % PANEL:
        return tuple(pack_bf16(matrix) for matrix in weight)
    whole = pack_bf16(weight.flatten(0, 1))
    return tuple(whole.part(e * outputs, (e + 1) * outputs) for e in range(experts))


def products(x: torch.Tensor, experts: Sequence[tuple[PackedMatrix, ...]], ends: Sequence[int]) -> torch.Tensor:
    """x (M, I) → (M, Σ outputs), each slice of rows by the matrices of its expert. Without gradients."""
    y = x.new_empty(len(x), sum(matrix.shape[0] for matrix in experts[0]))
    with torch.no_grad():
        for (start, end), matrices in zip(slices(ends), experts, strict=True):
            if end > start and len(matrices) == 1:
                kernels.product(x[start:end], matrices[0], out=y[start:end])
            elif end > start:
                y[start:end] = torch.cat([kernels.product(x[start:end], matrix) for matrix in matrices], dim=-1)
    return y


class NativeGroupedLinear(torch.autograd.Function):
    """x (M, I) bfloat16, weights (E, Oᵢ, I) → (M, Σ Oᵢ)."""

    @staticmethod
    def forward(ctx, x, ends, *weights):
        joined = side_by_side(weights, x.dtype)
        ctx.save_for_backward(x, joined)
        ctx.ends, ctx.sizes, ctx.dtypes = ends, [weight.shape[1] for weight in weights], [w.dtype for w in weights]
        return _in_place(x, pack_each(joined), ends)

    @staticmethod
    def backward(ctx, gradient):
        x, joined = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_x = _in_place(gradient, pack_each(joined.mT.contiguous()), ctx.ends) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return grad_x, None, *[None] * len(ctx.sizes)
        total = torch.zeros(joined.shape, dtype=torch.float32)
        for expert, (start, end) in enumerate(slices(ctx.ends)):
            if end > start:
                kernels.weight_gradient(gradient[start:end], x[start:end], total[expert])
        return grad_x, None, *(grad.to(dtype) for grad, dtype in zip(total.split(ctx.sizes, dim=1), ctx.dtypes))


def _in_place(x: torch.Tensor, matrices: Sequence[PackedMatrix], ends: Sequence[int]) -> torch.Tensor:
    return products(x, [(matrix,) for matrix in matrices], ends)
