"""How tensors of two formats hold the same numbers: moves of data, each with its inverse.

A move takes the tensors of one rule, ours, to theirs, and back. It permutes, joins or cuts and never computes, so that
`export(import(w)) == w` bit for bit, NaN included. The way back is told the shapes of ours, which say where to cut; the
shapes of theirs need no formula of their own, because `out` also runs on tensors without memory.

| move | ours → theirs | who needs it |
| --- | --- | --- |
| `Rows()` | one below the other (one tensor: as it is) | Phi-3, Mamba, ModernBERT |
| `Transposed()` | the last two axes change places | GPT-2, experts of GPT-OSS |
| `Grouped(n)` | n groups of rows, each with its share of every tensor in turn | GPT-NeoX, BLOOM, Falcon; DeepSeek's k and v |
| `Alternating()` | a row of the first, a row of the second, and so on | gate and up of GPT-OSS |
| `Pairs(heads, rotated, skipped)` | rotary channels (c, c + C/2) become neighbours (2c, 2c + 1) | DeepSeek, GGUF's Llama |
| `Stacked()` | a tensor of (E, …) becomes E tensors | experts of Mixtral, Qwen3-MoE, DeepSeek |
| `Reshaped(shape)` | the same numbers in other axes | convolutions (D, K) ↔ (D, 1, K), tables with an axis of 1 |
| `then(a, b)` | a, and b on what it gave | GPT-2's fused q, k, v |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = list[torch.Tensor]
Shape = tuple[int, ...]


class Move(Protocol):
    """A bijection between tensors of ours and theirs."""

    def out(self, ours: Tensors) -> Tensors:
        """Theirs, from ours. Raises `RuntimeError` where the sizes of ours do not allow it."""
        ...

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        """Ours, of these `shapes`, from theirs."""
        ...


@dataclass(frozen=True)
class Rows:
    """Joined along the first axis, or another `axis`."""

    axis: int = 0

    def out(self, ours: Tensors) -> Tensors:
        return [_joined(ours, self.axis)] if len(ours) > 1 else ours

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        return list(theirs[0].split([shape[self.axis] for shape in shapes], self.axis))


@dataclass(frozen=True)
class Transposed:
    """The last two axes of every tensor change places."""

    def out(self, ours: Tensors) -> Tensors:
        return [tensor.mT for tensor in ours]

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        return [tensor.mT for tensor in theirs]


@dataclass(frozen=True)
class Grouped:
    """`groups` runs of rows, each holding first its share of the first tensor, then of the second, and so on."""

    groups: int

    def out(self, ours: Tensors) -> Tensors:
        return [_joined([tensor.unflatten(0, (self.groups, -1)) for tensor in ours], 1).flatten(0, 1)]

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        shares = [shape[0] // self.groups for shape in shapes]
        return [part.flatten(0, 1) for part in theirs[0].unflatten(0, (self.groups, -1)).split(shares, dim=1)]


@dataclass(frozen=True)
class Alternating:
    """Rows of tensors of one shape, in turns, along `axis`."""

    axis: int = 0

    def out(self, ours: Tensors) -> Tensors:
        axis = self.axis % ours[0].dim()
        return [torch.stack(ours, dim=axis + 1).flatten(axis, axis + 1)]

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        axis = self.axis % theirs[0].dim()
        return list(theirs[0].unflatten(axis, (-1, len(shapes))).unbind(axis + 1))


@dataclass(frozen=True)
class Pairs:
    """In the rows of each of `heads` heads, the channels that rotate together are brought side by side.

    `rotated` channels (None: all) rotate, after the first `skipped` of a head; the others keep their places.
    """

    heads: int
    rotated: int | None = None
    skipped: int = 0

    def out(self, ours: Tensors) -> Tensors:
        return [self._moved(tensor, (2, -1)) for tensor in ours]

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        return [self._moved(tensor, (-1, 2)) for tensor in theirs]

    def _moved(self, rows: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
        heads = rows.unflatten(0, (self.heads, -1))
        rotated = heads.shape[1] - self.skipped if self.rotated is None else self.rotated
        before, turning, after = heads.split([self.skipped, rotated, heads.shape[1] - self.skipped - rotated], dim=1)
        turned = turning.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)
        return _joined([before, turned, after], 1).flatten(0, 1)


@dataclass(frozen=True)
class Stacked:
    """One tensor for each index of the first axis."""

    def out(self, ours: Tensors) -> Tensors:
        return list(ours[0].unbind(0))

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        return [torch.stack(theirs)]


@dataclass(frozen=True)
class Reshaped:
    """One tensor in other axes; `shape` is theirs."""

    shape: Shape

    def out(self, ours: Tensors) -> Tensors:
        return [ours[0].reshape(self.shape)]

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        return [theirs[0].reshape(shapes[0])]


@dataclass(frozen=True)
class Then:
    """`second` after `first`."""

    first: Move
    second: Move

    def out(self, ours: Tensors) -> Tensors:
        return self.second.out(self.first.out(ours))

    def back(self, theirs: Tensors, shapes: Sequence[Shape]) -> Tensors:
        return self.first.back(self.second.back(theirs, moved_shapes(self.first, shapes)), shapes)


def then(first: Move, *more: Move) -> Move:
    """The moves one after another, from ours to theirs."""
    for move in more:
        first = Then(first, move)
    return first


def moved_shapes(move: Move, shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes of theirs, from those of ours: the move itself, on tensors without memory."""
    return [tuple(tensor.shape) for tensor in move.out([torch.empty(shape, device="meta") for shape in shapes])]


def _joined(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """`torch.cat`. Of shapes alone it imports torch's compiler, which takes a second, so that they are added up here."""
    if tensors[0].device.type != "meta":
        return torch.cat(list(tensors), axis)
    shape = list(tensors[0].shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    return tensors[0].new_empty(shape)
