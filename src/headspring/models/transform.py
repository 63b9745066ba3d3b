"""What BERT puts between its last hidden state and its vocabulary (arXiv 1810.04805): one more layer that is not residual.

    t = norm(activation(W h + b)),   logits = t Eᵀ + bias

The stack's last state has to serve every use of an encoder; this layer turns it into a token's embedding for the one use
that is guessing the token, and is left behind with the head when the encoder is used for something else.
"""

import torch

from headspring.artifacts.value import Value
from headspring.models.feedforward import ACTIVATIONS, Activation
from headspring.models.norm import LayerNorm, Norm
from headspring.models.part import Cost, Linear, PartModule


class Transform(Value):
    """norm(activation(dense(hidden))); `bias` is the dense layer's."""

    activation: Activation = "gelu"
    norm: Norm | None = LayerNorm()
    bias: bool = True

    def build(self, width: int) -> "TransformModule":
        return TransformModule(self, width)


class TransformModule(PartModule):
    """hidden (…, D) → (…, D)."""

    def __init__(self, value: Transform, width: int):
        super().__init__()
        self.dense = Linear(width, width, bias=value.bias)
        self.activation = ACTIVATIONS[value.activation]
        self.norm = value.norm.build(width) if value.norm else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.dense(hidden))
        return y if self.norm is None else self.norm(y)

    def cost(self, name: str) -> Cost:
        width = self.dense.weight.shape[0]
        parts = [self.dense.cost("dense"), Cost("act", 0, 2.0 * width, 2.0 * width)]
        if self.norm is not None:
            parts.append(self.norm.cost("norm"))
        return Cost.sum(name, tuple(parts), f"{width} → {width}")
