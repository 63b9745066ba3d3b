"""Scans: h_t = a_t ⊙ h_{t−1} + b_t along time, the one recurrence under every diagonal state-space model.

`linear_scan` runs it on tensors that exist (RG-LRU, and the states between chunks of `chunked`). `selective_scan` is Mamba's
(arXiv 2312.00752, algorithm 2): its a and b have a further dimension N which only exists inside the recurrence, so that they
are made a block of time at a time, stay in the cache of the processor, and are made again in the backward pass.

Both are operators with a backward of their own. Recorded step by step, autograd would keep every intermediate of every token
and write a whole gradient tensor a token, which is what makes the obvious loop hundreds of times slower than its arithmetic.
As operators they are opaque to `torch.compile`, which would otherwise unroll the loops.

Why no cumulative log-decays, as in `chunked`: dividing by a decay that is smaller than 1e-38 is not possible, and here every
channel has a decay of its own, so that no matrix product can stand in. What the loops give up: they are launches, and on a
GPU the kernels of `mamba_ssm` take their place where they are installed.

A memory starts anew where a is 0, and h before it has no influence at all: 0 · h + b is b, and its gradient is 0.
"""

import math

import torch

from headspring.models.kernels import installed

BLOCK = 32  # tokens whose states are held at once


def linear_scan(decay: torch.Tensor, inputs: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """h (B, T, …) of h_t = decay_t ⊙ h_{t−1} + inputs_t, with h_{−1} = initial (B, …).

    `decay` is (B, T, …) with as many dimensions as `inputs`, which may be 1 where it is the same for all. One float dtype.
    """
    return torch.ops.headspring.linear_scan(decay, inputs, initial)


def selective_scan(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    initial: torch.Tensor | None,
    starts: torch.Tensor | None = None,
    activations: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, E) and the last h (B, E, N) of

        h_t = exp(step_t a) ⊙ h_{t−1} + (step_t x_t) b_tᵀ        y_t = h_t c_t

    x, step (B, T, E); a (E, N) negative; b, c (B, T, N); initial (B, E, N), None for zeros; all of one float dtype. Where
    `starts` (B, T) is True, memory starts anew. For `activations` of half precision a fused kernel may stand in.
    """
    if initial is None:
        made = installed.selective_scan(x, step, a, b, c) if installed.applies(x, activations, starts) else None
        if made is not None:
            return made
        initial = x.new_zeros(x.shape[0], *a.shape)
    y, last, _ = torch.ops.headspring.selective_scan(x, step, a, b, c, initial, starts)
    return y, last


# ---- h_t = a_t ⊙ h_{t−1} + b_t


@torch.library.custom_op("headspring::linear_scan", mutates_args=())
def _linear_scan(decay: torch.Tensor, inputs: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """In two levels, 3√T vectorised steps in the place of T: chunks all at once from nothing, then what each is handed."""
    time = inputs.shape[1]
    length = max(1, math.isqrt(time))
    chunks = -(-time // length)
    h, reach = _cut(inputs, chunks, length), _cut(decay, chunks, length)
    for t in range(1, length):
        h[:, :, t].addcmul_(reach[:, :, t], h[:, :, t - 1])
        reach[:, :, t].mul_(reach[:, :, t - 1])
    for chunk in range(chunks):
        carried = initial if chunk == 0 else h[:, chunk - 1, -1]
        h[:, chunk].addcmul_(reach[:, chunk], carried.unsqueeze(1))
    return h.flatten(1, 2)[:, :time].clone(memory_format=torch.contiguous_format)


def _cut(x: torch.Tensor, chunks: int, length: int) -> torch.Tensor:
    """A copy of (B, T, …) as (B, chunks, length, …), zeros after the end."""
    padded = x.new_zeros(x.shape[0], chunks * length, *x.shape[2:])
    padded[:, : x.shape[1]] = x
    return padded.unflatten(1, (chunks, length))


@_linear_scan.register_fake
def _(decay, inputs, initial):
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


def _save_linear(ctx, inputs, output):
    decay, _, initial = inputs
    ctx.save_for_backward(decay, initial, output)


def _linear_scan_backward(ctx, gradient):
    """The same scan from the end: g_t = gradient_t + decay_{t+1} ⊙ g_{t+1}."""
    decay, initial, h = ctx.saved_tensors
    later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
    g = linear_scan(later.flip(1), gradient.flip(1), torch.zeros_like(initial)).flip(1)
    before = torch.cat([initial.unsqueeze(1), h[:, :-1]], dim=1)
    return (g * before).sum_to_size(decay.shape), g, (decay[:, 0] * g[:, 0])


_linear_scan.register_autograd(_linear_scan_backward, setup_context=_save_linear)


# ---- Mamba's scan

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("headspring::selective_scan", mutates_args=())
def _selective_scan(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    initial: torch.Tensor,
    starts: torch.Tensor | None,
) -> Tensors:
    """y, the last state, and the states before each block (B, blocks, E, N), from which a backward pass makes the rest."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    edges, h = [], initial
    for start in range(0, x.shape[1], BLOCK):
        span = slice(start, start + BLOCK)
        edges.append(h)
        _, states = _states(x[:, span], step[:, span], a, b[:, span], h, None if starts is None else starts[:, span])
        torch.matmul(states, c[:, span, :, None], out=y[:, span].unsqueeze(-1))
        h = states[:, -1]
    return y, h.clone(), torch.stack(edges, dim=1)


def _states(x, step, a, b, h, starts):
    """Decays and states (B, T, E, N) of a block that follows the state h."""
    decay = (step.unsqueeze(-1) * a).exp_()
    if starts is not None:
        decay.masked_fill_(starts[:, :, None, None], 0.0)
    states = (step * x).unsqueeze(-1) * b.unsqueeze(2)
    for decay_t, states_t in zip(decay.unbind(1), states.unbind(1)):
        h = states_t.addcmul_(decay_t, h)
    return decay, states


@_selective_scan.register_fake
def _(x, step, a, b, c, initial, starts):
    blocks = (x.shape[1] + BLOCK - 1) // BLOCK
    edges = initial.new_empty(initial.shape[0], blocks, *initial.shape[1:])
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(initial), edges


@torch.library.custom_op("headspring::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad_y: torch.Tensor,
    grad_last: torch.Tensor,
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    edges: torch.Tensor,
    starts: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of x, step, a, b, c and the initial state, block by block from the end."""
    grad_x, grad_step, grad_b, grad_c = (torch.empty_like(t) for t in (x, step, b, c))
    grad_a, g = torch.zeros_like(a), grad_last
    for block in reversed(range(edges.shape[1])):
        span = slice(block * BLOCK, (block + 1) * BLOCK)
        x_t, step_t, b_t, upstream = x[:, span], step[:, span], b[:, span], grad_y[:, span]
        before = edges[:, block]
        decay, h = _states(x_t, step_t, a, b_t, before, None if starts is None else starts[:, span])
        grad_c[:, span] = (upstream.unsqueeze(2) @ h).squeeze(2)
        # g_t = grad_y_t c_tᵀ + decay_{t+1} ⊙ g_{t+1}, where g is handed over with its decay
        grad_h = upstream.unsqueeze(-1) * c[:, span].unsqueeze(2)
        for decay_t, grad_t in zip(reversed(decay.unbind(1)), reversed(grad_h.unbind(1))):
            g = decay_t * grad_t.add_(g)
        grad_u = (grad_h @ b_t.unsqueeze(-1)).squeeze(-1)  # u = step ⊙ x
        grad_b[:, span] = ((step_t * x_t).unsqueeze(2) @ grad_h).squeeze(2)
        # d exp(step a) : g_t ⊙ h_{t−1} ⊙ decay_t
        decay.mul_(grad_h)
        decay[:, 1:].mul_(h[:, :-1])
        decay[:, 0].mul_(before)
        grad_a += torch.einsum("bten,bte->en", decay, step_t)
        grad_step[:, span] = torch.einsum("bten,en->bte", decay, a) + grad_u * x_t
        grad_x[:, span] = grad_u * step_t
    return [grad_x, grad_step, grad_a, grad_b, grad_c, g.clone()]


@_selective_scan_backward.register_fake
def _(grad_y, grad_last, x, step, a, b, c, edges, starts):
    return [torch.empty_like(t) for t in (x, step, a, b, c, grad_last)]


def _save_selective(ctx, inputs, output):
    x, step, a, b, c, _, starts = inputs
    ctx.save_for_backward(x, step, a, b, c, output[2], *([] if starts is None else [starts]))


def _selective_scan_autograd(ctx, grad_y, grad_last, _):
    x, step, a, b, c, edges, *starts = ctx.saved_tensors
    made = torch.ops.headspring.selective_scan_backward(
        grad_y.contiguous(), grad_last.contiguous(), x, step, a, b, c, edges, starts[0] if starts else None
    )
    return (*made, None)


_selective_scan.register_autograd(_selective_scan_autograd, setup_context=_save_selective)
