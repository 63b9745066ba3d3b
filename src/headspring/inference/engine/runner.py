"""A scheduled batch → hidden states, by the module that was trained.

`PlainRunner` runs any model of the house, one sequence at a time, each with an ordinary `State` of its own. What it gives up is
sharing: sequences do not compute together and no prefix is kept. Pages are only counted, so that admission and preemption bound
its memory too.
"""

import copy
import math
from collections.abc import Sequence as Rows
from typing import Protocol

import torch
from torch import Tensor

from headspring.artifacts import UserError
from headspring.inference.engine.cache import PAGE, Copy, Group
from headspring.inference.engine.config import EngineConfig, default_memory
from headspring.inference.engine.sequence import Sequence, Work
from headspring.inference.inspection import watching
from headspring.models.model import ModelModule
from headspring.models.ragged import Ragged
from headspring.models.state import State


class Runner(Protocol):
    """What the engine asks of one: `groups` of layers with their pages, and `shares` where known prefixes can be read from them."""

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
        self.groups = [Group(None, self._num_pages(config))]

    def _num_pages(self, config: EngineConfig) -> int:
        """As many as memory holds, and no more than can ever be used at once."""
        one, two = (self.model.new_state(1, length).bytes for length in (PAGE, 2 * PAGE))
        most = config.max_sequences * math.ceil(self.model.config.context / PAGE)
        memory = config.memory or default_memory(self.model.device)
        return most if two <= one else min(most, memory // (two - one))

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


def runner_for(model: ModelModule, config: EngineConfig) -> Runner:
    """The runner that fits a model."""
    return PlainRunner(model, config)
