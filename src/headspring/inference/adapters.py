"""LoRA adapters in the engine: a step computes rows of several adapters, and of none, together.

    engine = Engine(model, tokenizer, adapters={"poet": load_adapter("adapters/poet", model)})
    engine.submit(prompt, params, adapter="poet")

For a step in which some sequence has an adapter, each matrix that is adapted gets what it adds (`lora.Stacked`: the factors of
all adapters side by side, and for each row a mask of what is not its own); for other steps nothing is installed, and the fused
blocks run as if there were no adapters. So the rows of the base keep their bits, beside whomever they run, and so do those of
each adapter.

Keys and values depend on the adapter: its key is part of where the chain of prefix hashes begins (`Job.scope`), and pages
are never shared between adapters, or between one and the base.

Why not merged weights, an engine for each: requests for different adapters would then not run together, and every adapter
would cost the memory of all that it touches and a cache of its own. What it gives up: a step with an adapter runs its blocks
operator by operator, and each row meets the columns of all adapters that are held.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import chain

import torch

from headspring.artifacts import UserError
from headspring.models.kernels.packing import pack_for_serving, unpack_model
from headspring.models.lora import Adapter, Rows, Stacked, adaptable, adding, merge, width
from headspring.models.model import ModelModule
from headspring.models.part import Linear
from headspring.models.ragged import Ragged

MOST_COLUMNS = 256  # of all adapters in one matrix, before those that are not in use are put away


class Adapting:
    """Installs the adapters of each step in `model`. Adapters that come again are held ready."""

    def __init__(self, model: ModelModule):
        self.model = model
        self.held: tuple[Adapter, ...] = ()
        self.stacks: dict[Linear, Stacked] = {}

    @contextmanager
    def step(self, ragged: Ragged, adapters: Sequence[Adapter | None]) -> Iterator[None]:
        """A context for a forward pass over the sequences of `ragged`, each with its adapter."""
        used = list(dict.fromkeys(adapter for adapter in adapters if adapter is not None))
        if not used:
            yield
            return
        self._hold(used)
        numbers = [-1 if adapter is None else self.held.index(adapter) for adapter in adapters]
        rows = _RowsOf(ragged, numbers, self.model.device) if len(self.held) > 1 or -1 in numbers else None
        for stack in self.stacks.values():
            stack.rows = rows
        with adding(self.stacks):
            yield

    def _hold(self, used: Sequence[Adapter]) -> None:
        """Have these ready, and beside them those of before, while they are not too many."""
        if all(adapter in self.held for adapter in used):
            return
        both = tuple(dict.fromkeys([*self.held, *used]))
        self.held = both if sum(map(_columns, both)) <= MOST_COLUMNS else tuple(used)
        self.stacks = stacks(self.model, self.held)


class _RowsOf(Rows):
    """Those of a step, whose mixers may be given one sequence at a time."""

    def __init__(self, ragged: Ragged, numbers: Sequence[int], device: torch.device):
        counts = torch.tensor(list(ragged.counts))
        super().__init__(torch.tensor(list(numbers)).repeat_interleave(counts).to(device))
        self.ragged, self.alone = ragged, [Rows(torch.tensor([number], device=device)) for number in numbers]

    def others(self, stacked: Stacked) -> torch.Tensor:
        if len(self.alone) == 1:
            return self.alone[0].others(stacked)  # of however many rows: it may have read some again
        current = self.ragged.current
        return super().others(stacked) if current is None else self.alone[current].others(stacked)


def stacks(model: ModelModule, adapters: Sequence[Adapter]) -> dict[Linear, Stacked]:
    """For each matrix that is adapted, the factors of all its adapters, by their place in the list."""
    linears = adaptable(model)
    names = dict.fromkeys(chain.from_iterable(adapter.parts for adapter in adapters))
    return {
        linears[name]: Stacked(
            [(number, adapter.parts[name]) for number, adapter in enumerate(adapters) if name in adapter.parts],
            linears[name],
            model.compute_dtype,
        )
        for name in names
    }


def _columns(adapter: Adapter) -> int:
    """The most that it takes in one matrix."""
    return max((width(part.rank) for part in adapter.parts.values()), default=0)


def adapted(model: ModelModule, adapter: Adapter) -> ModelModule:
    """Another module that computes with `adapter` from now on, and shares all weights, packed or not, with `model`."""
    adapter.check(model)
    pack_for_serving(model)
    other = _copy(model, frozenset())
    for part, stack in stacks(other, [adapter]).items():
        part.addition = stack
    return other


def merged(model: ModelModule, adapter: Adapter) -> ModelModule:
    """Another module with W + scale · B A in the place of each W that `adapter` is for; all others it shares with `model`."""
    adapter.check(model)
    linears = adaptable(model)
    other = _copy(model, {id(linears[name].weight) for name in adapter.parts})
    if not model.released:
        unpack_model(other)
    merge(other, adapter)
    return other


def _copy(model: ModelModule, own: Set[int]) -> ModelModule:
    """Another module with the same weights in memory, but for those (by `id`) that shall be its own."""
    held = [vars(module).get(name) for module in model.modules() for name in ("packed", "joined", "packed_head")]
    shared = [*model.parameters(), *model.buffers(), *held]
    return copy.deepcopy(model, {id(one): one for one in shared if one is not None and id(one) not in own})


def check_adapters(model: ModelModule, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Raise `UserError` for one that does not belong to `model`, or where an engine cannot tell what it is to be added to."""
    for adapter in adapters.values():
        adapter.check(model)
    if adapters and model.config.reads_source:
        raise UserError("an encoder–decoder is served without adapters; merge one with LanguageModel.merged and serve that")
    return dict(adapters)
