"""From token ids to the residual stream, and the matrix that goes back: the two ends of a stack of blocks."""

import torch
from pydantic import Field
from torch import nn

from headspring.artifacts.value import Value
from headspring.models.kernels.packed import PackedMatrix
from headspring.models.norm import Norm
from headspring.models.part import Cost, Group, Linear, ParameterRule, PartModule, constant, normal
from headspring.models.position import AbsolutePosition
from headspring.models.transform import Transform

EMBEDDING_STD = 0.02


class Embed(Value):
    """x = norm(scale · table[token] + position + type). Gemma scales by √width, rounded to the dtype of the activations.

    `positions` are absolute ones; `types` is the number of kinds that a token may be of (BERT's two sentences), 0 for none.
    With `inner` the tables of embedding and head have so many channels, and a matrix leads from them to the model's width and
    one back to them (ALBERT, arXiv 1909.11942; OPT-350m).
    """

    scale: float | None = Field(None, gt=0)
    positions: AbsolutePosition | None = None
    types: int = Field(0, ge=0)
    inner: int | None = Field(None, gt=0)
    norm: Norm | None = None


class Head(Value):
    """logits = cap(scale · transform(hidden) · Wᵀ + bias), with cap(y) = softcap · tanh(y / softcap)."""

    bias: bool = False
    scale: float | None = Field(None, gt=0)
    softcap: float | None = Field(None, gt=0)
    transform: Transform | None = None


class Table(PartModule):
    """(V, D) rows: `weight`, or those of the table that it borrows. A quantized model reads them out of `packed` instead."""

    packed: PackedMatrix | None = None

    def __init__(
        self,
        vocab: int,
        width: int,
        group: Group,
        std: float = EMBEDDING_STD,
        *,
        bias: bool = False,
        borrowed: "Table | None" = None,
    ):
        super().__init__()
        self._owner = (borrowed,)  # in a tuple it is no part of this module: its rows have one name
        if borrowed is None:
            self.weight = nn.Parameter(torch.empty(vocab, width))
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None
        self.group: Group = group
        self.std = std

    @property
    def rows(self) -> torch.Tensor:
        owner = self._owner[0]
        return self.weight if owner is None else owner.rows

    def read(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows (..., D) of tokens (...) int64."""
        owner = self._owner[0]
        if owner is not None:
            return owner.read(tokens, dtype)
        rows = nn.functional.embedding(tokens, self.weight) if self.packed is None else self.packed.rows(tokens)
        return rows.to(dtype)

    def rules(self) -> dict[str, ParameterRule]:
        rules = {"weight": ParameterRule(normal(self.std), self.group)} if self._owner[0] is None else {}
        if self.bias is not None:
            rules["bias"] = ParameterRule(constant(0.0), "vector")
        return rules


class Bias(PartModule):
    """(V,): the head of a tied model that has a bias."""

    def __init__(self, vocab: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(vocab))

    def rules(self) -> dict[str, ParameterRule]:
        return {"bias": ParameterRule(constant(0.0), "vector")}


class EmbedModule(Table):
    """tokens (B, T) int64 → (B, T, D)."""

    def __init__(self, value: Embed, vocab: int, width: int, context: int, borrowed: Table | None = None):
        super().__init__(vocab, value.inner or width, "embedding", borrowed=borrowed)
        self.value = value
        self.widen = Linear(value.inner, width) if value.inner else None
        self.positions = value.positions.build(width, context) if value.positions else None
        self.types = Table(value.types, width, "embedding") if value.types else None
        self.norm = value.norm.build(width) if value.norm else None

    def forward(
        self, tokens: torch.Tensor, dtype: torch.dtype, positions: torch.Tensor, types: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`positions` (B or 1, T) int64; `types` (B, T) int64, all of type 0 where it is left out."""
        x = self.read(tokens, dtype)
        if self.value.scale is not None:
            x = x * torch.full(
                (), self.value.scale, dtype=dtype, device=x.device
            )  # made on the device: a CUDA graph copies nothing to it
        if self.widen is not None:
            x = self.widen(x)
        if self.positions is not None:
            x = x + self.positions(positions).to(dtype)
        if self.types is not None:
            row = self.types.weight[0] if types is None else nn.functional.embedding(types, self.types.weight)
            x = x + row.to(dtype)
        elif types is not None:
            raise ValueError("this model knows no types of tokens (embed.types is 0)")
        return x if self.norm is None else self.norm(x)

    def cost(self, name: str) -> Cost:
        vocab, width = self.rows.shape
        own = self._owner[0] is None
        parts = [Cost("table", vocab * width * own, 0.0, 0.0, 0.0, f"{vocab} × {width}" if own else "shared")]
        if self.widen is not None:
            parts.append(self.widen.cost("widen"))
        if self.positions is not None:
            parts.append(self.positions.cost("positions"))
        if self.types is not None:
            types, wide = self.types.weight.shape
            parts.append(Cost("types", types * wide, 1.0 * wide, shape=f"{types} × {wide}"))
        if self.norm is not None:
            parts.append(self.norm.cost("norm"))
        return Cost.sum(name, tuple(parts), f"{vocab} × {width}")
