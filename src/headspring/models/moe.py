"""Mixture of experts (arXiv 1701.06538, 2101.03961): many feed-forward parts, of which each token uses a few.

    y = Σ_k weight_k · expert_{chosen_k}(x) + shared(x)

Every (token, expert) pair is one row. Rows are sorted by expert, so that each expert multiplies one slice (`grouped`); the
products of all experts then cost what a dense layer with the active parameters would, and a decoding step reads the
experts that it chose and no others.

Capacity bounds what an expert takes in training: a row too many passes by on the residual stream. In evaluation and
generation nothing is dropped, because there a token's result must not depend on how many stand beside it. What this gives
up: the model that answers sees a little more than the one that learned.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from headspring.artifacts import UserError
from headspring.artifacts.value import Value
from headspring.models import kernels
from headspring.models.expert_matrices import PackedExperts, products, versions_of
from headspring.models.feedforward import FeedForward, FeedForwardModule, SwiGLU
from headspring.models.grouped import add_biases, collect, dispatch, grouped_linear, lay_out
from headspring.models.kernels.packed import Kind, PackedMatrix
from headspring.models.model import ModelModule
from headspring.models.part import Cost, Linear, ParameterRule, PartModule, constant, normal
from headspring.models.routing import Router, Routing, SoftmaxRouter, within_capacity


class Clamp(Value):
    """GPT-OSS's gate (arXiv 2508.10925): g · sigmoid(alpha · g) · (u + 1), with g at most `limit` and |u| at most `limit`."""

    limit: float = Field(7.0, gt=0)
    alpha: float = Field(1.702, gt=0)


class MoE(FeedForward):
    """`top` of `experts` gated feed-forward parts, each with `hidden` channels, chosen by `router`.

    `shared` is the hidden width of a part that every token uses, weighed by a sigmoid of x where `shared_gate` (Qwen2-MoE).
    `bias` puts biases on the experts; `clamp` replaces silu(g) · u. With a `capacity` factor c, an expert takes at most
    c · T · top / experts tokens of a row in training.
    """

    kind: Literal["moe"] = "moe"
    experts: int = Field(gt=0)
    top: int = Field(gt=0)
    hidden: int = Field(gt=0)
    router: Router = SoftmaxRouter()
    shared: int | None = Field(None, gt=0)
    shared_gate: bool = False
    bias: bool = False
    clamp: Clamp | None = None
    capacity: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _can_route(self) -> "MoE":
        if self.top > self.experts:
            raise ValueError(f"top ({self.top}) is more than experts ({self.experts})")
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate weighs the shared part: give its width as shared")
        self.router.check(self.experts, self.top)
        return self

    def build(self, width: int) -> "MoEModule":
        return MoEModule(self, width)


class MoEModule(FeedForwardModule):
    """x (B, T, D) → (B, T, D). Site `router` is the logits (B, T, E). `on_routing` is told of each routing."""

    site_names = ("router", "out")
    on_routing: Callable[[Routing], None] | None = None

    def __init__(self, value: MoE, width: int):
        super().__init__()
        self.value = value
        self.router = value.router.build(width, value.experts, value.top)
        self.experts = Experts(value, width)
        self.shared: FeedForwardModule | None = SwiGLU(hidden=value.shared).build(width) if value.shared else None
        self.shared_gate = Linear(width, 1) if value.shared_gate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routing = self.router.route(self.site("router", self.router(x)))
        learning = self.training and torch.is_grad_enabled()  # a validation in the middle of training is none
        if learning and self.value.capacity is not None:
            routing = replace(routing, kept=within_capacity(routing.chosen, self.value.experts, self.value.capacity))
        if self.on_routing is not None:
            self.on_routing(routing)
        y = self.experts(x, routing)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        return self.site("out", y)

    def cost(self, name: str) -> Cost:
        parts = [self.router.cost("router"), self.experts.cost("experts")]
        if self.shared is not None:
            parts.append(self.shared.cost("shared"))
        if self.shared_gate is not None:
            weighed = 2.0 * self.shared_gate.weight.shape[1]  # what it multiplies; its input is that of `shared`
            parts.append(replace(self.shared_gate.cost("shared_gate"), activation_bytes=weighed))
        return Cost.sum(name, tuple(parts), f"{self.value.top} of {self.value.experts} experts of {self.value.hidden}")


@functools.cache
def _leave_graphs() -> None:
    """Compiled graphs end before `Experts.forward`: how many rows an expert has is known only when it runs. Said when the first
    is built, as torch's compiler takes a second to import, which models without experts are spared."""
    Experts.forward = torch.compiler.disable(Experts.forward)  # type: ignore[method-assign]


