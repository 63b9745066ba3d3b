"""What every part of a model has in common: a value that describes it and a module that computes it.

A value (`Attention(heads=4)`) is frozen and serialisable. `value.build(width)` gives the module. A module declares a
`ParameterRule` for each parameter it owns, and its cost for the ledger; `Decoder.build` refuses a parameter without a rule,
so that nothing can be left uninitialised, untrained or unexported.

Shape letters used in this room: B batch, T time (queries), S time (keys), D width, H heads, K key–value heads,
C channels of a head, F hidden width of the feed-forward, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from headspring.artifacts.errors import UserError
from headspring.models import kernels
from headspring.models.kernels.packed import PackedMatrix

Group = Literal["matrix", "embedding", "head", "vector"]


@dataclass(frozen=True)
class ParameterRule:
    """How a parameter starts and which optimizer group trains it.

    `matrix` parameters are hidden matrices (Muon's domain), `vector` gains and biases. An ordinary matrix says how many
    `inputs` each of its outputs reads and whether it `writes` to the residual stream; an `Init` may choose another start for
    it. `rate` multiplies the learning rate under AdamW.
    """

    init: Callable[[torch.Tensor, torch.Generator], object]
    group: Group
    inputs: int | None = None
    writes: bool = False
    rate: float = 1.0


def normal(std: float) -> Callable[[torch.Tensor, torch.Generator], object]:
    """Gaussian with mean 0."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def constant(value: float) -> Callable[[torch.Tensor, torch.Generator], object]:
    """Every element the same."""
    return lambda tensor, generator: tensor.fill_(value)


@dataclass(frozen=True)
class Cost:
    """What one part costs in a forward pass.

    `flops` multiply–adds count two, per token; `activation_bytes` that a backward pass keeps, per token, of activations in half
    precision; `state_bytes` of the cache, per token, at two bytes an element; `fixed_state_bytes` of a memory that does not
    grow, per sequence, two bytes an element but four where it is kept in float32 whatever the activations;
    `idle_parameters` are those of experts that a token does not go to. `children` sum to the part.

    The rule for activations: what autograd saves, each tensor once whoever else reads it, so that a part counts what it reads
    unless another part has; a fused operator of `kernels` saves what it reads and its statistics; attention that no fused
    kernel takes forms its pattern again where the sequence is long. Integers and masks of bits are left out.
    """

    name: str
    parameters: int = 0
    flops: float = 0.0
    activation_bytes: float = 0.0
    state_bytes: float = 0.0
    shape: str = ""
    children: tuple["Cost", ...] = ()
    fixed_state_bytes: float = 0.0
    idle_parameters: int = 0

    @property
    def active_parameters(self) -> int:
        """The parameters that one token uses."""
        return self.parameters - self.idle_parameters

    @staticmethod
    def sum(name: str, children: "tuple[Cost, ...]", shape: str = "") -> "Cost":
        def total(field: str) -> float:
            return sum(getattr(child, field) for child in children)

        return Cost(
            name,
            int(total("parameters")),
            total("flops"),
            total("activation_bytes"),
            total("state_bytes"),
            shape,
            children,
            total("fixed_state_bytes"),
            int(total("idle_parameters")),
        )


def same_input(*costs: Cost) -> tuple[Cost, ...]:
    """Parts that read one tensor: the first keeps it for all."""
    return (costs[0], *(replace(cost, activation_bytes=0.0) for cost in costs[1:]))


class PartModule(nn.Module):
    """A module with rules for its own parameters (not its children's), a cost, and sites that can be observed.

    `watched` are the sites that somebody looks at. A fused kernel never forms some of them, the `plain_sites`: when one is
    watched, the module takes its readable path, whose last bits differ.
    """

    joins: tuple[tuple[str, ...], ...] = ()  # names of `Linear` parts that `linear` multiplies at once
    reads_weights: tuple[str, ...] = ()  # names of `Linear` parts whose `weight` is read as it is
    watched: frozenset[str] = frozenset()
    plain_sites: tuple[str, ...] = ()
    tap: Callable[[str, torch.Tensor], torch.Tensor] | None = None

    def rules(self) -> dict[str, ParameterRule]:
        """Parameter name → rule, for the parameters this very module owns."""
        return {}

    def site(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Let an observer read or replace `value`. Free when nobody looks: `tap` is None and compiled away."""
        return value if self.tap is None else self.tap(name, value)


class Linear(PartModule):
    """y = x Wᵀ + b, computed in the dtype of `x`: the parameters stay in the precision they are trained in.

    `std` 0 is for matrices whose output is added to the residual stream: by default they start as nothing. A model that is
    packed for serving multiplies by `packed` instead; `joined` is that of this matrix and those that are read with it.
    `addition` is what an adapter adds to y, as a function of the same x (`lora`).
    """

    packed: PackedMatrix | None = None
    joined: PackedMatrix | None = None
    packed_version: int = 0  # of the weights that were packed
    addition: Callable[[torch.Tensor], torch.Tensor] | None = None
    watcher: "ClassVar[Callable[[tuple[Linear, ...], torch.Tensor], object] | None]" = None  # is told of every product's input

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, std: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.std = inputs**-0.5 if std is None else std

    def rules(self) -> dict[str, ParameterRule]:
        weight = constant(0.0) if self.std == 0 else normal(self.std)
        rules = {"weight": ParameterRule(weight, "matrix", inputs=self.weight.shape[1], writes=self.std == 0)}
        if self.bias is not None:
            rules["bias"] = ParameterRule(constant(0.0), "vector")
        return rules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self)

    def unpack(self) -> None:
        """Multiply by the float weights again, because they are about to learn. Raises `UserError` where there are none."""
        if self.packed is not None and (self.packed.kind != "bf16" or not self.weight.is_contiguous()):
            raise UserError("this model is quantized, or its float weights were released: it cannot be trained; load it again")
        self.packed = self.joined = None

    def cost(self, name: str) -> Cost:
        outputs, inputs = self.weight.shape
        parameters = self.weight.numel() + (0 if self.bias is None else outputs)
        return Cost(name, parameters, 2.0 * inputs * outputs, 2.0 * inputs, 0.0, f"{inputs} → {outputs}")


def linear(x: torch.Tensor, *parts: Linear) -> torch.Tensor:
    """x (..., I) times several matrices side by side, from one product where it can be: (..., Σ Oᵢ)."""
    if Linear.watcher is not None:
        Linear.watcher(parts, x)
    y = _product(x, *parts)
    for part in parts:
        if part.addition is not None:
            return _with_additions(y, x, parts)
    return y


def _with_additions(y: torch.Tensor, x: torch.Tensor, parts: tuple[Linear, ...]) -> torch.Tensor:
    """In place: y is nobody else's yet."""
    start = 0
    for part in parts:
        stop = start + part.weight.shape[0]
        if part.addition is not None:
            y[..., start:stop] += part.addition(x)
        start = stop
    return y


def _product(x: torch.Tensor, *parts: Linear) -> torch.Tensor:
    """`linear` without additions."""
    biases: list[torch.Tensor] = [part.bias for part in parts if part.bias is not None]
    if parts[0].packed is None:
        return kernels.linear(x, [part.weight for part in parts], biases)
    if torch.is_grad_enabled() and any(part.weight.requires_grad for part in parts):
        for part in parts:
            part.unpack()
        return _product(x, *parts)
    whole = parts[0].joined if len(parts) > 1 else parts[0].packed
    if whole is None:
        return torch.cat([_product(x, part) for part in parts], dim=-1)
    return kernels.product(x, whole, torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None)
