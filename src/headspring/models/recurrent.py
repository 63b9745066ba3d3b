"""Recurrent networks: the simple RNN (Elman 1990), LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al.
2000) and GRU (arXiv 1406.1078).

    RNN   h ← tanh(a)
    LSTM  c ← f ⊙ c + i ⊙ g,  h ← o ⊙ tanh(c)
    GRU   h ← z ⊙ h + (1 − z) ⊙ n,  n = tanh(aₙ + r ⊙ (Uₙ h + bₙ))

with a = W x + U h + b and σ or tanh around each gate. The products with W are one product for all tokens; only those with U
wait for the token before. Where nobody looks at the gates torch's own fused recurrence computes the same, several times
faster; an observer of `gates` takes the readable loop, whose last bits differ.

Memory starts anew where a document or a row begins: such rows are cut into runs, and each run is a row of its own.
`truncate` is truncated back-propagation through time (Williams & Peng 1990): gradients flow through that many tokens, the
memory through all. It works inside a sequence; nothing is carried from one training step to the next, because a sample here
is a function of its index alone.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from headspring.models.context import Context
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.part import Cost, Linear, ParameterRule
from headspring.models.state import LayerState, RecurrentState


class Recurrent(Mixer):
    """`hidden` channels of memory (default: the width; another number brings a projection back to the width).

    `singular_value`: the matrix U starts orthogonal times this number, which decides whether gradients vanish or explode.
    `truncate`: the number of tokens that gradients flow back through (default: all).
    """

    kind: str
    hidden: int | None = Field(None, gt=0)
    singular_value: float = Field(1.0, gt=0)
    truncate: int | None = Field(None, gt=0)

    gates: ClassVar[int]
    memories: ClassVar[tuple[str, ...]] = ("h",)

    def build(self, width: int) -> "RecurrentModule":
        return RecurrentModule(self, width)

    def step(self, a: torch.Tensor, u: torch.Tensor, memory: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Gates (B, G, H) from a = W x + b and u = U h + b′, both (B, G, H)."""
        raise NotImplementedError

    def update(self, gates: torch.Tensor, memory: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The memory after a token, h first."""
        raise NotImplementedError

    def fused(self, *arguments):
        """torch's recurrence over a packed batch."""
        raise NotImplementedError


class RNN(Recurrent):
    """The simple recurrent network; its one gate is the new memory."""

    kind: Literal["rnn"] = "rnn"
    gates: ClassVar[int] = 1

    def step(self, a, u, memory):
        return torch.tanh(a + u)

    def update(self, gates, memory):
        return (gates[:, 0],)

    def fused(self, *arguments):
        return torch._VF.rnn_tanh(*arguments)


class LSTM(Recurrent):
    """Gates in torch's order: input, forget, candidate, output. Forget gates start open, with a bias of 1."""

    kind: Literal["lstm"] = "lstm"
    gates: ClassVar[int] = 4
    memories: ClassVar[tuple[str, ...]] = ("h", "c")

    def step(self, a, u, memory):
        i, f, g, o = (a + u).unbind(1)
        return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=1)

    def update(self, gates, memory):
        i, f, g, o = gates.unbind(1)
        c = f * memory[1] + i * g
        return o * torch.tanh(c), c

    def fused(self, *arguments):
        return torch._VF.lstm(*arguments)


class GRU(Recurrent):
    """Gates in torch's order: reset, update, candidate."""

    kind: Literal["gru"] = "gru"
    gates: ClassVar[int] = 3

    def step(self, a, u, memory):
        r, z = torch.sigmoid(a[:, :2] + u[:, :2]).unbind(1)
        return torch.stack([r, z, torch.tanh(a[:, 2] + r * u[:, 2])], dim=1)

    def update(self, gates, memory):
        _, z, n = gates.unbind(1)
        return ((1 - z) * n + z * memory[0],)

    def fused(self, *arguments):
        return torch._VF.gru(*arguments)


