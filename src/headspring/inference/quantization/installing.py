"""Whole numbers into a model, and out of it again.

`install` packs each matrix for the products of this machine and gives the memory of the float weights back. `installed`
reads a model's matrices out of their packed form, for saving; `restore` makes them floats again, for other formats.
"""

from collections.abc import Mapping

import torch

from headspring.inference.quantization.targets import MATRICES, output_of
from headspring.models.embedding import Table
from headspring.models.expert_matrices import PackedExperts
from headspring.models.kernels.packed import PackedMatrix, pack_groups, pack_int8
from headspring.models.kernels.packing import join_parts, release_weights, unpack_model
from headspring.models.model import ModelModule
from headspring.models.moe import Experts
from headspring.models.part import Linear
from headspring.models.quantized import QuantizedMatrix, beside


def pack(matrix: QuantizedMatrix) -> PackedMatrix:
    """In the layout that a product reads."""
    if matrix.by_channel:
        return pack_int8(matrix.values, matrix.scales[:, 0])
    return pack_groups(matrix.values, matrix.scales, matrix.minimums, matrix.bits)


def unpack(packed: PackedMatrix) -> QuantizedMatrix:
    """The inverse of `pack`."""
    values, scales, minimums = packed.unpacked
    assert scales is not None, "a matrix in bfloat16 is none of whole numbers"
    return QuantizedMatrix(values, scales.view(len(values), -1), minimums, packed.bits)


def install(model: ModelModule, matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Let `matrices`, by the name of their parameter, take the place of its float weights, which are released.

    The model can then be asked and saved, but not trained."""
    output = output_of(model)
    for name, matrix in matrices.items():
        owner, parameter = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        if isinstance(owner, Experts):
            continue
        packed = pack(matrix)
        if parameter is output:  # also of a body inside, which has the same head
            for module in model.modules():
                if isinstance(module, ModelModule) and output_of(module) is parameter:
                    module.packed_head = packed
        if isinstance(owner, Linear | Table):
            owner.packed = packed
    for prefix, experts in model.named_modules():
        if isinstance(experts, Experts) and f"{prefix}.gate" in matrices:
            named = {name: matrices[f"{prefix}.{name}"] for name in MATRICES}
            experts.packed_experts = PackedExperts.of(*(_each(matrix, len(experts.gate)) for matrix in named.values()))
    join_parts(model)
    release_weights(model)
    for name in matrices:
        parameter = model.get_parameter(name)
        if parameter.untyped_storage().nbytes() > parameter.element_size():  # a table, which is not a `Linear`
            parameter.data = torch.full((1,), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
    model.requires_grad_(False)


def installed(model: ModelModule) -> dict[str, QuantizedMatrix]:
    """The matrices of whole numbers by the name of their parameter; {} for a model of plain weights."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Linear | Table) and module.packed is not None and module.packed.kind != "bf16":
            found[f"{prefix}.weight".lstrip(".")] = unpack(module.packed)
        if isinstance(module, Experts) and module.packed_experts is not None and module.packed_experts.kind != "bf16":
            found |= {f"{prefix}.{name}": matrix for name, matrix in _of_experts(module, module.packed_experts).items()}
    return found


def _each(matrix: QuantizedMatrix, experts: int) -> list[PackedMatrix]:
    """The packed matrix of each expert, from all their rows one after the other."""
    return [pack(part) for part in matrix.split([matrix.shape[0] // experts] * experts)]


def _of_experts(module: Experts, packed: PackedExperts) -> dict[str, QuantizedMatrix]:
    """`gate`, `up` and `out`: all experts' rows one after the other."""
    inward = [[unpack(matrix) for matrix in matrices] for matrices in packed.inward]
    rows = module.gate.shape[1]
    pairs = [part[0].split([rows, rows]) if len(part) == 1 else part for part in inward]
    found = {"gate": [pair[0] for pair in pairs], "up": [pair[1] for pair in pairs], "out": list(map(unpack, packed.outward))}
    return {name: beside(matrices) for name, matrices in found.items()}


def restore(model: ModelModule, dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter of a quantized model the numbers that its whole numbers mean, in `dtype`."""
    for name, matrix in installed(model).items():
        parameter = model.get_parameter(name)
        parameter.data = matrix.dequantized().to(dtype).view(parameter.shape)
    for module in model.modules():
        if isinstance(module, Table):
            module.packed = None
        if isinstance(module, ModelModule):
            module.released = False
            module.packed_head = None
    unpack_model(model)
    model.to(dtype).requires_grad_(True)
    model.compute_dtype = dtype


def plain(model: ModelModule, dtype: torch.dtype) -> None:
    """Cast the matrices that are floats still to `dtype`; vectors keep their precision, which costs nothing."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_contiguous():  # a stand-in is not
            parameter.data = parameter.data.to(dtype)
