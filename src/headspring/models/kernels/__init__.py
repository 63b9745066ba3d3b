"""The few element-wise steps of a block that cost more than its matrix products on a CPU, each as one operator.

Every operator has a plain version in torch, which is its definition and its reference in the tests. Where the system has
a C++ compiler, the sources in `cpp/` are built once (a few seconds, cached by source and processor) and used for float32 and
bfloat16 tensors on the CPU; elsewhere, and under `torch.compile` (which fuses the plain text itself), the plain version runs.
Both keep statistics in float32 and round once at the end. What this gives up: one more file, and a last-bit difference
between the two kernel sets, which is why `numerics_id()` names the one in use.
"""

import functools
import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from headspring.artifacts.errors import UserError
from headspring.models.kernels import differentiable, native
from headspring.models.kernels.packed import Kind, PackedMatrix, pack_bf16, product_plain

if TYPE_CHECKING:
    from types import ModuleType

    from headspring.models.paged import Pages
    from headspring.models.ragged import Ragged

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def numerics_id() -> str:
    """Which kernel set computes: results are comparable bit for bit only under the same one."""
    return f"native-{native.digest()}" if library() is not None else "plain"


def library() -> native.Library | None:
    """The native operators, or None where they cannot be built or `HEADSPRING_KERNELS=plain` turns them off."""
    return native.enabled()


def built() -> native.Library:
    """The native operators, where `use_native` has said that there are any."""
    found = library()
    assert found is not None
    return found


def use_native(x: torch.Tensor) -> bool:
    """Whether the native operators apply to a tensor like `x`, here and now."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype in NATIVE_DTYPES and library() is not None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + epsilon) · weight over the last dimension, in float32, returned in the dtype of `x`."""
    if use_native(x):
        return differentiable.RMSNormFunction.apply(x, weight, epsilon)
    return rms_norm_plain(x, weight, epsilon)


