"""The operators of this package with their gradients, as autograd functions over the native loops."""

import torch

from headspring.models import kernels
from headspring.models.kernels.packed import pack_bf16


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        x, weight = x.contiguous(), weight.contiguous()
        y, scale = kernels.built().rms_norm(x, weight.float(), epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = kernels.built().rms_norm_backward(gradient.contiguous(), x, weight.float(), scale)
        return grad_x, grad_weight.to(weight.dtype), None


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, epsilon):
        ctx.set_materialize_grads(False)
        ctx.has_y = y is not None
        if y is None:
            total = x.contiguous()
            normed, scale = kernels.built().rms_norm(total, weight.float(), epsilon)
            total = total.view_as(total) if total is x else total
        else:
            total, normed, scale = kernels.built().add_rms_norm(x.contiguous(), y.contiguous(), weight.float(), epsilon)
        ctx.save_for_backward(total, weight, scale)
        return total, normed

    @staticmethod
    def backward(ctx, passed, gradient):
        total, weight, scale = ctx.saved_tensors
        if gradient is None:
            return passed, passed if ctx.has_y else None, None, None
        passed = None if passed is None else passed.contiguous()
        grad, grad_weight = kernels.built().rms_norm_backward(gradient.contiguous(), total, weight.float(), scale, passed)
        return grad, grad if ctx.has_y else None, grad_weight.to(weight.dtype), None


class SiluMultiplyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels.built().silu_multiply(gate.view(1, -1), up.view(1, -1)).view(gate.shape)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        kernels.built().silu_multiply_backward(*(x.view(1, -1) for x in (gradient.contiguous(), gate, up, *grads)))
        return grads


class SiluMultiplyHalvesFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both):
        both = both.contiguous()
        ctx.save_for_backward(both)
        return kernels.built().silu_multiply(*both.flatten(0, -2).chunk(2, dim=-1)).view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        (both,) = ctx.saved_tensors
        grads = torch.empty_like(both)
        halves = (half for x in (both, grads) for half in x.flatten(0, -2).chunk(2, dim=-1))
        kernels.built().silu_multiply_backward(gradient.contiguous(), *halves)
        return grads


class ClampedMultiplyHalvesFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both, alpha, limit):
        both = both.contiguous()
        ctx.save_for_backward(both)
        ctx.bounds = alpha, limit
        gate, up = both.flatten(0, -2).chunk(2, dim=-1)
        return kernels.built().clamped_multiply(gate, up, alpha, limit).view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        (both,) = ctx.saved_tensors
        grads = torch.empty_like(both)
        halves, to_halves = (x.flatten(0, -2).chunk(2, dim=-1) for x in (both, grads))
        kernels.built().clamped_multiply_backward(gradient.contiguous(), halves, to_halves, *ctx.bounds)
        return grads, None, None


class PlaceHeadsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, heads, q_gain, k_gain, cos, sin, epsilon):
        mixed, (count, shared) = mixed.contiguous(), heads
        channels = mixed.shape[-1] // (count + 2 * shared)
        gains = None
        if q_gain is not None:
            gains = torch.cat([q_gain.float().expand(count, -1), k_gain.float().expand(shared, -1)])
        placed = kernels.built().place_heads(mixed, gains, cos, sin, count + shared, channels, epsilon)
        ctx.save_for_backward(mixed, gains, cos, sin)
        ctx.heads, ctx.epsilon, ctx.gain_dtype = heads, epsilon, None if q_gain is None else q_gain.dtype
        values = mixed[..., (count + shared) * channels :].unflatten(-1, (shared, channels))
        return *placed.split(heads, dim=2), values

    @staticmethod
    def backward(ctx, *grads):
        mixed, gains, cos, sin = ctx.saved_tensors
        grads = tuple(grad.contiguous() for grad in grads)
        grad_mixed, grad_gains = kernels.built().place_heads_backward(grads, mixed, gains, cos, sin, ctx.epsilon)
        if gains is None:
            return grad_mixed, *[None] * 6
        q_gain, k_gain = (part.sum(0).to(ctx.gain_dtype) for part in grad_gains.split(ctx.heads))
        return grad_mixed, None, q_gain, k_gain, None, None, None


class RotateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return kernels.built().rotate(x.contiguous(), cos, sin, inverse=False)

    @staticmethod
    def backward(ctx, gradient):
        return kernels.built().rotate(gradient.contiguous(), *ctx.saved_tensors, inverse=True), None, None


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        narrow = kernels.narrow(x, weights)
        ctx.save_for_backward(x, narrow)
        ctx.sizes, ctx.dtypes = [len(weight) for weight in weights], [weight.dtype for weight in weights]
        return kernels.product(x, pack_bf16(narrow))

    @staticmethod
    def backward(ctx, gradient):
        x, narrow = ctx.saved_tensors
        flat = kernels.rows_in_one_piece(gradient.reshape(-1, gradient.shape[-1]))
        grad_x = (flat @ narrow).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return grad_x, *[None] * len(ctx.sizes)
        grads = kernels.weight_gradient(flat, kernels.rows_in_one_piece(x.reshape(-1, x.shape[-1]))).split(ctx.sizes)
        return grad_x, *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes))


class CausalAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, first, origin):
        q, k, v = (kernels.rows_in_one_piece(x) for x in (q, k, v))
        y, log_sums = kernels.built().attention(q, k, v, first, origin)
        ctx.save_for_backward(q, k, v, y, log_sums, first)
        return y

    @staticmethod
    def backward(ctx, gradient):
        gradient = kernels.rows_in_one_piece(gradient)
        return *kernels.built().attention_backward(gradient, *ctx.saved_tensors), None, None