class RecurrentModule(MixerModule):
    """x (B, T, D) → (B, T, D). Sites: `gates` (B, T, G, H) after their non-linearity, `h` (B, T, H), `out`."""

    site_names = ("gates", "h", "out")
    plain_sites = ("gates",)
    reads_weights = ("input", "memory")  # by torch's fused recurrence

    def __init__(self, value: Recurrent, width: int):
        super().__init__()
        self.value = value
        self.hidden = value.hidden or width
        self.input = Linear(width, value.gates * self.hidden, bias=True)
        self.memory = Memory(value, self.hidden)
        self.out = Linear(self.hidden, width) if self.hidden != width else None

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        assert state is None or isinstance(state, RecurrentState)
        first = [x.new_zeros(len(x), self.hidden) for _ in self.value.memories]
        if state is not None:
            first = [state[name].to(x.dtype) for name in self.value.memories]
        run = self._readable if "gates" in self.watched else self._fused
        h, last = run(x, context, first)
        if state is not None:
            state.replace(x.shape[1], **dict(zip(self.value.memories, last, strict=True)))
        h = self.site("h", h)
        return self.site("out", h if self.out is None else self.out(h))

    # ---- the definition

    def _readable(self, x: torch.Tensor, context: Context, memory: list[torch.Tensor]):
        """Token by token. Returns h (B, T, H) and the last memory."""
        batch, time, _ = x.shape
        inputs = self.input(x).view(batch, time, self.value.gates, self.hidden).unbind(1)  # not [:, t]: see `chunked.delta`
        first, gates = tuple(memory), []
        now = first
        for t, a in enumerate(inputs):
            now = self._carried(now, context, t)
            u = self.memory(now[0]).view(batch, self.value.gates, self.hidden)
            gates.append(self.value.step(a, u, now))
            now = self.value.update(gates[-1], now)
        return self._replay(self.site("gates", torch.stack(gates, dim=1)), context, first)

    def _replay(self, gates: torch.Tensor, context: Context, now: tuple[torch.Tensor, ...]):
        """What memory becomes under given gates: those that were seen, or what an observer made of them."""
        outputs = []
        for t, opened in enumerate(gates.unbind(1)):
            now = self.value.update(opened, self._carried(now, context, t))
            outputs.append(now[0])
        return torch.stack(outputs, dim=1), now

    def _carried(self, now: tuple[torch.Tensor, ...], context: Context, t: int) -> tuple[torch.Tensor, ...]:
        """The memory before token t: empty where a document starts, without a past for gradients where they are cut."""
        if self.value.truncate:
            cut = (context.positions[:, t] % self.value.truncate == 0)[:, None]
            now = tuple(torch.where(cut, memory.detach(), memory) for memory in now)
        if context.starts is None:
            return now
        return tuple(memory.masked_fill(context.starts[:, t, None], 0.0) for memory in now)

    # ---- the same, by torch's fused recurrence

    def _fused(self, x: torch.Tensor, context: Context, memory: list[torch.Tensor]):
        starts = context.starts
        if starts is None:
            lengths = None
            rows, now = x, tuple(memory)
        else:
            rows, now, lengths, places = _cut_into_runs(x, starts, tuple(memory))
        outputs = []
        size = self.value.truncate or rows.shape[1]
        for start in range(0, rows.shape[1], size):
            if start:
                now = tuple(memory.detach() for memory in now)
            piece = rows[:, start : start + size]
            h, now = self._recur(piece, now, None if lengths is None else lengths - start)
            outputs.append(h)
        h = torch.cat(outputs, dim=1)
        if starts is None:
            return h, now
        last = places[:, -1] // h.shape[1]  # the run of each row's last token
        return h.flatten(0, 1)[places], tuple(memory[last] for memory in now)

    def _recur(self, x: torch.Tensor, memory: tuple[torch.Tensor, ...], lengths: torch.Tensor | None):
        """(R, L, D) from the memory of each row → h (R, L, H) and the memory after the last of its `lengths` tokens."""
        parameters = (self.input.weight, self.memory.weight, self.input.bias, self.memory.bias)
        weights = tuple(one.to(x.dtype) for one in parameters if one is not None)
        if lengths is None:
            y, *now = self.value.fused(x, _as_torch(memory), weights, True, 1, 0.0, self.training, False, True)
            return y, tuple(one[0] for one in now)
        alive = lengths > 0
        packed = pack_padded_sequence(x[alive], lengths[alive].clamp(max=x.shape[1]).cpu(), True, enforce_sorted=False)
        order = packed.sorted_indices
        first = _as_torch(tuple(one[alive][order] for one in memory))
        y, *now = self.value.fused(packed.data, packed.batch_sizes, first, weights, True,
                                   1, 0.0, self.training, False)  # fmt: skip
        h = pad_packed_sequence(packed._replace(data=y), True, total_length=x.shape[1])[0]
        out = h.new_zeros(len(x), *h.shape[1:]).index_put((alive.nonzero()[:, 0],), h)
        back = packed.unsorted_indices
        ended = [old.index_put((alive.nonzero()[:, 0],), new[0][back]) for old, new in zip(memory, now, strict=True)]
        return out, tuple(ended)

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        empty = {name: torch.zeros(batch, self.hidden, dtype=torch.float32, device=device) for name in self.value.memories}
        return RecurrentState(**empty)

    def cost(self, name: str, context_length: int) -> Cost:
        size = self.value.gates * self.hidden
        steps = 2.0 * self.hidden * (7 if self.value.gates > 1 else 1)  # gates, memories and what is between, by torch's own
        recur = Cost("memory", size * self.hidden + size, 2.0 * size * self.hidden, steps, 0.0, f"{self.hidden} → {size}")
        gates = Cost("gates", 0, (8.0 if self.value.gates > 1 else 1.0) * self.hidden)
        kept = Cost("state", fixed_state_bytes=4.0 * self.hidden * len(self.value.memories))
        parts = [self.input.cost("input"), recur, gates, kept]
        if self.out is not None:
            parts.append(self.out.cost("out"))
        return Cost.sum(name, tuple(parts), f"{self.value.kind} of {self.hidden}")


