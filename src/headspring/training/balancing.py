"""What keeps the experts of a mixture busy in training: two losses, a correction without a loss, and what is reported.

A router left to itself sends everything to the few experts that happened to be good first. `Balanced` adds to an objective,
for each layer of experts, the load-balancing loss and the router z-loss (`models.routing`), summed over the tokens that
carry a loss: they are divided by the step's count like everything else, so that neither accumulation nor parallelism
changes them. `MoveCorrections` then moves each router's correction against the load of the whole step, over all
micro-batches and processes (arXiv 2408.15664; DeepSeek-V3): b ← b + rate · sign(mean load − load).

It wraps an objective rather than being part of one, because held-out loss must not contain it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Value
from headspring.data.batch import IGNORE
from headspring.models.model import ModelModule
from headspring.models.moe import MoEModule, expert_layers, watch_routing
from headspring.models.routing import Routing
from headspring.training import distributed
from headspring.training.callbacks import Callback
from headspring.training.objective import Objective

if TYPE_CHECKING:
    from headspring.training.loop import Run

BALANCE, BALANCE_BESIDE_CORRECTION = 0.01, 0.0001


class Balancing(Value):
    """Weights of the load-balancing loss `balance` (default 0.01, or 0.0001 where a correction does the work) and of the
    router `z_loss`; `correction_rate` is the step of a correction."""

    balance: float | None = Field(None, ge=0)
    z_loss: float = Field(0.001, ge=0)
    correction_rate: float = Field(0.001, ge=0)


def balanced(model: ModelModule, objective: Objective, config: Balancing | None = None) -> tuple[Objective, Sequence[Callback]]:
    """The objective to train with and the callbacks that belong to it: `objective` itself for a model without experts.

    Raises `UserError` where such a model is to be balanced.
    """
    if not expert_layers(model):
        if config is not None:
            raise UserError("balancing is for a mixture of experts, and this model has none: leave it out")
        return objective, ()
    watched = Balanced(objective, config or Balancing())
    return watched, (MoveCorrections(watched),)


class Balanced:
    """An objective whose batches have `targets` (B, T), one for each token of the model, with the losses of the routers.

    `load` is how often each expert of a layer was chosen since `take_load`, (E,) float32 by layer.
    """

    def __init__(self, objective: Objective, config: Balancing):
        self.objective, self.config = objective, config
        self.load: dict[str, torch.Tensor] = {}

    def count(self, batch: Any) -> int:
        return self.objective.count(batch)

    def loss(self, model: ModelModule, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with watch_routing(model) as routings:
            loss, metrics = self.objective.loss(model, batch)
        layers, counted = expert_layers(model), batch.targets != IGNORE
        # Means over layers of what the loop makes means over tokens.
        sums = {name: loss.new_zeros(()) for name in ("balance_loss", "router_z_loss", "router_entropy", "dropped_share")}
        total = loss
        for name, routing in routings.items():
            self._count_load(name, routing, counted)
            balance, z_loss = routing.balance_loss(counted), routing.z_loss(counted)
            total = total + self._weight(layers[name]) * balance + self.config.z_loss * z_loss
            measured = (balance, z_loss, routing.entropy(counted), routing.dropped(counted))
            for key, value in zip(sums, measured, strict=True):
                sums[key] = sums[key] + value.detach() / len(routings)
        return total, {**metrics, "cross_entropy": loss.detach(), **sums}

    def _weight(self, layer: MoEModule) -> float:
        if self.config.balance is not None:
            return self.config.balance
        return BALANCE if layer.router.correction is None else BALANCE_BESIDE_CORRECTION

    def _count_load(self, name: str, routing: Routing, counted: torch.Tensor) -> None:
        load = routing.load(counted).detach()
        self.load[name] = self.load[name] + load if name in self.load else load

    def take_load(self) -> dict[str, torch.Tensor]:
        """The load of all processes, which is then forgotten."""
        load, self.load = self.load, {}
        return {name: distributed.sum_across(value) for name, value in load.items()}


class MoveCorrections(Callback):
    """After each step, moves the corrections against the load and adds `experts` to the record, by layer: `share` of the
    choices that fell on each expert, `largest` of them as a multiple of the mean, and the number of `idle` experts."""

    def __init__(self, balanced: Balanced):
        self.balanced = balanced

    @torch.no_grad()
    def on_step(self, run: "Run", record: dict[str, Any]) -> None:
        layers, record["experts"] = expert_layers(run.model), {}
        for name, load in self.balanced.take_load().items():
            correction = layers[name].router.correction
            if correction is not None:
                correction.add_(torch.sign(load.mean() - load), alpha=self.balanced.config.correction_rate)
            share = load / load.sum().clamp(min=1)
            record["experts"][name] = {
                "share": [round(value, 4) for value in share.tolist()],
                "largest": float(share.max()) * len(share),
                "idle": int((load == 0).sum()),
            }
