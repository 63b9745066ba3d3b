"""The few element-wise steps of a block that cost more than its matrix products on a CPU, each as one operator.

Every operator has a plain version in torch, which is its definition and its reference in the tests. Where the system has
a C++ compiler, `native.cpp` is built once (a few seconds, cached by source and processor) and used for float32 and bfloat16
tensors on the CPU; elsewhere, and under `torch.compile` (which fuses the plain text itself), the plain version runs.
Both keep statistics in float32 and round once at the end. What this gives up: one more file, and a last-bit difference
between the two kernel sets, which is why `numerics_id()` names the one in use.
"""

import os

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from headspring.models import native

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def numerics_id() -> str:
    """Which kernel set computes: results are comparable bit for bit only under the same one."""
    return f"native-{native.digest()}" if library() is not None else "plain"


def library() -> native.Library | None:
    """The native operators, or None where they cannot be built or `HEADSPRING_KERNELS=plain` turns them off."""
    if os.environ.get("HEADSPRING_KERNELS") == "plain":
        return None
    return native.library()


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
        return _RMSNorm.apply(x, weight, epsilon)
    return rms_norm_plain(x, weight, epsilon)


def rms_norm_plain(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The definition of `rms_norm`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.float()).to(x.dtype)


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) ⊙ up, in float32, returned in the dtype of `gate`."""
    if use_native(gate):
        return _SiluMultiply.apply(gate, up)
    return silu_multiply_plain(gate, up)


def silu_multiply_plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition of `silu_multiply`."""
    return (silu(gate.float()) * up.float()).to(gate.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs (c, c + C/2) of x (B, T, H, C) by the angles of cos and sin (B or 1, T, C/2) float32."""
    if use_native(x):
        return _Rotate.apply(x, cos, sin)
    return rotate_plain(x, cos, sin)


def rotate_plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The definition of `rotate`."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(C)) v where the query at t sees the keys first[b, t] … t; without `first`, 0 … t.

    q (B, H, T, C), k and v (B, K, T, C) with H a multiple of K; first (B, T) int64 must not decrease along a row: it says
    where a packed document or a sliding window begins.
    """
    if attends_natively(q, v):
        return _CausalAttention.apply(q, k, v, first)
    return causal_attention_plain(q, k, v, first)


def attends_natively(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `causal_attention` has an operator for queries and values like these."""
    channels = q.shape[-1]
    return q.dtype == torch.bfloat16 and channels % 32 == 0 == v.shape[-1] - channels and use_native(q) and built().has_products


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


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = built().rms_norm(x, weight.float(), epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = built().rms_norm_backward(gradient.contiguous(), x, weight.float(), scale)
        return grad_x, grad_weight.to(weight.dtype), None


class _SiluMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return built().silu_multiply(gate, up)

    @staticmethod
    def backward(ctx, gradient):
        return built().silu_multiply_backward(gradient.contiguous(), *ctx.saved_tensors)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return built().rotate(x.contiguous(), cos, sin, inverse=False)

    @staticmethod
    def backward(ctx, gradient):
        return built().rotate(gradient.contiguous(), *ctx.saved_tensors, inverse=True), None, None


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, first):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        y, log_sums = built().attention(q, k, v, first)
        ctx.save_for_backward(q, k, v, y, log_sums, first)
        return y

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        return *built().attention_backward(gradient, *ctx.saved_tensors), None
