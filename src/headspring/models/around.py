"""A model around a model: what it shares with the one inside, which computes the hidden states and the next token.

    Headed       heads beside the one for the next token        heads.py
    Multimodal   towers before the embedding                     multimodal.py

The inner model, `body`, is a whole one, with its own config: a trained decoder is put in, and taken out again, as it is. Its
sites keep their names. Beside an option of the decoder for every such thing, this leaves the decoder as it was, bit for bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from headspring.models.model import Model, ModelModule
from headspring.models.part import ParameterRule, PartModule
from headspring.models.state import State

SIZES = ("vocab", "width", "context")


def with_sizes_of(value: Any, name: str) -> Any:
    """The fields of a value around the model `name`, whose sizes need not be given again."""
    if not isinstance(value, dict) or name not in value:
        return value
    inner = Model.choose(value[name])
    for size in SIZES:
        if value.get(size, getattr(inner, size)) != getattr(inner, size):
            raise ValueError(f"{size} ({value[size]}) is that of {name} ({getattr(inner, size)}); leave it out")
    return {size: getattr(inner, size) for size in SIZES} | value | {name: inner}


class Around(Model):
    """A value whose sizes are those of the model inside, which its subclasses fill in by `with_sizes_of`."""

    vocab: int = Field(0, gt=0)
    width: int = Field(0, gt=0)


class AroundModule(ModelModule):
    """The module around `body`. A subclass adds its parts and calls `complete()`."""

    def __init__(self, config: Model, body: ModelModule):
        super().__init__(config)
        self.body = body

    def adjusted(self, name: str, shape: Sequence[int], rule: ParameterRule) -> ParameterRule:
        side, _, rest = name.partition(".")
        return self.body.adjusted(rest, shape, rule) if side == "body" else rule

    def owners(self) -> Iterator[tuple[str, PartModule, tuple[str, ...]]]:
        return self.body.owners()

    def blocks(self) -> Iterable[nn.Module]:
        return self.body.blocks()

    def compute_alike(self) -> None:
        """What is set for the whole (a dtype, by `computing_in`) holds inside."""
        self.body.compute_dtype, self.body.checkpoint_activations = self.compute_dtype, self.checkpoint_activations

    def new_state(self, batch: int, capacity: int | None = None) -> State:
        self.compute_alike()
        return self.body.new_state(batch, capacity)

    @property
    def output_weight(self) -> torch.Tensor | None:
        return self.body.output_weight

    @property
    def output_bias(self) -> torch.Tensor | None:
        return self.body.output_bias

    @property
    def softcap(self) -> float | None:
        return self.body.softcap

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.body.head_input(hidden)
