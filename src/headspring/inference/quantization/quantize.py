"""A model of floats → its matrices of whole numbers, by one of the schemes.

GPTQ goes block by block: a block's matrices are rounded for the inputs that the blocks before it, rounded already, give
them, and its outputs are what the next one calibrates on. So an error is answered by everything after it. One block's Hessians
are in memory at a time, and the calibration text passes through each block twice.

An expert calibrates on the rows that were routed to it. One that saw fewer than a quarter as many as it has inputs would be
fitted to those few: it is rounded to the nearest, and a note says so.
"""

from collections.abc import Mapping

import torch

from headspring.artifacts import UserError
from headspring.artifacts.progress import task
from headspring.inference.quantization.calibration import ROWS_TOGETHER, Seen, enter, expert_hessians, hessians
from headspring.inference.quantization.gptq import gptq_int4
from headspring.inference.quantization.rounding import round_int4, round_int8
from headspring.inference.quantization.scheme import Quantization
from headspring.inference.quantization.targets import Targets, targets_of, weight_of
from headspring.models.around import AroundModule
from headspring.models.model import ModelModule
from headspring.models.moe import Experts
from headspring.models.part import Linear
from headspring.models.quantized import QuantizedMatrix, beside
from headspring.models.stack import StackModule

Matrices = dict[str, QuantizedMatrix]


def quantize(
    model: ModelModule, scheme: Quantization, rows: torch.Tensor | None = None, notes: list[str] | None = None
) -> Matrices:
    """The matrices of `model` as whole numbers, by the name of their parameter. `rows` (N, T) int64 are what GPTQ reads; it
    leaves the model's own weights rounded. `notes` is told, a line each, of what was done in another way than `scheme` says.

    Raises `UserError` for a model, or a scheme of it, that cannot be.
    """
    targets = targets_of(model)
    found = (
        {}
        if scheme.method != "int4-gptq"
        else _by_gptq(_stack_of(model), targets, scheme, rows, [] if notes is None else notes)
    )
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
def _by_gptq(
    stack: StackModule, targets: Targets, scheme: Quantization, rows: torch.Tensor | None, notes: list[str]
) -> Matrices:
    if rows is None:
        raise UserError("int4-gptq needs text to calibrate on")
    names = {module: name for name, module in targets.linears.items()}
    batches = [enter(stack, batch.to(stack.device)) for batch in rows.split(ROWS_TOGETHER)]
    streams, contexts = [x for x, _ in batches], [context for _, context in batches]
    found: Matrices = {}
    with task("GPTQ, layers", len(stack.layers)) as bar:
        for block in stack.layers:
            inside = {names[part]: part for part in block.modules() if isinstance(part, Linear) and part in names}
            experts = {prefix: part for prefix, part in targets.experts.items() if part in set(block.modules())}
            with hessians(inside) as sums, expert_hessians(experts) as seen:
                for x, context in zip(streams, contexts):
                    block(x, context)
            found |= _block_by_gptq(inside, sums, scheme) | _experts_by_gptq(experts, seen, scheme, notes)
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


def _experts_by_gptq(
    layers: Mapping[str, Experts], seen: Mapping[tuple[str, ...], Seen], scheme: Quantization, notes: list[str]
) -> Matrices:
    """Each expert by what it saw; its own weights become what the numbers mean."""
    found: Matrices = {}
    for names, what in seen.items():
        experts = layers[names[0].rpartition(".")[0]]
        weights = [getattr(experts, name.rpartition(".")[2]) for name in names]
        group = scheme.group_for(weights[0].shape[2])
        if group is None:
            continue
        enough, inputs = [4 * count >= weights[0].shape[2] for count in what.counts], weights[0].shape[2]
        rounded = []
        for expert, hessian in enumerate(what.sums):
            together = torch.cat([weight[expert] for weight in weights])
            matrix = (
                gptq_int4(together, hessian, group, scheme.minimum)
                if enough[expert]
                else round_int4(together, group, scheme.minimum)
            )
            rounded.append(matrix.split([weight.shape[1] for weight in weights]))
        for name, weight, matrices in zip(names, weights, zip(*rounded)):
            found[name] = beside(matrices)
            weight.copy_(found[name].dequantized().view(weight.shape))
        few = [str(expert) for expert, fine in enumerate(enough) if not fine]
        if few:
            notes.append(
                f"{', '.join(names)}: rounded to the nearest for experts {', '.join(few)}, which saw fewer than "
                f"{-(-inputs // 4)} tokens of the calibration text"
            )
    return found
