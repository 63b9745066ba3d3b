"""How the learning rate moves over a run: warm-up, then cosine, or warm-up–stable–decay (arXiv 2404.06395)."""

import math
from typing import Annotated, Literal

from pydantic import Field

from headspring.artifacts.value import Value

Fraction = Annotated[float, Field(ge=0, le=1)]


class Cosine(Value):
    """Linear warm-up over `warmup_steps`, then half a cosine down to `final` of the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(20, ge=0)
    final: Fraction = 0.1

    def factor(self, step: int, steps: int) -> float:
        """The multiple of the peak rate for `step` = 0 … steps − 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class WarmupStableDecay(Value):
    """Linear warm-up, constant, then linear decay to `final` over the last `decay` fraction of the run."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: int = Field(20, ge=0)
    decay: Fraction = 0.4
    final: Fraction = 0.0

    def factor(self, step: int, steps: int) -> float:
        """The multiple of the peak rate for `step` = 0 … steps − 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_steps = self.decay * steps
        if not decay_steps:
            return 1.0
        return min(1.0, self.final + (1 - self.final) * (steps - step) / decay_steps)


Schedule = Annotated[Cosine | WarmupStableDecay, Field(discriminator="kind")]
