"""Data parallelism over the processes that `torchrun` starts: gloo on CPUs, NCCL on GPUs.

Every process holds the whole model, works on its slice of the step's samples, and sums gradients in one flat buffer.
Nothing else in the house knows how many processes there are.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist


def start(device: torch.device) -> None:
    """Join the group that `torchrun` describes in the environment, if there is one and it is not joined yet."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def rank() -> int:
    """This process's number; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence, size: int | None = None, place: int | None = None) -> Sequence:
    """This process's contiguous slice of `items`; slices differ by at most one in length."""
    size, place = size or world_size(), rank() if place is None else place
    return items[len(items) * place // size : len(items) * (place + 1) // size]


def sum_across(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum every parameter's gradient over all processes, through one flat buffer. A missing gradient counts as zero."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    start_at = 0
    for parameter in parameters:
        end = start_at + parameter.numel()
        parameter.grad.copy_(flat[start_at:end].view_as(parameter))  # type: ignore[union-attr]
        start_at = end


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()
