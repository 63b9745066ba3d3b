"""The recurrences token by token, as their papers write them: slow, obvious, and what everything else is held against.

All take and give tensors as `headspring.models.scan` and `.chunked` do. `starts` empties the memory before a token.
"""

import torch


def linear(decay, inputs, initial):
    """h_t = a_t h_{t−1} + b_t."""
    h, out = initial, []
    for t in range(inputs.shape[1]):
        h = decay[:, t] * h + inputs[:, t]
        out.append(h)
    return torch.stack(out, dim=1)


def selective(x, step, a, b, c, initial, starts=None):
    """Mamba: every channel e and number n by itself."""
    h, out = initial, []
    for t in range(x.shape[1]):
        h = emptied(h, starts, t)
        h = torch.exp(step[:, t, :, None] * a) * h + step[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        out.append((h * c[:, t, None]).sum(-1))
    return torch.stack(out, dim=1), h


def matrix(q, k, v, log_decay, initial, starts=None, beta=None):
    """S_t = α_t S_{t−1} + k_t v_tᵀ; with `beta` what S_{t-1} holds under k_t is taken away first."""
    repeat = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(repeat, dim=2), k.repeat_interleave(repeat, dim=2)
    memory, out = initial, []
    for t in range(v.shape[1]):
        memory = emptied(memory, starts, t)
        if log_decay is not None:
            memory = memory * log_decay[:, t, :, None, None].exp()
        written = v[:, t]
        if beta is not None:
            written = beta[:, t, :, None] * (written - torch.einsum("bhnp,bhn->bhp", memory, k[:, t]))
        memory = memory + torch.einsum("bhn,bhp->bhnp", k[:, t], written)
        out.append(torch.einsum("bhnp,bhn->bhp", memory, q[:, t]))
    return torch.stack(out, dim=1), memory


def convolution(x, weight, bias, starts):
    """y_t = Σ_i w_i x_{t−i} + b over the tokens of t's own document."""
    y = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            for i in range(weight.shape[-1]):
                if t - i < 0 or starts[row, t - i + 1 : t + 1].any():
                    break
                y[row, t] += weight[:, 0, -1 - i] * x[row, t - i]
    return y + bias


def emptied(memory, starts, t):
    return memory if starts is None else memory * (~starts[:, t]).reshape(-1, *[1] * (memory.dim() - 1))
