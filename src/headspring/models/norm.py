"""Normalisation: RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450).

Statistics are taken in float32 whatever the dtype of the activations; the gain is applied after the cast back, as the
Llama family does.
"""

from typing import Literal

import torch
from torch import nn

from headspring.artifacts.value import Variant
from headspring.models import kernels
from headspring.models.part import Cost, ParameterRule, PartModule, constant


class Norm(Variant):
    """The value of a normalisation over the last dimension."""

    def build(self, width: int) -> "NormModule":
        raise NotImplementedError


class NormModule(PartModule):
    """x (…, D) → (…, D)."""

    def cost(self, name: str) -> Cost:
        raise NotImplementedError


class RMSNorm(Norm):
    """y = x / sqrt(mean(x²) + epsilon) · gain."""

    kind: Literal["rms_norm"] = "rms_norm"
    epsilon: float = 1e-6

    def build(self, width: int) -> "RMSNormModule":
        return RMSNormModule(width, self.epsilon)


class LayerNorm(Norm):
    """y = (x − mean(x)) / sqrt(var(x) + epsilon) · gain + bias."""

    kind: Literal["layer_norm"] = "layer_norm"
    epsilon: float = 1e-5
    bias: bool = True

    def build(self, width: int) -> "LayerNormModule":
        return LayerNormModule(width, self.epsilon, self.bias)


class RMSNormModule(NormModule):
    """RMSNorm over the last dimension."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def rules(self) -> dict[str, ParameterRule]:
        return {"weight": ParameterRule(constant(1.0), "vector")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.epsilon)

    def cost(self, name: str) -> Cost:
        width = self.weight.numel()
        return Cost(name, width, 4.0 * width, 2.0 * width, 0.0, f"{width}")


class LayerNormModule(NormModule):
    """LayerNorm over the last dimension."""

    def __init__(self, width: int, epsilon: float, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.epsilon = epsilon

    def rules(self) -> dict[str, ParameterRule]:
        rules = {"weight": ParameterRule(constant(1.0), "vector")}
        if self.bias is not None:
            rules["bias"] = ParameterRule(constant(0.0), "vector")
        return rules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.epsilon)

    def cost(self, name: str) -> Cost:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        width = self.weight.numel()
        return Cost(name, parameters, 6.0 * width, 2.0 * width, 0.0, f"{width}")
