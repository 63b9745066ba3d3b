"""A model of floats → its matrices of whole numbers, by one of the schemes.

GPTQ goes block by block: a block's matrices are rounded for the inputs that the blocks before it, rounded already, give
them, and its outputs are what the next one calibrates on. So an error is answered by everything after it. One block's Hessians
are in memory at a time, and the calibration text passes through each block twice.
"""

from collections.abc import Mapping

import torch

from headspring.artifacts import UserError
from headspring.artifacts.progress import task
from headspring.inference.quantization.calibration import ROWS_TOGETHER, enter, hessians
from headspring.inference.quantization.gptq import gptq_int4
from headspring.inference.quantization.rounding import round_int4, round_int8
from headspring.inference.quantization.scheme import Quantization
from headspring.inference.quantization.targets import Targets, targets_of, weight_of
from headspring.models.around import AroundModule
from headspring.models.model import ModelModule
from headspring.models.part import Linear
from headspring.models.quantized import QuantizedMatrix
from headspring.models.stack import StackModule

Matrices = dict[str, QuantizedMatrix]


def quantize(model: ModelModule, scheme: Quantization, rows: torch.Tensor | None = None) -> Matrices:
    """The matrices of `model` as whole numbers, by the name of their parameter. `rows` (N, T) int64 are what GPTQ reads; it
    leaves the model's own weights rounded.

    Raises `UserError` for a model, or a scheme of it, that cannot be.
    """
    targets = targets_of(model)
    found = {} if scheme.method != "int4-gptq" else _by_gptq(_stack_of(model), targets, scheme, rows)
    with task("quantizing", len(targets.names)) as bar:
        for name in targets.names:
            if name not in found:
                found[name] = _rounded(weight_of(model, name), scheme, is_head=name == targets.head)
            bar.advance(1)
    return {name: found[name] for name in targets.names}


def _rounded(weight: torch.Tensor, scheme: Quantization, *, is_head: bool) -> QuantizedMatrix:
    group = scheme.group_for(weight.shape[1])
    if is_head or scheme.bits == 8 or group is None:
        return round_int8(weight, group)
    return round_int4(weight, group, scheme.minimum)


def _stack_of(model: ModelModule) -> StackModule:
    """The blocks that text passes through one after the other."""
    stack = model.body if isinstance(model, AroundModule) else model
    if not isinstance(stack, StackModule):
        raise UserError(f"int4-gptq walks a stack of blocks, and a {model.config.kind!r} is none; use int4 or int8")
    return stack


@torch.no_grad()
def _by_gptq(stack: StackModule, targets: Targets, scheme: Quantization, rows: torch.Tensor | None) -> Matrices:
    if rows is None:
        raise UserError("int4-gptq needs text to calibrate on")
    names = {module: name for name, module in targets.linears.items()}
    batches = [enter(stack, batch.to(stack.device)) for batch in rows.split(ROWS_TOGETHER)]
    streams, contexts = [x for x, _ in batches], [context for _, context in batches]
    found: Matrices = {}
    with task("GPTQ, layers", len(stack.layers)) as bar:
        for block in stack.layers:
            inside = {names[part]: part for part in block.modules() if isinstance(part, Linear) and part in names}
            with hessians(inside) as sums:
                for x, context in zip(streams, contexts):
                    block(x, context)
            found |= _block_by_gptq(inside, sums, scheme)
            streams = [block(x, context) for x, context in zip(streams, contexts)]
            bar.advance(1)
    return found


def _block_by_gptq(
    linears: Mapping[str, Linear], sums: Mapping[tuple[str, ...], torch.Tensor], scheme: Quantization
) -> Matrices:
    """The matrices that share a Hessian, walked as one; the block's own weights become what they mean."""
    found: Matrices = {}
    for names, hessian in sums.items():
        parts = [linears[name] for name in names]
        group = scheme.group_for(parts[0].weight.shape[1])
        if group is None or any(name in found for name in names):
            continue
        together = gptq_int4(torch.cat([part.weight for part in parts]), hessian.cpu(), group, scheme.minimum)
        for name, part, matrix in zip(names, parts, together.split([len(part.weight) for part in parts])):
            found[name] = matrix
            part.weight.copy_(matrix.dequantized())
    return found
