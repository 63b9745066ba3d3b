"""Feed-forward parts: gated ones (SwiGLU, GeGLU, arXiv 2002.05202) and the plain two-matrix MLP."""

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import gelu, relu, silu

from headspring.artifacts.value import Variant
from headspring.models import kernels
from headspring.models.part import Cost, Linear, PartModule, linear, same_input

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh"]
ACTIVATIONS = {
    "relu": relu,
    "relu2": lambda x: relu(x).square(),  # arXiv 2109.08668
    "gelu": gelu,  # arXiv 1606.08415: x Φ(x) itself
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),  # and its approximation, in GPT-2, BLOOM and Gemma
    "silu": silu,
    "tanh": torch.tanh,
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
    """out(silu(gate x) ⊙ (up x)) with `hidden` channels: the gated form that most models have."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: int = Field(gt=0)
    bias: bool = False

    def build(self, width: int) -> "GatedModule":
        return GatedModule(width, self.hidden, "silu", self.bias)


class Gated(FeedForward):
    """out(activation(gate x) ⊙ (up x)) with `hidden` channels. GeGLU is the one with gelu (ModernBERT), or with gelu_tanh
    (Gemma, T5 v1.1)."""

    kind: Literal["gated"] = "gated"
    hidden: int = Field(gt=0)
    activation: Activation = "silu"
    bias: bool = False

    def build(self, width: int) -> "GatedModule":
        return GatedModule(width, self.hidden, self.activation, self.bias)


class MLP(FeedForward):
    """out(activation(up x)) with `hidden` channels."""

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(gt=0)
    activation: Activation = "relu2"
    bias: bool = False

    def build(self, width: int) -> "MLPModule":
        return MLPModule(self, width)


class GatedModule(FeedForwardModule):
    """x (B, T, D) → (B, T, D)."""

    joins = (("gate", "up"),)

    def __init__(self, width: int, hidden: int, activation: Activation, bias: bool):
        super().__init__()
        self.gate = Linear(width, hidden, bias=bias)
        self.up = Linear(width, hidden, bias=bias)
        self.out = Linear(hidden, width, bias=bias, std=0.0)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = linear(x, self.gate, self.up)
        if self.activation == "silu" and self.tap is None:
            return self.out(kernels.silu_multiply_halves(both))
        gate, up = both.chunk(2, dim=-1)
        gate = self.site("gate", gate)
        act = kernels.silu_multiply(gate, up) if self.activation == "silu" else ACTIVATIONS[self.activation](gate) * up
        return self.site("out", self.out(self.site("act", act)))

    def cost(self, name: str) -> Cost:
        hidden = self.gate.weight.shape[0]
        kept = (4.0 if self.activation == "silu" else 6.0) * hidden  # both halves, and where it is not fused what multiplies
        read = same_input(self.gate.cost("gate"), self.up.cost("up"))
        parts = (*read, Cost("act", 0, 5.0 * hidden, kept), self.out.cost("out"))
        return Cost.sum(name, parts, f"{hidden} channels")


class MLPModule(FeedForwardModule):
    """x (B, T, D) → (B, T, D)."""

    def __init__(self, value: MLP, width: int):
        super().__init__()
        self.up = Linear(width, value.hidden, bias=value.bias)
        self.out = Linear(value.hidden, width, bias=value.bias, std=0.0)
        self.activation = ACTIVATIONS[value.activation]
        self.keeps = value.activation not in ("relu", "tanh")  # these are undone by their result, which the product keeps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = self.site("act", self.activation(self.site("gate", self.up(x))))
        return self.site("out", self.out(act))

    def cost(self, name: str) -> Cost:
        hidden = self.up.weight.shape[0]
        parts = (self.up.cost("up"), Cost("act", 0, 2.0 * hidden, 2.0 * hidden * self.keeps), self.out.cost("out"))
        return Cost.sum(name, parts, f"{hidden} channels")
