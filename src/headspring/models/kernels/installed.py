"""Fused kernels of other projects, where they are installed and a tensor is on a GPU: `mamba_ssm`, `causal_conv1d`, `fla`.

    pip install mamba-ssm causal-conv1d flash-linear-attention

Each function here has the meaning of its plain version and gives None where no kernel applies: the caller goes on in plain
torch. A kernel applies to activations in bfloat16 or float16 only. (Products of float32 run in 10-bit precision in some of
them, and float32 is what somebody asks for who wants the digits.) Rows with several documents or padding stay plain, too.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

PLACES = {
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "causal_conv1d_fn": "causal_conv1d",
    "chunk_simple_gla": "fla.ops.simple_gla",
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
}
HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def kernel(name: str) -> Callable[..., Any] | None:
    """The kernel of this name, or None where its package is not installed or does not work here."""
    try:
        return getattr(importlib.import_module(PLACES[name]), name)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None


def applies(x: torch.Tensor, activations: torch.dtype, starts: torch.Tensor | None) -> bool:
    """Whether a kernel may stand in for tensors like `x` whose activations have this dtype."""
    return x.device.type == "cuda" and activations in HALVES and starts is None and not torch.compiler.is_compiling()


def selective_scan(x, step, a, b, c) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`scan.selective_scan` from an empty memory, which is the only one that this kernel knows."""
    run = kernel("selective_scan_fn")
    if run is None:
        return None
    by_channel = (part.transpose(1, 2).contiguous() for part in (x, step))
    shared = (part.transpose(1, 2).unsqueeze(1).contiguous() for part in (b, c))  # (B, 1, N, T): one group
    y, last = run(*by_channel, a, *shared, return_last_state=True)
    return y.transpose(1, 2), last


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """A causal convolution of x (B, T, E) by weight (E, W), from an empty window."""
    run = kernel("causal_conv1d_fn")
    return None if run is None else run(x.transpose(1, 2), weight, bias).transpose(1, 2)


def decayed(q, k, v, log_decay, initial, dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`chunked.decayed`, its products in `dtype`."""
    run = kernel("chunk_simple_gla")
    if run is None:
        return None
    repeat = v.shape[2] // q.shape[2]
    q, k = (part.repeat_interleave(repeat, dim=2) for part in (q, k))
    inputs = (part.to(dtype).contiguous() for part in (q, k, v))
    y, last = run(*inputs, g=log_decay, scale=1.0, initial_state=initial, output_final_state=True)
    return y.to(v.dtype), last.to(v.dtype)


def delta(q, k, v, log_decay, beta, initial, dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`chunked.delta`, its products in `dtype`."""
    run = kernel("chunk_gated_delta_rule")
    if run is None:
        return None
    inputs = (part.to(dtype).contiguous() for part in (q, k, v))
    last: torch.Tensor
    y, last = run(*inputs, log_decay, beta.to(dtype), scale=1.0, initial_state=initial, output_final_state=True)
    return y.to(v.dtype), last.to(v.dtype)
