"""Whole numbers into a model, and out of it again.

`install` packs each matrix for the products of this machine and gives the memory of the float weights back. `installed`
reads a model's matrices out of their packed form, for saving; `restore` makes them floats again, for other formats.
"""

from collections.abc import Mapping

import torch

from headspring.inference.quantization.targets import output_of
from headspring.models.embedding import Table
from headspring.models.kernels.packed import PackedMatrix, pack_groups, pack_int8
from headspring.models.kernels.packing import join_parts, release_weights, unpack_model
from headspring.models.model import ModelModule
from headspring.models.part import Linear
from headspring.models.quantized import QuantizedMatrix


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
        packed = pack(matrix)
        if parameter is output:  # also of a body inside, which has the same head
            for module in model.modules():
                if isinstance(module, ModelModule) and output_of(module) is parameter:
                    module.packed_head = packed
        if isinstance(owner, Linear | Table):
            owner.packed = packed
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
    return found


def restore(model: ModelModule, dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter of a quantized model the numbers that its whole numbers mean, in `dtype`."""
    for name, matrix in installed(model).items():
        model.get_parameter(name).data = matrix.dequantized().to(dtype)
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