class Experts(PartModule):
    """x (B, T, D) and a routing → (B, T, D). All experts' weights in one tensor for each product, (E, outputs, inputs).

    A model that is packed for serving multiplies by `packed_experts` instead. `watcher` is told of every product: the names of
    the weights, the rows that they multiply and where those of each expert end.
    """

    packed_experts: PackedExperts | None = None
    watcher: "ClassVar[Callable[[Experts, tuple[str, ...], torch.Tensor, tuple[int, ...]], object] | None]" = None

    def __init__(self, value: MoE, width: int):
        super().__init__()
        _leave_graphs()
        experts, hidden = value.experts, value.hidden
        self.clamp, self.top = value.clamp, value.top
        self.gate = nn.Parameter(torch.empty(experts, hidden, width))
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.out = nn.Parameter(torch.empty(experts, width, hidden))
        self.gate_bias = nn.Parameter(torch.empty(experts, hidden)) if value.bias else None
        self.up_bias = nn.Parameter(torch.empty(experts, hidden)) if value.bias else None
        self.out_bias = nn.Parameter(torch.empty(experts, width)) if value.bias else None

    def rules(self) -> dict[str, ParameterRule]:
        inward = ParameterRule(normal(self.gate.shape[-1] ** -0.5), "matrix", inputs=self.gate.shape[-1])
        outward = ParameterRule(constant(0.0), "matrix", inputs=self.out.shape[-1], writes=True)
        rules = {"gate": inward, "up": inward, "out": outward}
        if self.out_bias is not None:
            rules |= dict.fromkeys(("gate_bias", "up_bias", "out_bias"), ParameterRule(constant(0.0), "vector"))
        return rules

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        kept = None if routing.kept is None else routing.kept.flatten(0, 1)
        packed = self._serving()
        tiled = packed is None and not kernels.multiplies_natively(rows)
        layout = lay_out(routing.chosen.flatten(0, 1), kept, len(self.gate), tiled)
        inputs = dispatch(rows, layout)
        both = self._multiply(inputs, ("gate", "up"), None if packed is None else packed.inward, layout.ends)
        outward = None if packed is None else tuple((matrix,) for matrix in packed.outward)
        rows = self._multiply(self._gated(both), ("out",), outward, layout.ends)
        return collect(rows, routing.weights.reshape(-1, self.top), layout).view_as(x)

    def _serving(self) -> PackedExperts | None:
        """The packed matrices, unless the weights are about to learn or have changed."""
        if self.packed_experts is not None and torch.is_grad_enabled() and self.gate.requires_grad:
            self.unpack()
        return self.packed_experts

    def _multiply(
        self,
        x: torch.Tensor,
        names: tuple[str, ...],
        packed: Sequence[tuple[PackedMatrix, ...]] | None,
        ends: tuple[int, ...],
    ) -> torch.Tensor:
        if Experts.watcher is not None:
            Experts.watcher(self, names, x, ends)
        biases = [bias for name in names if (bias := getattr(self, f"{name}_bias")) is not None]
        if packed is None:
            return grouped_linear(x, [getattr(self, name) for name in names], biases, ends)
        return add_biases(products(x, packed, ends), biases, ends)

    def pack(self, kind: Kind = "bf16") -> None:
        """For serving; bfloat16 is packed anew where weights have changed. Whole numbers stay."""
        held, weights = self.packed_experts, (self.gate, self.up, self.out)
        if held is not None and held.kind == "bf16" and held.versions != versions_of(*weights) and self.gate.is_contiguous():
            self.unpack()
        if self.packed_experts is None:
            self.packed_experts = PackedExperts.of_floats(*weights, kind)

    def unpack(self) -> None:
        """Multiply by the float weights again. Raises `UserError` where there are none."""
        if self.packed_experts is not None and (self.packed_experts.kind != "bf16" or not self.gate.is_contiguous()):
            raise UserError("this model is quantized, or its float weights were released: it cannot be trained; load it again")
        self.packed_experts = None

    def _gated(self, both: torch.Tensor) -> torch.Tensor:
        if self.clamp is None:
            return kernels.silu_multiply_halves(both)
        return kernels.clamped_multiply_halves(both, self.clamp.alpha, self.clamp.limit)

    def cost(self, name: str) -> Cost:
        experts, hidden, width = self.gate.shape
        parameters = sum(parameter.numel() for parameter in self.parameters())
        idle = parameters // experts * (experts - self.top)
        flops = self.top * (6.0 * width * hidden + 5.0 * hidden)
        activation = self.top * 2.0 * (2 * width + 3 * hidden)
        shape = f"{self.top} × ({width} → {hidden} → {width})"
        return Cost(name, parameters, flops, activation, 0.0, shape, idle_parameters=idle)


def expert_layers(model: ModelModule) -> dict[str, MoEModule]:
    """The mixtures of experts of a model by the prefix of their sites ("layers.0.mlp")."""
    return {prefix: module for prefix, module, _ in model.owners() if isinstance(module, MoEModule)}


@contextmanager
def watch_routing(model: ModelModule) -> Iterator[dict[str, Routing]]:
    """Inside the block, a forward pass leaves the routing of every mixture of experts under its name.

    A pass that is made again for the backward pass (activation checkpointing) happens outside the block and is not counted.
    """
    layers, seen = expert_layers(model), dict[str, Routing]()
    for name, layer in layers.items():
        layer.on_routing = functools.partial(seen.__setitem__, name)
    try:
        yield seen
    finally:
        for layer in layers.values():
            layer.on_routing = None
