"""A scheduled batch → hidden states, by the module that was trained.

`PlainRunner` runs any model of the house, one sequence at a time, each with an ordinary `State` of its own. What it gives up is
sharing: sequences do not compute together and no prefix is kept. Pages are only counted, so that admission and preemption bound
its memory too.
"""

import copy
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headspring.artifacts import UserError
from headspring.inference.engine.cache import GONE, PAGE, Copy, Group
from headspring.inference.engine.config import EngineConfig, default_memory
from headspring.inference.engine.sequence import Sequence, Work
from headspring.inference.inspection import watching
from headspring.models.around import AroundModule
from headspring.models.early_exit import stack_of
from headspring.models.heads import HeadedModule
from headspring.models.model import ModelModule
from headspring.models.paged import BatchState, Pages
from headspring.models.ragged import Ragged
from headspring.models.stack import StackModule
from headspring.models.state import LayerState, State

SPARE = 8  # pages by which a table grows at once


class Runner(Protocol):
    """What the engine asks of one: `groups` of layers with their pages, and `shares`: whether known prefixes can be read."""

    groups: list[Group]
    shares: bool

    def copy(self, copies: Rows[Copy]) -> None:
        """Make copies of pages, in this order."""
        ...

    def run(self, work: Rows[Work]) -> Tensor:
        """Compute the tokens of each work; the wanted hidden states (R, D), in order. Advances no counter."""
        ...

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give the child what is remembered beside pages."""
        ...

    def boundary(self, sequence: Sequence, length: int) -> int:
        """Forget what is remembered after `length` tokens; how many are left, fewer where it cannot go back to just there."""
        ...


class PlainRunner:
    """Any model, one sequence at a time."""

    shares = False

    def __init__(self, model: ModelModule, config: EngineConfig):
        if config.cache_dtype != "auto":
            raise UserError(f"cache_dtype={config.cache_dtype!r} needs a model whose attention reads pages; leave it out")
        self.model = model
        one, two = (model.new_state(1, length).bytes for length in (PAGE, 2 * PAGE))
        self.groups = groups_in(config, model, {None: two - one})

    def copy(self, copies: Rows[Copy]) -> None:
        """Nothing: a state is copied whole when its sequence forks."""

    def run(self, work: Rows[Work]) -> Tensor:
        return torch.cat([self._run(one)[max(0, one.count - one.rows) :] for one in work])

    def _run(self, work: Work) -> Tensor:
        """Hidden states (count, D)."""
        sequence, given = work.sequence, {}
        if sequence.state is None:
            sequence.state = self.model.new_state(1, len(sequence.request.prompt) + sequence.request.new_tokens)
            sequence.state.memory = sequence.job.soft
            if len(sequence.job.source):
                given["source"] = torch.tensor([list(sequence.job.source)], device=self.model.device)
        tokens = torch.tensor([work.tokens], device=self.model.device)
        alone = Ragged([sequence.computed], [work.count])
        with watching(self.model, alone, [sequence.probe]):
            return self.model(tokens, state=sequence.state, **given)[0]

    def fork(self, parent: Sequence, child: Sequence) -> None:
        child.state = copy.deepcopy(parent.state)

    def boundary(self, sequence: Sequence, length: int) -> int:
        if length == 0:
            sequence.state = None
            return 0
        state = sequence.state
        assert isinstance(state, State)
        state.rewind(state.length - length)
        return length


class RaggedRunner:
    """A causal stack: all sequences of a step side by side in one row (`models.ragged`). A layer without pages has a state for
    each sequence; prefixes are then not shared, because such a state cannot be had as it was somewhere in between."""

    def __init__(self, model: ModelModule, config: EngineConfig):
        self.model, self.stack = model, stack_of(model)
        _compute_alike(model)
        stored = torch.int8 if config.cache_dtype == "int8" else None
        mixers = [block.mixes for block in self.stack.blocks()]
        kind = self.stack.compute_dtype, model.device, stored
        samples = [mixer.new_pages(1, *kind) for mixer in mixers]
        self.shares = None not in samples
        sizes: dict[int | None, int] = {}
        for pages in samples:
            if pages is not None:
                sizes[pages.group] = sizes.get(pages.group, 0) + pages.bytes_per_page
        if stored is not None and not sizes:
            raise UserError("cache_dtype='int8': no layer of this model keeps keys and values in pages; leave it out")
        self.groups = groups_in(config, model, sizes or {None: 0})
        counts = {group.window: group.num_pages for group in self.groups}
        self.layers = [
            None if sample is None else mixer.new_pages(counts[sample.group], *kind) for mixer, sample in zip(mixers, samples)
        ]
        self.tables = {group.window: Tables() for group in self.groups}

    def copy(self, copies: Rows[Copy]) -> None:
        for one in copies:
            for pages in self.layers:
                if pages is not None and pages.group == self.groups[one.group].window:
                    pages.copy(one.source, one.target)

    def run(self, work: Rows[Work]) -> Tensor:
        sequences, device = [one.sequence for one in work], self.model.device
        tables = {
            group.window: self.tables[group.window].of([sequence.tables[number] for sequence in sequences], device)
            for number, group in enumerate(self.groups)
        }
        counts = [one.count for one in work]
        ragged = Ragged([sequence.computed for sequence in sequences], counts, tables, device)
        tokens = torch.tensor([[token for one in work for token in one.tokens]], device=device)
        _compute_alike(self.model)
        with watching(self.model, ragged, [sequence.probe for sequence in sequences]):
            hidden = self.stack(tokens, state=BatchState(ragged, self._memory(sequences)))[0]
        if all(one.rows == one.count for one in work):
            return hidden
        return torch.cat([hidden[span.stop - one.rows : span.stop] for one, span in zip(work, ragged.spans)])

    def _memory(self, sequences: Rows[Sequence]) -> Rows[Pages | list[LayerState]]:
        """What each layer remembers of these sequences."""
        if self.shares:
            return self.layers  # type: ignore[return-value]
        for sequence in sequences:
            if sequence.state is None:
                sequence.state = self._new_states(len(sequence.request.prompt) + sequence.request.new_tokens)
        return [
            [sequence.state[layer] for sequence in sequences] if pages is None else pages
            for layer, pages in enumerate(self.layers)
        ]

    def _new_states(self, capacity: int) -> dict[int, LayerState]:
        """Empty states of the layers without pages."""
        kind = self.stack.compute_dtype, self.model.device
        blocks = enumerate(self.stack.blocks())
        return {layer: block.new_state(1, capacity, *kind) for layer, block in blocks if self.layers[layer] is None}

    def fork(self, parent: Sequence, child: Sequence) -> None:
        child.state = copy.deepcopy(parent.state)

    def boundary(self, sequence: Sequence, length: int) -> int:
        states = list(sequence.state.values())
        while length and any(state.last_boundary(length) != length for state in states):
            length = min(state.last_boundary(length) for state in states)
        if length == 0:
            sequence.state = None
        for state in states if length else ():
            state.rewind_to(min(length, state.length))
        return length


class Tables:
    """The page tables of a step as a tensor. Most of it is that of the step before: a row is written again where it changed."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.numbers = np.zeros((0, 0), np.int32)

    def of(self, tables: Rows[list[int]], device: torch.device) -> Tensor:
        """(S, pages) int32. Where a window has passed a page, one that the sequence still has stands in: nobody looks there."""
        width = max(map(len, tables))
        if len(tables) != len(self.numbers) or width > self.numbers.shape[1]:
            self.numbers, self.rows = np.zeros((len(tables), width + SPARE), np.int32), [[]] * len(tables)
        for row, table in enumerate(tables):
            if table != self.rows[row]:
                self.rows[row] = list(table)
                here = np.array(table, np.int32)
                self.numbers[row, : len(table)] = np.where(here == GONE, here.max(), here)
        return torch.from_numpy(self.numbers).to(device)


