"""A position inside attention: what it does to queries and keys, and what it adds to their scores."""

from typing import Literal

import torch

from headspring.artifacts.value import Variant
from headspring.models.context import Context
from headspring.models.part import Cost, PartModule


class Position(Variant):
    """How attention knows where its queries and keys stand."""

    def build(self, heads: int, channels: int, causal: bool) -> "PositionModule":
        """The module for `heads` heads of `channels` channels; `causal` says that no query sees a later key."""
        raise NotImplementedError


class PositionModule(PartModule):
    """The hooks do nothing here. `key` names what `prepare` puts into the context; layers alike have the same. `biased` says
    that something is added to the scores, `learned` that it has parameters."""

    key: str = ""
    biased = False
    learned = False
    by_length = False

    def regime(self, length: int) -> int:
        """Keys placed in sequences of lengths with the same number are placed alike (see `Scaling.regime`)."""
        return 0

    def prepare(self, context: Context) -> None:
        """Work out, once for a forward pass, what the hooks need."""

    def place(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """Queries or keys (B, T, H, C) → the same, marked with their positions."""
        return x

    def rotation(self, context: Context) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(cos, sin) where `place` is `kernels.rotate` by them; None where it leaves queries and keys alone."""
        return None

    @property
    def fuses(self) -> bool:
        """Whether `rotation` says all that `place` does."""
        return True

    def bias(self, context: Context) -> torch.Tensor | None:
        """What is added to the scores, (B or 1, H, T, S) float32, once prepared; None adds nothing."""
        return None

    def between(self, relative: torch.Tensor, context: Context) -> torch.Tensor | None:
        """The same for chosen queries and keys, by the position of each key − that of its query, int64:
        (…, T, S) → (…, H, T, S)."""
        return None

    def element(self, relative: torch.Tensor, head: torch.Tensor, context: Context) -> torch.Tensor:
        """The same for one query, key and head, or for tensors of them that broadcast, once prepared."""
        raise NotImplementedError

    def cost(self, name: str, vectors: int) -> Cost | None:
        """What it costs per token, with `vectors` queries and keys a token. None where that is nothing."""
        return None


class NoPE(Position):
    """No position: attention sees order only through the causal mask (arXiv 2305.19466)."""

    kind: Literal["nope"] = "nope"

    def build(self, heads: int, channels: int, causal: bool) -> PositionModule:
        return PositionModule()
