"""LoRA: a model adapted by adding a product of two thin matrices to some of its matrices (Hu et al., arXiv 2106.09685).

    y = x Wᵀ + scale · (x Aᵀ) Bᵀ          A (r, I), B (O, r)          scale = alpha / r, or alpha / √r ("rsLoRA", 2312.03732)

An `Adapter` is a value beside the model and not another kind of layer: whatever multiplies by a `Linear` asks it for what to
add (`Linear.addition`), so one text of the model serves base and adapter alike, in training, scoring and serving, and over
packed or quantized weights, which stay as they are. Three ways to use one:

- `attached(model, adapter)`: the formula above as it stands, with gradients where the factors want them. This is all that a
  trainer needs: the factors of `LoRA(...).build(model)`, inside of this block.
- `Stacked`: the factors of several adapters side by side, for rows that belong to different ones (`inference/adapters.py`).
- `merge(model, adapter)`: W + scale · B A, in place, for a model that shall have no adapter any more. The definition.

What it gives up: only matrices inside of blocks that go through `Linear`; no experts in one tensor, no embeddings, no heads,
no biases, no DoRA (whose norm needs the merged matrix).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value
from headspring.models import kernels
from headspring.models.kernels.packed import PackedMatrix, pack_bf16
from headspring.models.kernels.packing import packable
from headspring.models.model import ModelModule
from headspring.models.part import Linear


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to one matrix (O, I): `down` (r, I), `up` (O, r), and `alpha`, divided by r or, with `rslora`, by √r."""

    down: Tensor
    up: Tensor
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the matrix that it is for."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> Tensor:
        """scale · B A, (O, I) float32."""
        return self.scale * (self.up.float() @ self.down.float())

    def __call__(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O) in the dtype of x."""
        return self.scale * kernels.linear(kernels.linear(x, [self.down]), [self.up])


@dataclass(frozen=True, eq=False)
class Adapter:
    """`parts` by the name of the `Linear` that each is added to ("layers.0.mixer.f.q")."""

    parts: Mapping[str, LowRank]

    @cached_property
    def key(self) -> str:
        """Of everything that it computes: adapters with the same key are the same function."""
        hasher = hashlib.sha256()
        for name, part in sorted(self.parts.items()):
            hasher.update(f"{name} {part.scale} ".encode())
            for factor in (part.down, part.up):
                hasher.update(f"{factor.dtype} {tuple(factor.shape)}".encode())
                hasher.update(factor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hasher.hexdigest()

    @property
    def bytes(self) -> int:
        return sum(factor.nbytes for part in self.parts.values() for factor in (part.down, part.up))

    def check(self, model: ModelModule) -> None:
        """Raise `UserError` where it does not belong to `model`."""
        linears = adaptable(model)
        for name, part in self.parts.items():
            if name not in linears:
                raise UserError(f"the adapter is for {name}, and this model has no such matrix; it was made for another one")
            outputs, inputs = linears[name].weight.shape
            if part.shape != (outputs, inputs):
                found = f"{part.shape[0]} × {part.shape[1]}"
                raise UserError(f"the adapter's {name} is for {found}, this model's is {outputs} × {inputs}: another base")


class LoRA(Value):
    """A new adapter: which matrices it is for, how thin it is, and what scales it."""

    rank: int = Field(8, ge=1, description="columns of each factor")
    alpha: float = Field(16.0, gt=0, description="the product is scaled by alpha / rank")
    rslora: bool = Field(False, description="scale by alpha / √rank instead, which suits large ranks (arXiv 2312.03732)")
    targets: tuple[str, ...] = Field(("q", "v"), min_length=1, description="last names of matrices, such as q, v, gate, out")

    def build(self, model: ModelModule, seed: int = 0) -> Adapter:
        """Factors in float32, ready to learn. `up` is 0 and `down` uniform, so that it begins as the model itself.

        Raises `UserError` for a target that the model does not have."""
        linears = adaptable(model)
        ends = {name.rpartition(".")[2] for name in linears}
        if unknown := sorted(set(self.targets) - ends):
            raise UserError(f"targets: no matrix is named {unknown[0]!r} here; there are {', '.join(sorted(ends))}")
        generator = torch.Generator().manual_seed(seed)
        chosen = {name: part for name, part in linears.items() if name.rpartition(".")[2] in self.targets}
        return Adapter({name: self._begin(part, generator) for name, part in chosen.items()})

    def _begin(self, part: Linear, generator: torch.Generator) -> LowRank:
        outputs, inputs = part.weight.shape
        bound = inputs**-0.5  # what Kaiming's uniform start with a = √5 comes to
        down = torch.empty(self.rank, inputs).uniform_(-bound, bound, generator=generator).to(part.weight.device)
        up = torch.zeros(outputs, self.rank, device=part.weight.device)
        return LowRank(down.requires_grad_(), up.requires_grad_(), self.alpha, self.rslora)


def adaptable(model: ModelModule) -> dict[str, Linear]:
    """The matrices that can be adapted, by name: every `Linear` of a block whose numbers nothing else reads."""
    inside = {id(module) for block in model.blocks() for module in block.modules()}
    return {name: part for name, part in packable(model).items() if id(part) in inside and type(part) is Linear}


@contextmanager
def attached(model: ModelModule, adapter: Adapter) -> Iterator[None]:
    """Inside the block, `model` computes with `adapter`, with gradients."""
    adapter.check(model)
    linears = adaptable(model)
    with adding({linears[name]: part for name, part in adapter.parts.items()}):
        yield


@contextmanager
def adding(additions: Mapping[Linear, "LowRank | Stacked"]) -> Iterator[None]:
    """Inside the block, each `Linear` adds what its addition makes of the same input."""
    for part, addition in additions.items():
        vars(part)["addition"] = addition  # past torch's own __setattr__, which takes longer than a small product
    try:
        yield
    finally:
        for part in additions:
            del vars(part)["addition"]


@torch.no_grad()
def merge(model: ModelModule, adapter: Adapter) -> None:
    """W + scale · B A in the place of each W, computed in float32 and rounded once. Raises `UserError`."""
    adapter.check(model)
    if model.released:
        raise UserError("this model's float weights were released when it was packed; merge into the model it was made from")
    linears = adaptable(model)
    for name, part in adapter.parts.items():
        weight = linears[name].weight
        weight.copy_(weight.float() + part.delta().to(weight.device))


# ---- several adapters at once


class Rows:
    """Which rows of a step belong to which adapter: `owners` (N,) int64, −1 for none. Masks are made once for each layout."""

    def __init__(self, owners: Tensor):
        self.owners = owners
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def others(self, stacked: "Stacked") -> Tensor:
        """(N, Σr) bool: what a row has no business with."""
        if stacked.layout not in self._masks:
            self._masks[stacked.layout] = self.owners[:, None] != stacked.columns
        return self._masks[stacked.layout]


class Stacked:
    """The factors of several adapters for one matrix, side by side: one product down and one up, whoever a row belongs to.

        x (N, I) ─ Aᵀ → (N, r₁ + r₂ + …) ─ 0 where the columns are not the row's own ─ Bᵀ → (N, O)

    Bit for bit a row gets what it gets alone, where products sum in order (`kernels.product`): zeros add nothing, and no
    adapter's columns lie across a border between blocks of 32 inputs, which is as many as the matrix unit sums at a time.
    Beside it one adapter after another, each on its own rows, would be four small operators an adapter instead of three in
    all; what it costs instead is that every row meets the columns of all.
    """

    rows: Rows | None = None  # of this step; None: all rows belong to the only adapter

    def __init__(self, parts: Sequence[tuple[int, LowRank]], like: Linear, dtype: torch.dtype):
        """`parts` with the number of their adapter, for a matrix like that one, in `dtype`."""
        ordered = sorted(parts, key=lambda part: (-width(part[1].rank), part[0]))
        self.layout = tuple(number for number, part in ordered for _ in range(width(part.rank)))
        device = like.weight.device
        self.columns = torch.tensor(self.layout, device=device)
        outputs, inputs = like.weight.shape
        down, up = torch.zeros(len(self.layout), inputs), torch.zeros(outputs, len(self.layout))
        start = 0
        for _, part in ordered:
            down[start : start + part.rank] = part.down.detach()
            up[:, start : start + part.rank] = part.scale * part.up.detach().float()
            start += width(part.rank)
        self.down, self.up = (factor.to(device, dtype) for factor in (down, up))
        self._packed = {dtype: (pack_bf16(self.down), pack_bf16(self.up))} if kernels.multiplies_natively(self.down) else {}

    @property
    def native(self) -> bool:
        """Whether its products are the native ones, which sum in order."""
        return bool(self._packed)

    def __call__(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        learns = torch.is_grad_enabled() and x.requires_grad  # through it, for what stands before: packed matrices cannot
        packed_down, packed_up = (None, None) if learns else self._packed.get(x.dtype, (None, None))
        hidden = _multiply(x, self.down, packed_down)
        if self.rows is not None:
            flat = hidden.view(-1, hidden.shape[-1])
            hidden = flat.masked_fill_(self.rows.others(self), 0).view_as(hidden)
        return _multiply(hidden, self.up, packed_up)


def _multiply(x: Tensor, factor: Tensor, packed: PackedMatrix | None) -> Tensor:
    return kernels.multiply(x, factor, packed=packed)


def width(rank: int) -> int:
    """Columns that an adapter takes: 8, 16, or a multiple of 32."""
    return next((size for size in (8, 16) if rank <= size), -(-rank // 32) * 32)
