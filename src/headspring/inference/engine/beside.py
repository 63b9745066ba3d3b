"""What a sequence remembers beside its pages.

    layers    a state for each layer that has no pages: folded ones (LSTM, Mamba, linear attention), latent ones
    memory    what the encoder read for it, and in `read` the keys and values that each layer made of that

`layers` change with every step and are copied when a sequence forks. What was read is never written to again, so that forks
share it; a sequence that is preempted gives it back, and reads its source anew.

A *snapshot* is a copy of `layers` at the end of a full page. A prefix that ends there can be shared, as pages alone cannot: a
folded state is had where it was kept, and nowhere in between. It is never written to; who begins with it takes a copy.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from headspring.models.state import LayerState, Memory, MemoryState


@dataclass(frozen=True)
class Snapshot:
    """The states of the layers without pages after `length` tokens, which nobody writes to."""

    length: int
    layers: Mapping[int, LayerState]

    @property
    def bytes(self) -> int:
        return sum(state.bytes for state in self.layers.values())


@dataclass
class Beside:
    """See the head of this file; all by the layer's index."""

    layers: dict[int, LayerState]
    memory: Memory | None = None
    read: dict[int, MemoryState] = field(default_factory=dict)

    @staticmethod
    def resumed(snapshot: Snapshot, capacity: int) -> "Beside":
        """One that goes on from a snapshot, with room for `capacity` tokens."""
        return Beside({layer: state.copy(capacity) for layer, state in snapshot.layers.items()})

    def snapshot(self, length: int) -> Snapshot:
        """What it remembers now, after `length` tokens."""
        return Snapshot(length, {layer: state.copy(length) for layer, state in self.layers.items()})

    def fork(self) -> "Beside":
        return Beside(copy.deepcopy(self.layers), self.memory, self.read)

    def rewind(self, length: int) -> int:
        """Forget what came after `length` tokens, or a little more where a state cannot go back to just there. How many are
        left; where that is 0, it is to be thrown away."""
        states = list(self.layers.values())
        while length and any(state.last_boundary(length) != length for state in states):
            length = min(state.last_boundary(length) for state in states)
        for state in states if length else ():
            state.rewind_to(min(length, state.length))
        return length
