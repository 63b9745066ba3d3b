"""Weight matrices in the layout that a product reads, in bfloat16 or in fewer bits, and what a product with them is.

A `PackedMatrix` is a frozen value: panels of 32 outputs, each read from front to back (`cpp/product.h` draws it). Three
kinds, and for each the definition of y = x Wᵀ in plain torch (`product_plain`), which the native products must equal: for the
integer kinds bit for bit, on every machine.

| kind | weights | activations | sums |
| --- | --- | --- | --- |
| bf16 | bfloat16 | as they are | float32, over the inputs in order |
| int8 | 8 bits, a scale an output | 8 bits, a scale a row | exact integers, scaled once |
| groups | 8 or 4 bits, a scale (and minimum) a group | 8 bits, a scale a row and group | exact by group, float32 over groups |

Activations are rounded to bytes as they come: scale = max|x| / 127 over the row, or over each group of it where weights have
groups, so that one outlier spoils its own group only. Matrices that read the same input (q, k, v; gate, up) are joined into
one, so that one product makes all.

Why a layout of our own and not that of a library: a row of y must depend on its row of x alone, whatever the batch, and the
same panels must serve one row (bound by memory) and a thousand (bound by arithmetic). What it gives up: a packed matrix
cannot be trained, and reading it back (`unpacked`) is a pass over it.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import torch
from torch.nn.functional import linear, pad

from headspring.artifacts.errors import UserError
from headspring.models.kernels import native
from headspring.models.kernels.huge_pages import Room

Kind = Literal["bf16", "int8", "groups"]
KINDS: tuple[Kind, ...] = ("bf16", "int8", "groups")
PANEL = 32
GROUP_SIZES = (16, 32, 64, 128)
PARTS = ("values", "scales", "minimums")


class Mirror(ctypes.Structure):
    """`Packed` of cpp/product.h."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minimums", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
    ]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix of `shape` (O, I), padded with zeros to P panels of 32 outputs and to whole lines of inputs.

    values (P, lines, 32) int32, each the bits of 2 bfloat16 or 4 bytes (4 bits: (P, lines, 16)); integers are stored as
    value + `offset`. scales float32: (32 P,) for int8, (P, groups, 32) for groups, as the optional minimums.
    """

    kind: Kind
    shape: tuple[int, int]
    values: torch.Tensor
    scales: torch.Tensor | None = None
    minimums: torch.Tensor | None = None
    bits: int = 16
    group: int = 0
    offset: int = 0

    def __reduce__(self):
        """How it is copied: without what `cached_property` keeps, which is about the addresses of these very tensors."""
        return PackedMatrix, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What it has of values, scales and minimums."""
        named = {name: getattr(self, name) for name in PARTS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def form(self) -> tuple:
        """What matrices must share to be joined."""
        return self.kind, self.shape[1], self.bits, self.group, self.offset, self.minimums is None

    @cached_property
    def mirror(self) -> Mirror:
        """For native code; valid as long as this value lives."""
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (self.values, self.scales, self.minimums))
        return Mirror(KINDS.index(self.kind), self.bits, *self.shape, self.group, *pointers, self.offset)

    @cached_property
    def address(self) -> int:
        """Of `mirror`."""
        return ctypes.addressof(self.mirror)

    @property
    def unpacked(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """values (O, I) in bfloat16 or int8, scales and minimums (O,) or (O, G): what `pack_…` was given."""
        outputs, inputs = self.shape
        scales, minimums = (self._in_rows(part) for part in (self.scales, self.minimums))
        if self.bits == 4:
            both = self.values.transpose(1, 2).contiguous().view(torch.uint8)  # (P, 16, padded inputs)
            rows = torch.stack([both & 15, both >> 4], dim=1).flatten(0, 2)
        else:
            rows = self.values.transpose(1, 2).flatten(0, 1).contiguous()
            rows = rows.view(torch.bfloat16 if self.kind == "bf16" else torch.uint8)
        rows = rows[:outputs, :inputs]
        if self.kind == "bf16":
            return rows.contiguous(), None, None
        return (rows.to(torch.int16) - self.offset).to(torch.int8), scales, minimums

    @cached_property
    def kept(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`unpacked`, kept for the products of `product_plain`."""
        return self.unpacked

    def _in_rows(self, part: torch.Tensor | None) -> torch.Tensor | None:
        if part is None or self.kind == "int8":
            return None if part is None else part[: self.shape[0]]
        return part.transpose(1, 2).flatten(0, 1)[: self.shape[0], : self.shape[1] // self.group].contiguous()

    def dequantized(self) -> torch.Tensor:
        """(O, I) float32: scale · value, plus the minimum of its group where there is one."""
        values, scales, minimums = self.unpacked
        if scales is None:
            return values.float()
        if self.kind == "int8":
            return values.float() * scales[:, None]
        wide = values.float().unflatten(1, (-1, self.group)) * scales[..., None]
        return (wide if minimums is None else wide + minimums[..., None]).flatten(1)

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """The numbers (..., I) float32 of outputs (...) int64, as `dequantized` gives them: what an embedding reads."""
        chosen = outputs.reshape(-1)
        panels, lanes = chosen // PANEL, chosen % PANEL
        words = self.values[panels, :, lanes % (self.values.shape[2])].contiguous()
        if self.kind == "bf16":
            return words.view(torch.bfloat16)[:, : self.shape[1]].float().view(*outputs.shape, -1)
        numbers = words.view(torch.uint8)
        if self.bits == 4:
            numbers = torch.where((lanes < PANEL // 2)[:, None], numbers & 15, numbers >> 4)
        wide = numbers[:, : self.shape[1]].float() - self.offset
        assert self.scales is not None
        if self.kind == "int8":
            return (wide * self.scales[chosen, None]).view(*outputs.shape, -1)
        groups = self.shape[1] // self.group
        wide = wide.unflatten(1, (groups, self.group)) * self.scales[panels, :groups, lanes, None]
        wide = wide if self.minimums is None else wide + self.minimums[panels, :groups, lanes, None]
        return wide.reshape(*outputs.shape, -1)

    def to(self, device: str | torch.device) -> "PackedMatrix":
        scales, minimums = (None if part is None else part.to(device) for part in (self.scales, self.minimums))
        return replace(self, values=self.values.to(device), scales=scales, minimums=minimums)

    def part(self, start: int, stop: int) -> "PackedMatrix":
        """Outputs start … stop, the same memory. `start` is a multiple of 32."""
        assert start % PANEL == 0, "a part begins with a panel"
        panels, lanes = slice(start // PANEL, -(-stop // PANEL)), slice(start, -(-stop // PANEL) * PANEL)
        scales = None if self.scales is None else self.scales[lanes if self.kind == "int8" else panels]
        minimums = None if self.minimums is None else self.minimums[panels]
        return replace(self, shape=(stop - start, self.shape[1]), values=self.values[panels], scales=scales, minimums=minimums)


# ---- packing


def pack_bf16(weight: torch.Tensor, room: Room | None = None) -> PackedMatrix:
    """weight (O, I) of any floating dtype, rounded to bfloat16. In `room`, where there is one."""
    rows = _whole_lines(weight.detach().to(torch.bfloat16), 32)
    return PackedMatrix("bf16", _shape(weight), _in_panels(rows.view(torch.int32), room=room))


def pack_int8(weight: torch.Tensor, scales: torch.Tensor, room: Room | None = None) -> PackedMatrix:
    """weight (O, I) int8 times scales (O,), one for each output. Its values lie in `room`, where there is one."""
    if weight.dtype != torch.int8 or scales.shape != weight.shape[:1]:
        raise UserError(f"pack_int8 takes int8 (O, I) and scales (O,), not {weight.dtype} and {tuple(scales.shape)}")
    padded = pad(scales.detach().float(), (0, -len(scales) % PANEL))
    words = _in_panels(_whole_lines(weight.detach(), 64).view(torch.int32), 128, room)
    return PackedMatrix("int8", _shape(weight), words, padded, bits=8, offset=128)


def round_to_int8(weight: torch.Tensor, room: Room | None = None) -> PackedMatrix:
    """weight (O, I) rounded to 255 values an output. Its values lie in `room`, where there is one."""
    whole, scales = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), []
    size = max(1, 2**17 // weight.shape[1])  # some rows at a time, which stay in the cache
    for rows, rounded in zip(weight.detach().split(size), whole.split(size)):
        wide = rows.float()
        scales.append(torch.maximum(wide.amax(1), -wide.amin(1)) / 127)
        rounded.copy_((wide / scales[-1].clamp_min(1e-30)[:, None]).round_())
    return pack_int8(whole, torch.cat(scales), room)


def pack_groups(
    values: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor | None = None, bits: int = 4
) -> PackedMatrix:
    """values (O, I) int8 in groups of I / G inputs: weight = scale · value + minimum, with scales and minimums (O, G).

    With 4 bits the values are −8 … 7, or 0 … 15.
    """
    outputs, inputs = _shape(values)
    group = inputs // scales.shape[1]
    if values.dtype != torch.int8 or bits not in (4, 8) or scales.shape != (outputs, inputs // group):
        raise UserError(f"pack_groups takes int8 (O, I), scales (O, G) and 4 or 8 bits, not {values.dtype} and {bits} bits")
    if group not in GROUP_SIZES or inputs % group:
        raise UserError(f"groups of {inputs / scales.shape[1]:g} inputs: only {', '.join(map(str, GROUP_SIZES))} are supported")
    low, high = map(int, values.aminmax())
    offset = 128 if bits == 8 else 8 if low < 0 else 0
    if bits == 4 and not 0 <= low + offset <= high + offset <= 15:
        raise UserError(f"4 bits hold -8 … 7 or 0 … 15, not {low} … {high}")
    whole = max(64, group)
    lines = _whole_lines(values.detach(), whole).view(torch.int32)
    words = _in_panels(lines, offset) if bits == 8 else _in_half_panels(lines, offset)
    lanes = _group_panels(scales, whole // group)
    least = None if minimums is None else _group_panels(minimums, whole // group)
    return PackedMatrix("groups", (outputs, inputs), words, lanes, least, bits, group, offset)


def join(matrices: Sequence[PackedMatrix], room: Room | None = None) -> PackedMatrix:
    """Several matrices side by side in one: outputs follow one another. They must have one `form`. In `room`, where there is
    one and the outputs fill panels."""
    head = matrices[0]
    if any(matrix.form != head.form for matrix in matrices):
        raise UserError("matrices of different kinds, inputs or groups cannot be joined into one")
    shape = (sum(matrix.shape[0] for matrix in matrices), head.shape[1])
    if all(matrix.shape[0] % PANEL == 0 for matrix in matrices[:-1]):
        values, scales, minimums = (_beside([getattr(m, name) for m in matrices], room) for name in PARTS)
        assert values is not None
        return replace(head, shape=shape, values=values, scales=scales, minimums=minimums)
    rows = [matrix.unpacked for matrix in matrices]
    values = torch.cat([row[0] for row in rows])
    scales, minimums = _beside([row[1] for row in rows]), _beside([row[2] for row in rows])
    if scales is None:
        return pack_bf16(values)
    return pack_int8(values, scales) if head.kind == "int8" else pack_groups(values, scales, minimums, head.bits)


def _beside(parts: Sequence[torch.Tensor | None], room: Room | None = None) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    if not present or room is None:
        return torch.cat(present) if present else None
    whole = room.empty((sum(map(len, present)), *present[0].shape[1:]), present[0].dtype)
    return torch.cat(present, out=whole)


def _shape(weight: torch.Tensor) -> tuple[int, int]:
    outputs, inputs = weight.shape
    return outputs, inputs


def _whole_lines(rows: torch.Tensor, whole: int) -> torch.Tensor:
    """Rows filled up with zeros to a multiple of `whole` inputs."""
    return (pad(rows, (0, -rows.shape[1] % whole)) if rows.shape[1] % whole else rows).contiguous()


def _packer(words: torch.Tensor) -> native.Library | None:
    built = native.enabled()
    return built if built is not None and built.has_packed_products and words.device.type == "cpu" else None


def _in_panels(words: torch.Tensor, flip: int = 0, room: Room | None = None) -> torch.Tensor:
    """(O, lines) int32 → (P, lines, 32), each byte ^ `flip`."""
    built = _packer(words)
    if built is not None:
        shape = (-(-len(words) // PANEL), words.shape[1], PANEL)
        return built.pack_words(words, flip, out=None if room is None else room.empty(shape, torch.int32))
    words = (words.view(torch.uint8) ^ flip).view(torch.int32) if flip else words
    return pad(words, (0, 0, 0, -len(words) % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _in_half_panels(words: torch.Tensor, offset: int) -> torch.Tensor:
    """(O, lines) int32 of bytes → (P, lines, 16): bytes + `offset` have 4 bits, outputs n and n + 16 of a panel share one."""
    built = _packer(words)
    if built is not None:
        return built.pack_words(words, offset, halves=True)
    rows = words.view(torch.uint8) + offset
    rows = pad(rows, (0, 0, 0, -len(rows) % PANEL)) if len(rows) % PANEL else rows
    low, high = rows.unflatten(0, (-1, 2, PANEL // 2)).unbind(1)
    return high.bitwise_left_shift(4).bitwise_or_(low).view(torch.int32).transpose(1, 2).contiguous()


def _group_panels(scales: torch.Tensor, multiple: int) -> torch.Tensor:
    """(O, G) → (P, G rounded up to `multiple`, 32)."""
    padded = pad(scales.detach().float(), (0, -scales.shape[1] % multiple, 0, -len(scales) % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


# ---- the definition of a product


def quantize_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, I) → bytes (N, G, group) as float32 whole numbers and scales (N, G): x ≈ scale · byte."""
    wide = x.float().unflatten(1, (-1, group))
    largest = wide.abs().amax(-1)
    ones = torch.full_like(largest, 127.0)  # as a tensor: torch divides a number by one through its reciprocal
    inverse = torch.where(largest < 1e-30, torch.zeros_like(largest), ones / largest)
    return (wide * inverse[..., None]).round().nan_to_num().clamp(-128, 127), largest * torch.tensor(1 / 127)


def product_plain(x: torch.Tensor, packed: PackedMatrix) -> torch.Tensor:
    """x (N, I) times the transposed matrix → (N, O), in the dtype of `x`."""
    values, scales, minimums = packed.kept
    if scales is None:
        return linear(x, values.to(x.dtype))
    group = packed.group or packed.shape[1]
    rows, row_scales = quantize_rows(x, group)
    total = torch.zeros(len(x), packed.shape[0], device=x.device)
    for g, part in enumerate(values.split(group, dim=1)):
        if packed.kind == "int8":
            return (_exact(rows[:, 0], part) * (row_scales * scales)).to(x.dtype)
        total = total + _exact(rows[:, g], part) * (row_scales[:, g, None] * scales[:, g])
        if minimums is not None:
            total = total + (row_scales[:, g] * rows[:, g].sum(-1))[:, None] * minimums[:, g]
    return total.to(x.dtype)


def _exact(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """rows · valuesᵀ in whole numbers, then float32. Partial sums of 1,024 products of bytes are exact in float32."""
    parts = zip(rows.split(1024, dim=1), values.split(1024, dim=1))
    sums = sum((left @ right.float().T).to(torch.int32) for left, right in parts)
    assert isinstance(sums, torch.Tensor)
    return sums.float()