class Memory(Linear):
    """U h + b′, with U orthogonal times `singular_value` at the start, gate by gate."""

    def __init__(self, value: Recurrent, hidden: int):
        super().__init__(hidden, value.gates * hidden, bias=True)
        self.value, self.hidden = value, hidden

    def rules(self) -> dict[str, ParameterRule]:
        def orthogonal(tensor: torch.Tensor, generator: torch.Generator) -> None:
            for block in tensor.split(self.hidden):
                nn.init.orthogonal_(block, self.value.singular_value, generator=generator)

        def open_forget_gate(tensor: torch.Tensor, generator: torch.Generator) -> None:
            tensor.zero_()
            if isinstance(self.value, LSTM):
                tensor[self.hidden : 2 * self.hidden] = 1.0

        return {"weight": ParameterRule(orthogonal, "matrix"), "bias": ParameterRule(open_forget_gate, "vector")}


def _as_torch(memory: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | torch.Tensor:
    """The memory of R rows as torch's recurrences take it: (1, R, H), in a tuple only where there are two."""
    stacked = tuple(one[None].contiguous() for one in memory)
    return stacked if len(stacked) > 1 else stacked[0]


def _cut_into_runs(x: torch.Tensor, starts: torch.Tensor, memory: tuple[torch.Tensor, ...]):
    """Rows (B, T, D) as runs (R, L, D) that each begin where memory starts anew, padded on the right.

    Returns the runs, the memory that each begins with, their lengths (R,), and (B, T) where in the flattened runs each
    token went.
    """
    batch, time = starts.shape
    begins = starts.clone()
    begins[:, 0] = True
    run = begins.flatten().cumsum(0) - 1  # (B·T,)
    first = begins.flatten().nonzero()[:, 0]  # (R,)
    offset = torch.arange(batch * time, device=x.device) - first[run]
    lengths = torch.bincount(run)
    longest = int(lengths.max())
    places = run * longest + offset
    rows = x.new_zeros(len(first) * longest, x.shape[-1]).index_put((places,), x.flatten(0, 1))
    keeps = (~starts.flatten()[first])[:, None].to(x.dtype)  # a run that goes on where the state ended
    carried = tuple(one[first // time] * keeps for one in memory)
    return rows.view(len(first), longest, -1), carried, lengths, places.view(batch, time)
