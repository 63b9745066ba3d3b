"""Sequences of different lengths side by side in one row, without padding: how an engine's step reads them.

    row (1, N)   │ a7 │ b0 b1 b2 b3 │ c31 c32 │       three sequences: one goes on, one begins, one is read in chunks
    past           7    0             31              tokens of each that memory holds already
    counts         1    4             2

What works on each token alone reads the row as it is. Attention keeps keys and values in pages (`paged`) and tells the
sequences apart by `spans` and `tables`. Every other mixer is given each sequence by itself (`each`), with a state of its
own, as if it were alone: slower than one call for all, and right for any mixer that there is or will be.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from headspring.models.context import Context
from headspring.models.mixer import MixerModule
from headspring.models.state import LayerState, Memory

PAGE = 32  # tokens; the products of attention go over keys in blocks of as many


@dataclass
class Ragged:
    """`counts[i]` tokens of sequence i stand in the row, and follow `past[i]` ones that its memory holds.

    `tables` gives, for each group of layers that forget alike (None: nothing; a number: what lies behind such a window), the
    pages of every sequence in order, (S, pages) int32. `memories` are what an encoder read for each, where there is one.
    `current` is the sequence that `each` is at, None in between. `longest` is a bound on all lengths, for whoever may not know
    them (a graph that is captured once, `inference.engine.graphs`).
    """

    past: Sequence[int]
    counts: Sequence[int]
    tables: Mapping[int | None, torch.Tensor] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    memories: Sequence[Memory] = ()
    current: int | None = None
    longest: int | None = None

    @cached_property
    def spans(self) -> list[slice]:
        """Where each sequence stands in the row."""
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, self.counts)]

    @cached_property
    def offsets(self) -> torch.Tensor:
        """(S + 1,) int64: sequence i stands at offsets[i] … offsets[i + 1]."""
        return torch.tensor([0, *(span.stop for span in self.spans)], device=self.device)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """(S,) int64: `past` as a tensor."""
        return torch.tensor(self.past, dtype=torch.int64, device=self.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """(1, N) int64."""
        if all(count == 1 for count in self.counts):
            return self.lengths[None]
        runs = [torch.arange(past, past + count) for past, count in zip(self.past, self.counts)]
        return torch.cat(runs)[None].to(self.device)

    @cached_property
    def owners(self) -> torch.Tensor:
        """(N,) int64: the sequence of each token."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts)).to(self.device)

    def reach(self, rows: slice = slice(None)) -> int:
        """Tokens of the longest of some sequences, those of the step included; `longest` where that is given."""
        if self.longest is not None:
            return self.longest
        return max(past + count for past, count in zip(self.past[rows], self.counts[rows]))

    def tiles(self, size: int) -> torch.Tensor:
        """(M, 2) int32: the row cut into tiles of up to `size` tokens of one sequence each: its number, and the first token."""
        if size not in self._tiles:
            if all(count == 1 for count in self.counts):
                own = torch.arange(len(self.counts), dtype=torch.int32, device=self.device)
                self._tiles[size] = torch.stack([own, torch.zeros_like(own)], dim=1)
            else:
                cut = [(number, at) for number, count in enumerate(self.counts) for at in range(0, count, size)]
                self._tiles[size] = torch.tensor(cut, dtype=torch.int32).to(self.device)
        return self._tiles[size]

    @cached_property
    def _tiles(self) -> dict[int, torch.Tensor]:
        return {}

    def slots(self, group: int | None) -> torch.Tensor:
        """(N,) int64: where each token's key goes, page · PAGE + place in the page."""
        if group not in self._slots:
            positions = self.positions[0]
            pages = self.tables[group][self.owners, positions // PAGE].long()
            self._slots[group] = pages * PAGE + positions % PAGE
        return self._slots[group]

    @cached_property
    def _slots(self) -> dict[int | None, torch.Tensor]:
        return {}

    @cached_property
    def contexts(self) -> list[Context]:
        """Each sequence's own context, as if it were alone."""
        read: Sequence[torch.Tensor | None] = [memory.hidden for memory in self.memories] or [None] * len(self.counts)
        device = self.positions.device
        return [Context.of(count, past, None, None, device, one) for past, count, one in zip(self.past, self.counts, read)]

    def alone(self) -> Iterator[tuple[int, slice, Context]]:
        """The sequences one after the other: number, place in the row, context. `current` follows."""
        for number, (span, context) in enumerate(zip(self.spans, self.contexts)):
            self.current = number
            yield number, span, context
        self.current = None

    def context(self) -> Context:
        """That of the whole row."""
        return Context(sum(self.counts), 0, self.positions, ragged=self)


def each(mixer: MixerModule, x: torch.Tensor, ragged: Ragged, states: Sequence[LayerState]) -> torch.Tensor:
    """A mixer over every sequence of the row x (1, N, D) by itself, each with its own state."""
    parts = []
    for number, span, context in ragged.alone():
        mixer.prepare(context)
        parts.append(mixer(x[:, span], context, states[number]))
    return torch.cat(parts, dim=1)
