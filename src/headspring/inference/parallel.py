"""Tensor parallelism: one model over several devices, each holding some heads of every attention and some channels of every
feed-forward (arXiv 1909.08053).

    device 0   x ─┬─ q₀ k₀ v₀ ── heads 0 … H/2−1 ── out₀ ─┐
                  │                                        Σ ── x + …       one sum over the devices a branch
    device 1   x ─┴─ q₁ k₁ v₁ ── heads H/2 … H−1 ── out₁ ─┘

The matrices that read the stream are split by outputs, those that write to it by inputs, so that a branch needs one sum at its
end and nothing in between. It is the same module with fewer heads and narrower matrices: pages, kernels, sites and the engine
work as they are. The first process takes requests, and all make the same steps (`engine.processes`). A sum over processes gives
every one the same bits. Placement is PyTorch's (`DTensor`), and so are sums; processes come from `torchrun`.

What it gives up: embedding, norms and head are whole on every device; a sum over devices has another order than one matrix, so
that results equal one device's only up to rounding; and it is for inference, without gradients.
"""

import os
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from headspring.artifacts import UserError
from headspring.inference.engine.config import EngineConfig
from headspring.inference.engine.processes import FollowingEngine, LeadingEngine, ProcessLost, explain, noticing
from headspring.models.attention import AttentionModule
from headspring.models.feedforward import GatedModule, MLPModule
from headspring.models.model import ModelModule
from headspring.models.part import Linear

if TYPE_CHECKING:
    from headspring.inference.language_model import LanguageModel


def join(device_type: str = "cpu", timeout: float = 60.0) -> DeviceMesh:
    """The group of processes that `torchrun` started, as a mesh of one dimension: gloo on CPUs, NCCL on GPUs. A process that
    keeps the others waiting for a sum longer than `timeout` seconds counts as lost.

    Raises `UserError` where this process was started alone."""
    if "WORLD_SIZE" not in os.environ:
        raise UserError("tensor parallelism needs several processes: start with torchrun --nproc-per-node N")
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=timeout)), device_type)


def engine(lm: "LanguageModel", **options: Any) -> LeadingEngine | FollowingEngine:
    """The engine of this process, for a model that was `split`; all processes call it with the same `options`, the fields of
    `EngineConfig`. Where it `leads` it is used like any engine, and closed; elsewhere there is `follow()`."""
    kind = LeadingEngine if dist.get_rank() == 0 else FollowingEngine
    try:
        return kind(lm.model, lm.tokenizer, EngineConfig.of(**options))
    except ProcessLost as lost:
        explain(lost)


def split(model: ModelModule, mesh: DeviceMesh) -> ModelModule:
    """Keep this process's part of the model, in place; all processes call it with the same whole model.

    Raises `UserError`, before any weight is changed, where a part cannot be divided or is quantized."""
    count = mesh.size()
    for module in model.modules():
        if isinstance(module, Linear):
            module.unpack()  # an engine packs its part again
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, AttentionModule):
            _check_attention(name, module, count)
            plan[name] = _SplitHeads()
        elif isinstance(module, GatedModule | MLPModule):
            _check_divides(name, "channels", module.up.weight.shape[0], count)
            plan[name] = _SplitChannels()
    divisible = AttentionModule | GatedModule | MLPModule
    unknown = [type(part).__name__ for part in _branches(model) if not isinstance(part, divisible)]
    if unknown:
        raise UserError(f"tensor parallelism divides attention and feed-forward parts, and cannot divide a {unknown[0]}")
    for name, style in plan.items():
        parallelize_module(model.get_submodule(name), mesh, style)
    model.register_state_dict_pre_hook(_refuse_to_save)
    return model.requires_grad_(False)


def _branches(model: ModelModule) -> list[nn.Module]:
    """What adds to the stream in each block."""
    slots = (getattr(block, name) for block in model.blocks() for name in ("mixer", "cross", "feedforward"))
    return [slot.f for slot in slots if slot is not None]


def _check_attention(name: str, module: AttentionModule, count: int) -> None:
    _check_divides(name, "kv_heads", module.kv_heads, count)
    _check_divides(name, "heads", module.heads, count)
    if module.sinks is not None or module.position.biased:
        raise UserError(f"{name}: sinks and biases of single heads cannot be divided over {count} processes")


def _check_divides(name: str, what: str, size: int, count: int) -> None:
    if size % count:
        raise UserError(f"{name}: {size} {what} do not divide by {count} processes; use a number that divides them")


def _refuse_to_save(*_: Any) -> None:
    raise UserError("this process holds a part of the model only; save the model before it is split")


class _SplitHeads(ParallelStyle):
    """An attention with its share of the heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, AttentionModule)
        for part in (module.q, module.k, module.v):
            _by_outputs(part, device_mesh)
        _by_inputs(module.out, device_mesh)
        module.heads //= device_mesh.size()
        module.kv_heads //= device_mesh.size()
        return module


class _SplitChannels(ParallelStyle):
    """A feed-forward with its share of the hidden channels."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, GatedModule | MLPModule)
        for part in (module.gate, module.up) if isinstance(module, GatedModule) else (module.up,):
            _by_outputs(part, device_mesh)
        _by_inputs(module.out, device_mesh)
        return module


def _by_outputs(part: Linear, mesh: DeviceMesh) -> None:
    """Some of the rows of W and of b."""
    part.weight = _own(part.weight, mesh, 0)
    if part.bias is not None:
        part.bias = _own(part.bias, mesh, 0)


def _by_inputs(part: Linear, mesh: DeviceMesh) -> None:
    """Some of the columns of W; the answers of all processes are summed, in which b may stand once."""
    part.weight = _own(part.weight, mesh, 1)
    if part.bias is not None and mesh.get_local_rank() != 0:
        part.bias = nn.Parameter(torch.zeros_like(part.bias))
    part.register_forward_hook(partial(_summed, mesh))


def _own(parameter: torch.Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(dim)]).to_local())


def _summed(mesh: DeviceMesh, part: nn.Module, inputs: Any, y: torch.Tensor) -> torch.Tensor:
    with noticing():
        dist.all_reduce(y, group=mesh.get_group())
    return y


def leave() -> None:
    """End the group."""
    if dist.is_initialized():
        dist.destroy_process_group()
