"""Packing whole models: every `Linear` and the head of a model get packed matrices, joined where a module multiplies several at
once and laid side by side in memory; and back.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headspring.artifacts.errors import UserError
from headspring.models import kernels
from headspring.models.kernels.huge_pages import LINE, WORTHWHILE, Room
from headspring.models.kernels.packed import PANEL, Kind, PackedMatrix, join, pack_bf16, round_to_int8

if TYPE_CHECKING:
    from headspring.models.model import ModelModule
    from headspring.models.moe import Experts
    from headspring.models.part import Linear


def pack_model(model: "ModelModule", kind: Kind = "bf16", release: bool = False) -> None:
    """Prepare a model for serving: every `Linear` and the head multiply by packed matrices from now on.

    Matrices that a module multiplies at once (its `joins`) become one. kind "int8" rounds to the nearest of 255 values an
    output; matrices that are packed already stay as they are. `release` gives the memory of the float weights back: the model
    can then no longer be saved, trained or packed anew.
    """
    packers = {"bf16": (pack_bf16, 2), "int8": (round_to_int8, 1)}
    if kind not in packers:
        raise UserError(f"pack_model packs bf16 or int8, not {kind!r}: give each Linear its `packed` (inference/quantization)")
    pack, bytes = packers[kind]
    units, head = _unpacked(model), model.output_weight if model.packed_head is None else None
    room = _room([part.weight for parts in units for part in parts] + ([] if head is None else [head]), bytes)
    for parts in units:
        whole = pack(torch.cat([part.weight.detach() for part in parts]) if len(parts) > 1 else parts[0].weight, room)
        if len(parts) > 1:
            parts[0].joined = whole
            _share(parts)
        else:
            parts[0].packed = whole
        for part in parts:
            part.packed_version = version(part.weight)
    for experts in expert_parts(model):
        experts.pack(kind)
    if head is not None:
        model.packed_head, model.packed_head_version = pack(head, room), version(head)
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


def expert_parts(model: "ModelModule") -> "list[Experts]":
    """The experts of a model's mixtures, which pack themselves."""
    from headspring.models.moe import Experts

    return [module for module in model.modules() if isinstance(module, Experts)]


def _unpacked(model: "ModelModule") -> "list[list[Linear]]":
    """What is to be packed, in the order of the model: each `Linear` alone, or those that are multiplied at once and can be cut
    apart again (their outputs fill panels)."""
    loose = [part for part in packable(model).values() if part.packed is None]
    units = {part: [part] for part in loose}
    for parts in _joined_groups(model):
        alike = all(part in units and part.weight.shape[1] == parts[0].weight.shape[1] for part in parts)
        if alike and all(part.weight.shape[0] % PANEL == 0 for part in parts[:-1]):
            units[parts[0]] = parts
            for part in parts[1:]:
                del units[part]
    return list(units.values())


def _room(weights: Sequence[torch.Tensor], bytes: int) -> Room | None:
    """For packed matrices of so many bytes a weight. None where huge pages would not help."""
    size = sum(-(-len(weight) // PANEL) * PANEL * -(-weight.shape[1] // LINE) * LINE * bytes for weight in weights)
    return None if size < WORTHWHILE or any(weight.device.type != "cpu" for weight in weights) else Room(size)


def join_parts(model: "ModelModule") -> None:
    """Join what modules multiply at once, where it has one form, and lay all matrices side by side in memory.

    The parts become views of the whole where their outputs fill panels.
    """
    groups = _joined_groups(model)
    loose = [parts for parts in groups if parts[0].joined is None and _alike(parts)]
    joined = [parts for parts in groups if parts[0].joined is not None]
    places = _places(model, {part for parts in (*loose, *joined) for part in parts})
    matrices = [*(part.packed for parts in loose for part in parts if part.packed is not None), *(at[2] for at in places)]
    room = _common_room(matrices)
    for parts in loose:
        parts[0].joined = join([part.packed for part in parts if part.packed is not None], room)
    if room is not None:
        _settle([*places, *((parts[0], "joined", parts[0].joined) for parts in loose if parts[0].joined is not None)], room)
    for parts in groups:
        _share(parts)


def _alike(parts: "list[Linear]") -> bool:
    matrices = [part.packed for part in parts if part.packed is not None]
    return len(matrices) == len(parts) and all(matrix.form == matrices[0].form for matrix in matrices)


def _joined_groups(model: "ModelModule") -> "list[list[Linear]]":
    joins = ((module, names) for module in model.modules() for names in getattr(module, "joins", ()))
    return [[getattr(module, name) for name in names] for module, names in joins]


def _share(parts: "list[Linear]") -> None:
    whole, start = parts[0].joined, 0
    if whole is None or any(part.weight.shape[0] % PANEL for part in parts[:-1]):
        return
    for part in parts:
        part.packed, start = whole.part(start, start + part.weight.shape[0]), start + part.weight.shape[0]


def _places(model: "ModelModule", within: "set[Linear]") -> list[tuple[nn.Module, str, PackedMatrix]]:
    """Where products find matrices: (module, attribute, matrix). `within` are parts of joined matrices."""
    names = ("joined", "packed", "packed_head")
    places = [(module, name) for module in model.modules() for name in names if vars(module).get(name) is not None]
    return [(*place, getattr(*place)) for place in places if place[1] != "packed" or place[0] not in within]


def _common_room(matrices: Sequence[PackedMatrix]) -> Room | None:
    """A new block for all of these, or None where they share one already, or would not gain by it."""
    distinct = {id(matrix): matrix for matrix in matrices}.values()  # a head may be an embedding, too
    memories = {matrix.values.untyped_storage().data_ptr() for matrix in distinct}
    size = sum(-(-tensor.nbytes // LINE) * LINE for matrix in distinct for tensor in matrix.tensors.values())
    elsewhere = any(matrix.device.type != "cpu" for matrix in distinct)
    return None if size < WORTHWHILE or len(memories) == 1 or elsewhere else Room(size)


def _settle(places: Sequence[tuple[nn.Module, str, PackedMatrix]], room: Room) -> None:
    """Move into one block of memory, in this order, what does not lie there yet."""
    moved: dict[int, PackedMatrix] = {}
    for module, name, matrix in places:
        if id(matrix) not in moved:
            tensors: dict[str, Any] = {part: room.copied(tensor) for part, tensor in matrix.tensors.items()}
            moved[id(matrix)] = replace(matrix, **tensors)
        setattr(module, name, moved[id(matrix)])


def release_weights(model: "ModelModule") -> None:
    """Give back the memory of packed weights. NaN stands in their place, so that a forgotten reader is seen at once."""
    for part in packable(model).values():
        if part.packed is not None:
            part.weight.data = torch.full((1,), torch.nan, dtype=part.weight.dtype).expand(part.weight.shape)
    for experts in expert_parts(model):
        if experts.packed_experts is not None:
            for weight in (experts.gate, experts.up, experts.out):
                weight.data = torch.full((1,), torch.nan, dtype=weight.dtype).expand(weight.shape)
    model.released = True


def unpack_model(model: "ModelModule") -> None:
    """Undo `pack_model`: float weights multiply again. A model whose weights were released has none."""
    if model.released:
        raise UserError("this model's float weights were released when it was packed: load it again")
    for part in packable(model).values():
        part.packed = part.joined = None
    for experts in expert_parts(model):
        experts.packed_experts = None
    model.packed_head = None
