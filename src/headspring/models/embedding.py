"""From token ids to the residual stream, and the matrix that goes back: the two ends of a stack of blocks."""

import torch
from pydantic import Field
from torch import nn

from headspring.artifacts.value import Value
from headspring.models.norm import Norm
from headspring.models.part import Cost, Group, ParameterRule, PartModule, constant, normal

EMBEDDING_STD = 0.02


class Embed(Value):
    """x = norm(scale · table[token]). Gemma scales by √width, rounded to the dtype of the activations."""

    scale: float | None = Field(None, gt=0)
    norm: Norm | None = None


class Head(Value):
    """logits = cap(scale · hidden · Wᵀ + bias), with cap(y) = softcap · tanh(y / softcap)."""

    bias: bool = False
    scale: float | None = Field(None, gt=0)
    softcap: float | None = Field(None, gt=0)


class Table(PartModule):
    """(V, D) rows."""

    def __init__(self, vocab: int, width: int, group: Group, std: float = EMBEDDING_STD, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None
        self.group: Group = group
        self.std = std

    def rules(self) -> dict[str, ParameterRule]:
        rules = {"weight": ParameterRule(normal(self.std), self.group)}
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

    def __init__(self, value: Embed, vocab: int, width: int):
        super().__init__(vocab, width, "embedding")
        self.value = value
        self.norm = value.norm.build(width) if value.norm else None

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = nn.functional.embedding(tokens, self.weight).to(dtype)
        if self.value.scale is not None:
            x = x * torch.tensor(self.value.scale, dtype=dtype, device=x.device)
        return x if self.norm is None else self.norm(x)

    def cost(self, name: str) -> Cost:
        vocab, width = self.weight.shape
        parts = [Cost("table", vocab * width, 0.0, 2.0 * width, 0.0, f"{vocab} × {width}")]
        if self.norm is not None:
            parts.append(self.norm.cost("norm"))
        return Cost.sum(name, tuple(parts), f"{vocab} × {width}")
