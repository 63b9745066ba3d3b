"""Packing whole models: every `Linear` and the head of a model get packed matrices, joined where a module multiplies several at
once and laid side by side in memory; and back.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headspring.artifacts.errors import UserError
from headspring.models import kernels
from headspring.models.kernels.huge_pages import WORTHWHILE, side_by_side
from headspring.models.kernels.packed import PANEL, Kind, join, pack_bf16, round_to_int8

if TYPE_CHECKING:
    from headspring.models.model import ModelModule
    from headspring.models.part import Linear


def pack_model(model: "ModelModule", kind: Kind = "bf16", release: bool = False) -> None:
    """Prepare a model for serving: every `Linear` and the head multiply by packed matrices from now on.

    Matrices that a module multiplies at once (its `joins`) become one. kind "int8" rounds to the nearest of 255 values an
    output; matrices that are packed already stay as they are. `release` gives the memory of the float weights back: the model
    can then no longer be saved, trained or packed anew.
    """
    pack = {"bf16": pack_bf16, "int8": round_to_int8}.get(kind)
    if pack is None:
        raise UserError(f"pack_model packs bf16 or int8, not {kind!r}: give each Linear its `packed` (inference/quantization)")
    for part in packable(model).values():
        if part.packed is None:
            part.packed, part.packed_version = pack(part.weight), version(part.weight)
    head = model.output_weight
    if head is not None and model.packed_head is None:
        model.packed_head, model.packed_head_version = pack(head), version(head)
    join_parts(model)
    if release:
        release_weights(model)


def pack_for_serving(model: "ModelModule") -> None:
    """Pack in bfloat16 whatever is not packed yet, where native products read it, and again what has changed since.

    The float weights stay. Where a forward pass wants gradients, a `Linear` drops its packed matrix and learns.
    """
    if model.compute_dtype != torch.bfloat16 or not kernels.multiplies_natively(torch.empty(0, dtype=torch.bfloat16)):
        return
    for part in packable(model).values():
        if part.packed is not None and part.packed.kind == "bf16" and part.packed_version != version(part.weight):
            part.unpack()
    for parts in _joined_groups(model):
        if parts[0].joined is not None and any(part.packed is None for part in parts):  # one of them has changed
            for part in parts:
                part.unpack()
    head = model.output_weight
    held = model.packed_head
    stale = head is not None and held is not None and held.kind == "bf16" and model.packed_head_version != version(head)
    if stale and not model.released:
        model.packed_head = None
    pack_model(model)


def version(weight: torch.Tensor) -> int:
    """Grows with every change in place."""
    return 0 if weight.is_inference() else weight._version


def packable(model: "ModelModule") -> dict[str, "Linear"]:
    """Every `Linear` by name, except those whose weight a module reads as it is (`reads_weights`)."""
    from headspring.models.part import Linear

    found: dict[str, Linear] = {}
    for prefix, module in model.named_modules():
        read = getattr(module, "reads_weights", ())
        parts = ((name, part) for name, part in module.named_children() if isinstance(part, Linear) and name not in read)
        found |= {f"{prefix}.{name}".lstrip("."): part for name, part in parts}
    return found


def join_parts(model: "ModelModule") -> None:
    """Join what modules multiply at once, where it has one form, and lay all matrices side by side in memory.

    The parts become views of the whole where their outputs fill panels.
    """
    groups = _joined_groups(model)
    for parts in groups:
        matrices = [part.packed for part in parts if part.packed is not None]
        alike = len(matrices) == len(parts) and all(matrix.form == matrices[0].form for matrix in matrices)
        if alike and parts[0].joined is None:
            parts[0].joined = join(matrices)
    _settle(model, {part for parts in groups if parts[0].joined is not None for part in parts})
    for parts in groups:
        _share(parts)


def _joined_groups(model: "ModelModule") -> "list[list[Linear]]":
    joins = ((module, names) for module in model.modules() for names in getattr(module, "joins", ()))
    return [[getattr(module, name) for name in names] for module, names in joins]


def _share(parts: "list[Linear]") -> None:
    whole, start = parts[0].joined, 0
    if whole is None or any(part.weight.shape[0] % PANEL for part in parts[:-1]):
        return
    for part in parts:
        part.packed, start = whole.part(start, start + part.weight.shape[0]), start + part.weight.shape[0]


def _settle(model: "ModelModule", within: "set[Linear]") -> None:
    """Move what products read into one block of memory, layer by layer. `within` are parts of joined matrices."""
    names = ("joined", "packed", "packed_head")
    places = [(module, name) for module in model.modules() for name in names if name in vars(module)]
    held = [(*place, getattr(*place)) for place in places if place[1] != "packed" or place[0] not in within]
    matrices = {id(matrix): matrix for _, _, matrix in held if matrix is not None}  # a head may be an embedding, too
    memories = {matrix.values.untyped_storage().data_ptr() for matrix in matrices.values()}
    small = sum(matrix.bytes for matrix in matrices.values()) < WORTHWHILE
    if small or len(memories) == 1 or any(matrix.device.type != "cpu" for matrix in matrices.values()):
        return
    copies = iter(side_by_side([tensor for matrix in matrices.values() for tensor in matrix.tensors.values()]))
    moved = {key: replace(matrix, **{name: next(copies) for name in matrix.tensors}) for key, matrix in matrices.items()}
    for module, name, matrix in held:
        if matrix is not None:
            setattr(module, name, moved[id(matrix)])


def release_weights(model: "ModelModule") -> None:
    """Give back the memory of packed weights. NaN stands in their place, so that a forgotten reader is seen at once."""
    for part in packable(model).values():
        if part.packed is not None:
            part.weight.data = torch.full((1,), torch.nan, dtype=part.weight.dtype).expand(part.weight.shape)
    model.released = True


def unpack_model(model: "ModelModule") -> None:
    """Undo `pack_model`: float weights multiply again. A model whose weights were released has none."""
    if model.released:
        raise UserError("this model's float weights were released when it was packed: load it again")
    for part in packable(model).values():
        part.packed = part.joined = None
    model.packed_head = None