def groups_in(config: EngineConfig, model: ModelModule, sizes: Mapping[int | None, int]) -> list[Group]:
    """Pages for each group of layers, whose page has `sizes` bytes: so many that as many whole sequences as possible fit into
    the memory, and no more than can be used at once. Raises `UserError` where not even one page of each fits."""
    context = min(model.config.context, config.context or model.config.context)
    most = {window: Group(window, 0).most_pages(context, config.chunk) for window in sizes}
    bytes_each = sum(size * most[window] * (1 if window is None else 2) for window, size in sizes.items())
    memory = config.memory or default_memory(model.device)
    share = config.max_sequences if bytes_each == 0 else min(config.max_sequences, memory / bytes_each)
    if config.memory is None:
        share = max(share, 1)  # nobody set a limit: whatever the model is made for can be asked
    # Of what a window has passed, as much again stays for prompts that begin alike.
    groups = [Group(window, int(share * most[window] * (1 if window is None else 2))) for window in sizes]
    if any(group.num_pages == 0 for group in groups):
        raise UserError(f"{memory} bytes are less than one page of {sum(sizes.values())} bytes for {PAGE} tokens; raise memory")
    return groups


def _compute_alike(model: ModelModule) -> None:
    """What is set for a model holds for the one inside."""
    if isinstance(model, AroundModule):
        model.compute_alike()


def runner_for(model: ModelModule, config: EngineConfig) -> Runner:
    """The fastest runner that a model has: towers, encoders and tables of n-grams run whole."""
    inner = model.body if isinstance(model, HeadedModule) else model
    if isinstance(inner, StackModule) and inner.side_by_side:
        return RaggedRunner(model, config)
    return PlainRunner(model, config)
