"""Which parameters of a model become whole numbers, and which stay as they are.

| parameter | becomes |
| --- | --- |
| the matrix of a `Linear` | 8 or 4 bits |
| the head's matrix, also where it is the embedding | 8 bits in every scheme: each of its rows is one token |
| an embedding that is no head, positions | stays: it is read a row at a time, never multiplied |
| the matrices of experts | as those of a `Linear`, each expert's rows by themselves |
| norms, biases, convolutions, gates of a decay, routers, recurrent matrices | stay |
| a `Linear` with fewer than 32 inputs or outputs | stays: a few numbers (a gate for each head) that much hangs on |
| a `Linear` whose owner reads its numbers (`reads_weights`) | stays: absorbed projections of latent attention |
"""

from dataclasses import dataclass

import torch

from headspring.artifacts import UserError
from headspring.models.model import ModelModule
from headspring.models.moe import Experts
from headspring.models.part import Linear, PartModule

SMALLEST = 32
MATRICES = ("gate", "up", "out")  # of experts


@dataclass(frozen=True)
class Targets:
    """`linears` by the name of their weight; `experts` by the name of their module, each with three parameters of `MATRICES`;
    `head`, the name of the output matrix, or None."""

    linears: dict[str, Linear]
    experts: dict[str, Experts]
    head: str | None

    @property
    def names(self) -> tuple[str, ...]:
        inside = (f"{prefix}.{name}" for prefix in self.experts for name in MATRICES)
        return (*self.linears, *inside, *([] if self.head is None else [self.head]))


def targets_of(model: ModelModule) -> Targets:
    """Raises `UserError` for a model that has nothing to quantize."""
    linears = {
        f"{prefix}.weight".lstrip("."): module
        for prefix, module in model.named_modules()
        if isinstance(module, Linear) and min(module.weight.shape) >= SMALLEST
    }
    for prefix, module in model.named_modules():
        if isinstance(module, PartModule):
            for name in module.reads_weights:
                linears.pop(f"{prefix}.{name}.weight".lstrip("."), None)
    experts = {
        prefix: module
        for prefix, module in model.named_modules()
        if isinstance(module, Experts) and min(module.gate.shape[1:]) >= SMALLEST
    }
    output = output_of(model)
    head = None if output is None else next((name for name, value in model.named_parameters() if value is output), None)
    if head is not None and (head in linears or min(model.get_parameter(head).shape) < SMALLEST):
        head = None
    if not linears and not experts and head is None:
        raise UserError(f"a model of kind {model.config.kind!r} with these sizes has no matrices that can be quantized")
    return Targets(linears, experts, head)


def output_of(model: ModelModule) -> torch.Tensor | None:
    """The head's matrix, or None where there is none."""
    try:
        return model.output_weight
    except UserError:  # an encoder that predicts no tokens
        return None


def weight_of(model: ModelModule, name: str) -> torch.Tensor:
    """A parameter's numbers as (O, I); those of experts one after the other. Raises `UserError` where they are not finite."""
    weight = model.get_parameter(name).detach()
    # A sum that is finite has finite parts, and takes a tenth of the time.
    if not bool(weight.sum().isfinite()) and not bool(weight.isfinite().all()):
        raise UserError(f"{name} holds numbers that are not finite: it cannot be quantized")
    return weight.flatten(0, -2)
