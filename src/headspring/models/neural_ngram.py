"""The neural n-gram model (Bengio et al. 2003, "A Neural Probabilistic Language Model", equations 1 and 2) as a mixer.

    y_t = U tanh(H [x_t, x_{t−1}, …, x_{t−n+2}] + d)  (+ x_t W, the direct connection)

It sees the last n − 1 tokens and nothing else: a fixed window, as an n-gram model has, but with vectors that share what
they learn between similar tokens. Where the window reaches over the beginning of a document it holds zeros.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from headspring.models.context import Context
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.part import Cost, Linear
from headspring.models.state import LayerState, RecurrentState


class NeuralNGram(Mixer):
    """`order` n: each prediction sees n − 1 tokens. `hidden` channels of tanh; `direct` adds a linear path around them."""

    kind: Literal["neural_ngram"] = "neural_ngram"
    order: int = Field(5, gt=1)
    hidden: int = Field(gt=0)
    direct: bool = False

    def build(self, width: int) -> "NeuralNGramModule":
        return NeuralNGramModule(self, width)


class NeuralNGramModule(MixerModule):
    """x (B, T, D) → (B, T, D). Sites: `act` (B, T, F) after tanh, `out`."""

    site_names = ("act", "out")

    def __init__(self, value: NeuralNGram, width: int):
        super().__init__()
        self.value, self.width = value, width
        self.seen = value.order - 1
        self.input = Linear(self.seen * width, value.hidden, bias=True)
        self.out = Linear(value.hidden, width)
        self.direct = Linear(self.seen * width, width) if value.direct else None

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        assert state is None or isinstance(state, RecurrentState)
        window = self._window(x, context, state)
        act = self.site("act", torch.tanh(self.input(window)))
        y = self.out(act)
        return self.site("out", y if self.direct is None else y + self.direct(window))

    def _window(self, x: torch.Tensor, context: Context, state: RecurrentState | None) -> torch.Tensor:
        """(B, T, (n−1)·D): each token and those before it, newest first; zeros before a document's first token."""
        batch, time, _ = x.shape
        before = x.new_zeros(batch, self.seen - 1, self.width) if state is None else state["before"].to(x.dtype)
        line = torch.cat([before, x], dim=1)
        if state is not None:
            state.replace(time, before=line[:, time:])
        views = []
        for back in range(self.seen):
            view = line[:, self.seen - 1 - back : self.seen - 1 - back + time]
            views.append(view.masked_fill((context.positions < back)[..., None], 0.0) if back else view)
        return torch.cat(views, dim=-1)

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        return RecurrentState(before=torch.zeros(batch, self.seen - 1, self.width, dtype=dtype, device=device))

    def cost(self, name: str, context_length: int) -> Cost:
        parts = [self.input.cost("input"), Cost("act", 0, self.value.hidden), self.out.cost("out")]
        parts.append(Cost("state", fixed_state_bytes=2.0 * (self.seen - 1) * self.width))
        if self.direct is not None:
            parts.append(replace(self.direct.cost("direct"), activation_bytes=0.0))  # the input of `input`
        return Cost.sum(name, tuple(parts), f"{self.seen} tokens, {self.value.hidden} channels")
