"""A scheduled batch → hidden states, by the module that was trained.

`RaggedRunner` takes stacks of blocks, with an encoder, towers or heads beside them, and computes all sequences of a step in one
row. `PlainRunner` runs any model of the house, one sequence at a time, each with an ordinary `State` of its own. What it gives
up is sharing: sequences do not compute together and no prefix is kept. Pages are only counted, so that admission and
preemption bound its memory too.
"""

import copy
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from headspring.artifacts import UserError
from headspring.inference.adapters import Adapting
from headspring.inference.engine.beside import Beside, Snapshot
from headspring.inference.engine.cache import GONE, PAGE, Copy, Group
from headspring.inference.engine.config import EngineConfig, default_memory
from headspring.inference.engine.graphs import CudaBackend, Graphs
from headspring.inference.engine.sequence import Sequence, Work
from headspring.inference.inspection import watching
from headspring.models.around import AroundModule
from headspring.models.early_exit import stack_of
from headspring.models.encoder_decoder import EncoderDecoderModule
from headspring.models.model import ModelModule
from headspring.models.paged import BatchState
from headspring.models.ragged import Ragged
from headspring.models.soft_tokens import PlacedVectors
from headspring.models.stack import StackModule
from headspring.models.state import Memory, MemoryState, ReadingStates, State

SPARE = 8  # pages by which a table grows at once
SNAPSHOT_SHARE = 8  # one part in so many of the memory is for snapshots, where layers have states without pages


class Runner(Protocol):
    """What the engine asks of one: `groups` of layers with their pages; `shares`: whether known prefixes can be read, and for
    that `snapshot_bytes`, the room for snapshots of what is remembered beside pages; None where that is nothing."""

    groups: list[Group]
    shares: bool
    snapshot_bytes: int | None

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

    def snapshot(self, sequence: Sequence) -> Snapshot:
        """What is remembered beside pages after the tokens computed so far, for others to begin with."""
        ...


class PlainRunner:
    """Any model, one sequence at a time."""

    shares = False
    snapshot_bytes: int | None = None

    def __init__(self, model: ModelModule, config: EngineConfig):
        if config.cache_dtype != "auto":
            raise UserError(f"cache_dtype={config.cache_dtype!r} needs a model whose attention reads pages; leave it out")
        config.captures(model.device, side_by_side=False)
        self.model, self.adapting = model, Adapting(model)
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
        with watching(self.model, alone, [sequence.probe]), self.adapting.step(alone, [sequence.job.adapter]):
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

    def snapshot(self, sequence: Sequence) -> Snapshot:
        raise NotImplementedError("it shares nothing")