def rms_norm_plain(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The definition of `rms_norm`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y (x itself without a y) and its `rms_norm`: what a residual stream passes on, and what its next branch reads.

    As one operator, because both gradients then meet in one pass.
    """
    if use_native(x):
        return differentiable.AddRMSNormFunction.apply(x, y, weight, epsilon)
    total = x if y is None else x + y
    return total, rms_norm_plain(total, weight, epsilon)


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) ⊙ up, in float32, returned in the dtype of `gate`."""
    if use_native(gate):
        return differentiable.SiluMultiplyFunction.apply(gate, up)
    return silu_multiply_plain(gate, up)


def silu_multiply_halves(both: torch.Tensor) -> torch.Tensor:
    """`silu_multiply` of the halves (gate, up) of one product (..., 2F) → (..., F)."""
    if use_native(both):
        return differentiable.SiluMultiplyHalvesFunction.apply(both)
    return silu_multiply_plain(*both.chunk(2, dim=-1))


def silu_multiply_plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition of `silu_multiply`."""
    return (silu(gate.float()) * up.float()).to(gate.dtype)


def clamped_multiply_halves(both: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """g · sigmoid(alpha · g) · (u + 1) of the halves (g, u) of one product (..., 2F) → (..., F), with g and |u| at most `limit`
    (GPT-OSS, arXiv 2508.10925); in float32, returned in the dtype of `both`."""
    if use_native(both):
        return differentiable.ClampedMultiplyHalvesFunction.apply(both, alpha, limit)
    return clamped_multiply_plain(both, alpha, limit)


def clamped_multiply_plain(both: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """The definition of `clamped_multiply_halves`."""
    gate, up = both.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(both.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs (c, c + C/2) of x (B, T, H, C) by the angles of cos and sin (B or 1, T, C/2) float32."""
    if use_native(x):
        return differentiable.RotateFunction.apply(x, cos, sin)
    return rotate_plain(x, cos, sin)


def rotate_plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The definition of `rotate`."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def place_heads(
    mixed: torch.Tensor,
    heads: tuple[int, int],
    gains: tuple[torch.Tensor, torch.Tensor] | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    epsilon: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (B, T, H, C), keys and values (B, T, K, C) from the product mixed (B, T, (H + 2K) C) that made them all.

    `heads` is (H, K). Queries and keys are normalised by `rms_norm` with their gains (C,), then turned by `rotate` with the
    cosines and sines of `rotation`, where these are given.
    """
    if use_native(mixed):
        return differentiable.PlaceHeadsFunction.apply(
            mixed, heads, *(gains or (None, None)), *(rotation or (None, None)), epsilon
        )
    return place_heads_plain(mixed, heads, gains, rotation, epsilon)


def place_heads_plain(mixed, heads, gains, rotation, epsilon):
    """The definition of `place_heads`."""
    count = heads[0] + 2 * heads[1]
    q, k, v = mixed.unflatten(-1, (count, mixed.shape[-1] // count)).split((heads[0], heads[1], heads[1]), dim=2)
    if gains is not None:
        q, k = rms_norm_plain(q, gains[0], epsilon), rms_norm_plain(k, gains[1], epsilon)
    if rotation is not None:
        q, k = rotate_plain(q, *rotation), rotate_plain(k, *rotation)
    return q, k, v


def linear(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """x Wᵀ + b of several matrices at once, side by side: (..., I) with weights (Oᵢ, I) and biases (Oᵢ,) → (..., Σ Oᵢ).

    Computed in the dtype of `x`; the parameters keep their own. bfloat16 on the CPU goes through `product`, with gradients
    and without, so that a trainer and an engine agree bit for bit; weight gradients are then summed in float32.
    """
    if multiplies_natively(x):
        learns = torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights))
        y = differentiable.LinearFunction.apply(x, *weights) if learns else product(x, pack_bf16(narrow(x, weights)))
    elif x.dtype == torch.float32 and biases:  # added as the product begins, not in a pass of its own
        each = zip(weights, biases, strict=True)
        return _joined([torch.nn.functional.linear(x, weight.float(), bias.float()) for weight, bias in each], dim=-1)
    else:
        y = _joined([torch.nn.functional.linear(x, weight.to(x.dtype)) for weight in weights], dim=-1)
    return y + _joined([bias.to(x.dtype) for bias in biases], dim=0) if biases else y


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, packed: PackedMatrix | None = None
) -> torch.Tensor:
    """x Wᵀ + b of one matrix, by its packed form where that is given."""
    if packed is not None:
        return product(x, packed, bias)
    return linear(x, (weight,), () if bias is None else (bias,))


def product(
    x: torch.Tensor, packed: PackedMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., I) times the transposed matrix, plus bias (O,) → (..., O), in the dtype of `x`; into `out`, contiguous, where it
    is given. Without gradients.

    A row of the result depends on that row of `x` alone, bit for bit, where native products apply and for integer kinds.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise UserError("a product with packed weights has no gradients: unpack_model(model) first")
    assert x.shape[-1] == packed.shape[1], f"rows of {x.shape[-1]} numbers for a matrix of {packed.shape[1]} inputs"
    bias = None if bias is None else bias.to(x.dtype)
    operators = _multiplier(x, packed.kind)
    if operators is not None:
        return operators.packed_product(x, packed, bias, out)
    y = product_plain(x.reshape(-1, x.shape[-1]), packed).view(*x.shape[:-1], packed.shape[0])
    y = y if bias is None else y + bias
    return y if out is None else out.copy_(y)


rejected_kinds: set[Kind] = set()  # native products that failed their test here (inference/quantization/choice.py)


def multiplies_natively(x: torch.Tensor, kind: Kind = "bf16") -> bool:
    """Whether native products with matrices of this kind apply to a tensor like `x`."""
    return _multiplier(x, kind) is not None


def _multiplier(x: torch.Tensor, kind: Kind) -> native.Library | None:
    fits = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and kind != "bf16")
    if not fits or kind in rejected_kinds or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    found = library()
    return found if found is not None and found.has_packed_products else None


def narrow(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights in the dtype of `x`, one after the other: (Σ Oᵢ, I)."""
    if len(weights) == 1 and weights[0].dtype == x.dtype:
        return weights[0].detach()
    narrow = torch.empty(sum(map(len, weights)), x.shape[-1], dtype=x.dtype)
    torch._foreach_copy_(list(narrow.split([len(weight) for weight in weights])), [weight.detach() for weight in weights])
    return narrow


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def use_products(x: torch.Tensor, *sizes: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether native bfloat16 products apply to matrices of these sizes and a tensor like `x`, which is of `dtype`."""
    fits = x.dtype == dtype and all(size % 32 == 0 for size in sizes)
    return fits and use_native(x) and built().has_products


def weight_gradient(gradient: torch.Tensor, x: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """total + gradientᵀ x (O, I) in float32, of gradient (N, O) and x (N, I). `total` is changed in place."""
    if use_products(gradient, gradient.shape[1], x.shape[1]):
        fresh, total = total is None, torch.empty(gradient.shape[1], x.shape[1]) if total is None else total
        built().add_weight_gradient(gradient, x, total, fresh=fresh)
        return total
    product = (gradient.T @ x).float()
    return product if total is None else total.add_(product)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(C)) v where the query at t sees the keys first[b, t] … t; without `first`, 0 … t.

    q (B, H, T, C), k and v (B, K, T, C) with H a multiple of K; first (B, T) int64 must not decrease along a row: it says
    where a packed document or a sliding window begins. With `origin` (B, T), where a token's document begins (that of a pad at
    itself), every document gets the bits that it has alone.
    """
    if attends_natively(q, v):
        return differentiable.CausalAttentionFunction.apply(q, k, v, first, origin)
    return causal_attention_plain(q, k, v, first)


def attends_natively(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `causal_attention` has an operator for queries and values like these."""
    return v.shape[-1] == q.shape[-1] and use_products(q, q.shape[-1])


def causal_attention_plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition of `causal_attention`, through torch's fused kernel."""
    grouped = q.shape[1] != k.shape[1]
    if first is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    place = torch.arange(q.shape[2], device=q.device)
    seen = (place <= place[:, None]) & (place >= first[:, :, None])
    return scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=grouped)


def write_pages(k: torch.Tensor, v: torch.Tensor, pages: "Pages", slots: torch.Tensor) -> None:
    """Store keys and values (N, K, C) at `slots` (N,) int64 (page · 32 + place in it) of a layer's pages."""
    if pages_natively(k, pages):
        built().write_pages(k, v, pages, slots)
    elif (on_gpu := pages_on_gpu(k)) is not None:
        on_gpu.write(k, v, pages.tensors, slots)
    else:
        pages.store(k, v, slots)


def pages_natively(x: torch.Tensor, pages: "Pages") -> bool:
    """Whether the operators on pages apply to queries, keys or values like `x` (…, C)."""
    return use_products(x, x.shape[-1]) and pages.keys.dtype in (x.dtype, torch.int8) and not x.requires_grad


def pages_on_gpu(x: torch.Tensor) -> "ModuleType | None":
    """The operators on pages of a GPU (`triton_paged`); None where `x` is on none, and where there is no Triton."""
    wanted = x.device.type == "cuda" and os.environ.get("HEADSPRING_KERNELS") != "plain" and not torch.compiler.is_compiling()
    return _triton_paged() if wanted else None


@functools.cache
def _triton_paged() -> "ModuleType | None":
    try:
        return importlib.import_module("headspring.models.kernels.triton_paged")
    except ImportError:
        return None


def paged_attention(
    q: torch.Tensor, pages: "Pages", ragged: "Ragged", window: int | None = None, scale: float | None = None
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v of the row's queries q (N, H, C), each over the keys of its own sequence up to itself (the last
    `window` of them), which lie in pages → (N, H, C). `scale` defaults to 1 / sqrt(C).

    Only where `pages_natively`; the rows are then those of `causal_attention` over the whole sequence, bit for bit.
    """
    return built().paged_attention(q, pages, ragged, window, q.shape[-1] ** -0.5 if scale is None else scale)


def rows_in_one_piece(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
