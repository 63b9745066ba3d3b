"""Mixers: the parts of a block that move information between tokens. Attention, LSTM, Mamba and delta nets are one thing here.

    mixer(x (B, T, D), context, state) → y (B, T, D)

A mixer is a value (`Attention(heads=4)`) that builds a module. With a `state` the tokens follow those that the state holds,
and the state is brought up to date. What several layers need is worked out in `prepare`, once for a forward pass. To add
one: a new file with a value that derives from `Mixer` and a module that derives from `MixerModule`, and an entry in
`families.py`, from which it inherits every test of the contract.
"""

from typing import TYPE_CHECKING

import torch

from headspring.artifacts.value import Variant
from headspring.models.context import Context
from headspring.models.part import Cost, PartModule
from headspring.models.state import LayerState

if TYPE_CHECKING:
    from headspring.models.paged import Pages


class Mixer(Variant):
    """The value of a mixer. `causal`: no token is moved by one that comes after it."""

    @property
    def causal(self) -> bool:
        return True

    @property
    def reads_memory(self) -> bool:
        """Whether it mixes in what an encoder read, and not the tokens among themselves."""
        return False

    def build(self, width: int) -> "MixerModule":
        raise NotImplementedError


class MixerModule(PartModule):
    """x (B, T, D) → (B, T, D). `site_names` are those of its activations that can be seen and edited; `out` is the last.
    Together those of `cut` determine it."""

    site_names: tuple[str, ...] = ("out",)
    cut: tuple[str, ...] = ("q", "k", "v")

    @property
    def pages(self) -> bool:
        """Whether it reads a row of several sequences (`Context.ragged`), its memory in pages. Others get them one by one."""
        return False

    @property
    def by_length(self) -> bool:
        """Whether what it makes of a token depends on how many tokens there are; then see `regime`."""
        return False

    def regime(self, length: int) -> int:
        """Sequences of lengths with the same number are read alike. Where it changes, a state is read anew."""
        return 0

    def prepare(self, context: Context) -> None:
        """Put what this mixer needs of the context into it, unless another layer has done so."""

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        raise NotImplementedError

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        """An empty memory for `batch` rows of up to `capacity` tokens."""
        raise NotImplementedError

    def new_pages(
        self, count: int, dtype: torch.dtype, device: torch.device, stored: torch.dtype | None = None
    ) -> "Pages | None":
        """A pool of pages, kept as `stored` (int8, or by default `dtype`); None where it does not use any."""
        return None

    def cost(self, name: str, context_length: int) -> Cost:
        """What it costs per token in sequences of `context_length` tokens."""
        raise NotImplementedError