class RaggedRunner:
    """A causal stack: all sequences of a step side by side in one row (`models.ragged`). A layer without pages has a state for
    each sequence (`beside`). What towers saw stands in the row; what an encoder read is made when a sequence begins."""

    shares = True

    def __init__(self, model: ModelModule, config: EngineConfig):
        self.model, self.stack, self.adapting = model, writing_stack(model), Adapting(model)
        _compute_alike(model)
        stored = torch.int8 if config.cache_dtype == "int8" else None
        mixers = [block.mixes for block in self.stack.blocks()]
        kind = self.stack.compute_dtype, model.device, stored
        samples = [mixer.new_pages(1, *kind) for mixer in mixers]
        self.crosses = [layer for layer, block in enumerate(self.stack.blocks()) if block.cross is not None]
        self.remembers = None in samples or bool(self.crosses)
        folds = None in samples and config.prefix_sharing
        self.snapshot_bytes = memory_of(config, model) // SNAPSHOT_SHARE if folds else None
        sizes: dict[int | None, int] = {}
        for pages in samples:
            if pages is not None:
                sizes[pages.group] = sizes.get(pages.group, 0) + pages.bytes_per_page
        if stored is not None and not sizes:
            raise UserError("cache_dtype='int8': no layer of this model keeps keys and values in pages; leave it out")
        self.groups = groups_in(config, model, sizes or {None: 0}, self.snapshot_bytes or 0)
        counts = {group.window: group.num_pages for group in self.groups}
        captures = config.captures(model.device, side_by_side=not self.remembers)
        self.layers = [  # a graph has one page more, which nobody owns
            None if sample is None else mixer.new_pages(counts[sample.group] + captures, *kind)
            for mixer, sample in zip(mixers, samples)
        ]
        self.tables = {group.window: Tables() for group in self.groups}
        context = min(model.config.context, config.context or model.config.context)
        self.graphs = Graphs(self.stack, self.layers, counts, context, CudaBackend()) if captures else None  # type: ignore[arg-type]

    def copy(self, copies: Rows[Copy]) -> None:
        for one in copies:
            for pages in self.layers:
                if pages is not None and pages.group == self.groups[one.group].window:
                    pages.copy(one.source, one.target)

    def run(self, work: Rows[Work]) -> Tensor:
        sequences, device = [one.sequence for one in work], self.model.device
        _compute_alike(self.model)
        if self.graphs is not None and self.graphs.takes(work):
            hidden = self.graphs.run(work, self._tables(sequences, torch.device("cpu")))
            if hidden is not None:
                return hidden
        tables = self._tables(sequences, device)
        counts = [one.count for one in work]
        layers, memories = self._memory(sequences)
        ragged = Ragged([sequence.computed for sequence in sequences], counts, tables, device, memories)
        tokens = torch.tensor([[token for one in work for token in one.tokens]], device=device)
        probes, adapters = [sequence.probe for sequence in sequences], [sequence.job.adapter for sequence in sequences]
        with watching(self.model, ragged, probes), self.adapting.step(ragged, adapters):
            hidden = self.stack(tokens, state=BatchState(ragged, layers, seen_by_towers(work, ragged)))[0]
        if all(one.rows == one.count for one in work):
            return hidden
        return torch.cat([hidden[span.stop - one.rows : span.stop] for one, span in zip(work, ragged.spans)])

    def _tables(self, sequences: Rows[Sequence], device: torch.device) -> dict[int | None, Tensor]:
        numbered = enumerate(self.groups)
        return {
            group.window: self.tables[group.window].of([one.tables[n] for one in sequences], device) for n, group in numbered
        }

    def _memory(self, sequences: Rows[Sequence]) -> tuple[Rows[Any], Rows[Memory]]:
        """What each layer remembers of these sequences, and what an encoder read for each."""
        if not self.remembers:
            return self.layers, ()
        beside = [self._beside(sequence) for sequence in sequences]
        layers: list[Any] = [
            [one.layers[layer] for one in beside] if pages is None else pages for layer, pages in enumerate(self.layers)
        ]
        for layer in self.crosses:
            layers[layer] = ReadingStates(layers[layer], [one.read[layer] for one in beside])
        return layers, [one.memory for one in beside if one.memory is not None]

    def _beside(self, sequence: Sequence) -> Beside:
        """What a sequence remembers beside pages; made where it begins, from a snapshot if it begins with a known prefix."""
        if sequence.state is None:
            capacity = len(sequence.request.prompt) + sequence.request.new_tokens
            snapshot, sequence.snapshot = sequence.snapshot, None
            sequence.state = self._new_states(capacity) if snapshot is None else Beside.resumed(snapshot, capacity)
            if isinstance(self.model, EncoderDecoderModule):
                sequence.state.memory = self._read_source(self.model, sequence)
                sequence.state.read = {layer: MemoryState() for layer in self.crosses}
        return sequence.state

    def _read_source(self, model: EncoderDecoderModule, sequence: Sequence) -> Memory:
        source = torch.tensor([list(sequence.job.source)], device=model.device)
        with self.adapting.step(Ragged([0], [source.shape[1]]), [sequence.job.adapter]):
            return model.encode(source)

    def _new_states(self, capacity: int) -> Beside:
        """Empty states of the layers without pages."""
        kind = self.stack.compute_dtype, self.model.device
        alone = ((layer, block) for layer, block in enumerate(self.stack.blocks()) if self.layers[layer] is None)
        return Beside({layer: block.mixes.new_state(1, capacity, *kind) for layer, block in alone})

    def fork(self, parent: Sequence, child: Sequence) -> None:
        child.state = None if parent.state is None else parent.state.fork()

    def boundary(self, sequence: Sequence, length: int) -> int:
        length = sequence.state.rewind(length)
        if length == 0:
            sequence.state = None
        return length

    def snapshot(self, sequence: Sequence) -> Snapshot:
        return sequence.state.snapshot(sequence.computed)


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


def seen_by_towers(work: Rows[Work], ragged: Ragged) -> PlacedVectors | None:
    """The vectors that stand in the row of a step in the place of placeholders; None without any. What a model writes itself is
    text: placeholders count in prompts only."""
    places, vectors = [], []
    for one, span in zip(work, ragged.spans, strict=True):
        job, start = one.sequence.job, one.sequence.computed
        if job.soft is None or start >= len(job.prompt):
            continue
        here = [(place, column) for place, column in enumerate(job.columns[start : start + one.count]) if column >= 0]
        places += [span.start + place for place, _ in here]
        vectors.append(job.soft.hidden[0, [column for _, column in here]])
    return PlacedVectors(torch.tensor(places, device=ragged.device), torch.cat(vectors)) if places else None


def memory_of(config: EngineConfig, model: ModelModule) -> int:
    """Bytes for pages and snapshots."""
    return config.memory or default_memory(model.device)


def groups_in(config: EngineConfig, model: ModelModule, sizes: Mapping[int | None, int], beside: int = 0) -> list[Group]:
    """Pages for each group of layers, whose page has `sizes` bytes: so many that as many whole sequences as possible fit into
    the memory, less what is kept `beside` them, and no more than can be used at once. Raises `UserError` where not even one
    page of each fits."""
    context = min(model.config.context, config.context or model.config.context)
    most = {window: Group(window, 0).most_pages(context, config.chunk) for window in sizes}
    bytes_each = sum(size * most[window] * (1 if window is None else 2) for window, size in sizes.items())
    memory = memory_of(config, model) - beside
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
    if isinstance(model, AroundModule | EncoderDecoderModule):
        model.compute_alike()


def writing_stack(model: ModelModule) -> StackModule:
    """The stack that writes: that of a decoder, or the one with towers, heads or an encoder beside it. Raises `ValueError`
    where there is none."""
    return model.decoder if isinstance(model, EncoderDecoderModule) else stack_of(model)


def runner_for(model: ModelModule, config: EngineConfig) -> Runner:
    """The fastest runner that a model has: tables of n-grams, and stacks that read longer texts in another way, run whole."""
    with suppress(ValueError):
        if writing_stack(model).side_by_side:
            return RaggedRunner(model, config)
    return PlainRunner(model, config)
