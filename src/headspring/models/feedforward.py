"""Feed-forward parts: SwiGLU (arXiv 2002.05202) and the plain two-matrix MLP."""

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import gelu, relu

from headspring.artifacts.value import Variant
from headspring.models import kernels
from headspring.models.part import Cost, Linear, PartModule

ACTIVATIONS = {
    "relu2": lambda x: relu(x).square(),
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


class FeedForward(Variant):
    """The value of a part that works on each token alone."""

    def build(self, width: int) -> "FeedForwardModule":
        raise NotImplementedError


class FeedForwardModule(PartModule):
    """x (B, T, D) → (B, T, D). `site_names` are those of its activations that can be seen and edited."""

    site_names: tuple[str, ...] = ("gate", "act", "out")

    def cost(self, name: str) -> Cost:
        raise NotImplementedError


class SwiGLU(FeedForward):
    """out(silu(gate x) ⊙ (up x)) with `hidden` channels."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: int = Field(gt=0)

    def build(self, width: int) -> "SwiGLUModule":
        return SwiGLUModule(self, width)


class MLP(FeedForward):
    """out(activation(up x)) with `hidden` channels."""

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(gt=0)
    activation: Literal["relu2", "gelu", "gelu_tanh"] = "relu2"
    bias: bool = False

    def build(self, width: int) -> "MLPModule":
        return MLPModule(self, width)


class SwiGLUModule(FeedForwardModule):
    """x (B, T, D) → (B, T, D)."""

    def __init__(self, value: SwiGLU, width: int):
        super().__init__()
        self.gate = Linear(width, value.hidden)
        self.up = Linear(width, value.hidden)
        self.out = Linear(value.hidden, width, std=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.site("gate", self.gate(x)), self.up(x)
        act = self.site("act", kernels.silu_multiply(gate, up))
        return self.site("out", self.out(act))

    def cost(self, name: str) -> Cost:
        hidden = self.gate.weight.shape[0]
        parts = (self.gate.cost("gate"), self.up.cost("up"), Cost("act", 0, 5.0 * hidden, 4.0 * hidden), self.out.cost("out"))
        return Cost.sum(name, parts, f"{hidden} channels")


class MLPModule(FeedForwardModule):
    """x (B, T, D) → (B, T, D)."""

    def __init__(self, value: MLP, width: int):
        super().__init__()
        self.up = Linear(width, value.hidden, bias=value.bias)
        self.out = Linear(value.hidden, width, bias=value.bias, std=0.0)
        self.activation = ACTIVATIONS[value.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = self.site("act", self.activation(self.site("gate", self.up(x))))
        return self.site("out", self.out(act))

    def cost(self, name: str) -> Cost:
        hidden = self.up.weight.shape[0]
        parts = (self.up.cost("up"), Cost("act", 0, 2.0 * hidden, 2.0 * hidden), self.out.cost("out"))
        return Cost.sum(name, parts, f"{hidden} channels")
