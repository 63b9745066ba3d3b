"""Normalisation: RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450).

Statistics and the gain are computed in float32 whatever the dtype of the activations, and rounded once at the end. Where a
family rounds twice (Llama casts before it multiplies by the gain) ours is the nearer to the exact value, by at most one unit
in the last place of the low precision; in float32 there is no difference.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
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
    """y = x / sqrt(mean(x²) + epsilon) · gain.

    `plus_one` stores gain − 1, as Gemma does, so that weight decay draws the gain to 1. `gain: false` has none.
    """

    kind: Literal["rms_norm"] = "rms_norm"
    epsilon: float = Field(1e-6, ge=0)
    gain: bool = True
    plus_one: bool = False

    @model_validator(mode="after")
    def _has_what_it_stores(self) -> "RMSNorm":
        if self.plus_one and not self.gain:
            raise ValueError("plus_one says how the gain is stored, and gain is false")
        return self

    def build(self, width: int) -> "RMSNormModule":
        return RMSNormModule(self, width)


class LayerNorm(Norm):
    """y = (x − mean(x)) / sqrt(var(x) + epsilon) · gain + bias. OLMo (arXiv 2402.00838) has neither gain nor bias."""

    kind: Literal["layer_norm"] = "layer_norm"
    epsilon: float = Field(1e-5, ge=0)
    gain: bool = True
    bias: bool = True

    def build(self, width: int) -> "LayerNormModule":
        return LayerNormModule(self, width)


class RMSNormModule(NormModule):
    """RMSNorm over the last dimension."""

    def __init__(self, value: RMSNorm, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if value.gain else None
        self.value, self.width, self.epsilon = value, width, value.epsilon

    def rules(self) -> dict[str, ParameterRule]:
        if self.weight is None:
            return {}
        return {"weight": ParameterRule(constant(0.0 if self.value.plus_one else 1.0), "vector")}

    @property
    def gain(self) -> torch.Tensor:
        """What multiplies: (D,), whatever way it is stored."""
        if self.weight is None:
            return torch.ones(self.width)
        return self.weight.float() + 1.0 if self.value.plus_one else self.weight

    def gain_for(self, x: torch.Tensor) -> torch.Tensor:
        """The same where `x` is: ones are made there, because what a CUDA graph replays can copy nothing to the device."""
        return torch.ones(self.width, device=x.device) if self.weight is None else self.gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.gain_for(x), self.epsilon)

    def cost(self, name: str) -> Cost:
        parameters = 0 if self.weight is None else self.width
        return Cost(name, parameters, 4.0 * self.width, 2.0 * self.width + 4, 0.0, f"{self.width}")


class LayerNormModule(NormModule):
    """LayerNorm over the last dimension."""

    def __init__(self, value: LayerNorm, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if value.gain else None
        self.bias = nn.Parameter(torch.empty(width)) if value.bias else None
        self.width, self.epsilon = width, value.epsilon

    def rules(self) -> dict[str, ParameterRule]:
        rules = {} if self.weight is None else {"weight": ParameterRule(constant(1.0), "vector")}
        if self.bias is not None:
            rules["bias"] = ParameterRule(constant(0.0), "vector")
        return rules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if stored is None else stored.to(x.dtype) for stored in (self.weight, self.bias))
        return nn.functional.layer_norm(x, (self.width,), weight, bias, self.epsilon)

    def cost(self, name: str) -> Cost:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return Cost(name, parameters, 6.0 * self.width, 2.0 * self.width + 8, 0.0, f"{self.width}")
