"""What a model remembers between calls, behind one interface: append, select, fork, rewind, bytes.

A layer's state is either *indexed* by token (keys and values: forgetting a token is shortening a buffer) or *folded* (a
recurrent mixer's: each call replaces it, and what was before can only be gone back to where a copy was kept).
`State.rewind` hides the difference: it returns every layer to the last kept copy and reads the tokens in between again
with the next call.

Dense buffers come first; pages will replace the buffer, and the callers do not change.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SNAPSHOTS = 4  # calls back that a folded state can return to


class LayerState(Protocol):
    """The memory of one layer, for all rows."""

    @property
    def length(self) -> int:
        """Tokens read by each row, padding included."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rows (int64), in the given order. A row may appear more than once."""
        ...

    def last_boundary(self, length: int) -> int:
        """The longest prefix of at most `length` tokens that `rewind_to` can return to."""
        ...

    def rewind_to(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        ...

    def copy(self, capacity: int) -> "LayerState":
        """The same memory as a state of its own, with room for `capacity` tokens; it goes back no further than this."""
        ...

    @property
    def bytes(self) -> int:
        """Memory held, in bytes, copies not counted."""
        ...


class KeyValueState:
    """Keys and values of one attention layer for up to `capacity` tokens a row, (B, K, capacity, C) each."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        value_channels: int | None = None,
    ):
        self.keys = torch.zeros(batch, kv_heads, capacity, channels, dtype=dtype, device=device)
        self.values = torch.zeros(batch, kv_heads, capacity, value_channels or channels, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, K, T, C) keys and values; return all that are stored, (B, K, S, C)."""
        end = self.length + k.shape[2]
        assert end <= self.keys.shape[2], f"cache of {self.keys.shape[2]} tokens cannot hold {end}"
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self._pick(self.keys, rows), self._pick(self.values, rows)

    def _pick(self, buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A buffer of the same capacity for `rows`; only what is stored is copied."""
        picked = buffer.new_empty(len(rows), *buffer.shape[1:])
        picked[:, :, : self.length] = buffer[rows, :, : self.length]
        return picked

    def last_boundary(self, length: int) -> int:
        return length

    def rewind_to(self, length: int) -> None:
        self.length = length

    def copy(self, capacity: int) -> "KeyValueState":
        other = copy.copy(self)
        other.keys, other.values = (self._resized(buffer, capacity) for buffer in (self.keys, self.values))
        return other

    def _resized(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        resized = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
        resized[:, :, : self.length] = buffer[:, :, : self.length]
        return resized

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in (self.keys, self.values))


class RecurrentState:
    """Named tensors of fixed size, (B, …) each, that every call replaces; the last few are kept to go back to."""

    def __init__(self, **tensors: torch.Tensor):
        self.tensors = tensors
        self.length = 0
        self._kept: list[tuple[int, dict[str, torch.Tensor]]] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def replace(self, tokens: int, **tensors: torch.Tensor) -> None:
        """The memory after `tokens` more tokens. Tensors are replaced, never written into."""
        assert tensors.keys() == self.tensors.keys()
        self._kept = [*self._kept, (self.length, self.tensors)][-SNAPSHOTS:]
        self.tensors = {name: value.to(self.tensors[name].dtype) for name, value in tensors.items()}
        self.length += tokens

    def select(self, rows: torch.Tensor) -> None:
        self.tensors = {name: value[rows] for name, value in self.tensors.items()}
        self._kept = [(length, {name: value[rows] for name, value in kept.items()}) for length, kept in self._kept]

    def last_boundary(self, length: int) -> int:
        kept = [at for at, _ in [*self._kept, (self.length, self.tensors)] if at <= length]
        assert kept, f"cannot go back to {length} tokens: only the last {SNAPSHOTS} calls are kept"
        return max(kept)

    def rewind_to(self, length: int) -> None:
        while self.length > length:
            self.length, self.tensors = self._kept.pop()
        assert self.length == length

    def copy(self, capacity: int) -> "RecurrentState":
        other = RecurrentState(**self.tensors)  # the very same: they are replaced, never written into
        other.length = self.length
        return other

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


@dataclass(frozen=True)
class Memory:
    """What an encoder read for a decoder: `hidden` (B, M, D), and `mask` (B, M) True at tokens, None where all are."""

    hidden: torch.Tensor
    mask: torch.Tensor | None

    def select(self, rows: torch.Tensor) -> "Memory":
        return Memory(self.hidden[rows], None if self.mask is None else self.mask[rows])

    @property
    def bytes(self) -> int:
        return self.hidden.numel() * self.hidden.element_size() + (0 if self.mask is None else self.mask.numel())


class MemoryState:
    """Keys and values of a `Memory` in one layer, (B, M, K, C) each; None until they are first needed."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    @property
    def bytes(self) -> int:
        return sum(kept.numel() * kept.element_size() for kept in (self.keys, self.values) if kept is not None)


class ReadingState:
    """The state of a layer that also reads a memory: its `own`, which alone counts tokens, and that of the memory, which no
    rewinding changes."""

    def __init__(self, own: LayerState, memory: MemoryState):
        self.own, self.memory = own, memory

    @property
    def length(self) -> int:
        return self.own.length

    def select(self, rows: torch.Tensor) -> None:
        self.own.select(rows)
        self.memory.select(rows)

    def last_boundary(self, length: int) -> int:
        return self.own.last_boundary(length)

    def rewind_to(self, length: int) -> None:
        self.own.rewind_to(length)

    def copy(self, capacity: int) -> "ReadingState":
        return ReadingState(self.own.copy(capacity), self.memory)  # which nobody writes to once it is read

    @property
    def bytes(self) -> int:
        return self.own.bytes + self.memory.bytes


@dataclass
class ReadingStates:
    """The same for sequences side by side: `own` are pages that they share, or a state for each, `memory` one for each."""

    own: Any
    memory: Sequence[MemoryState]


class State:
    """The memory of a whole model: one layer state a layer, the left padding of its rows, and what an encoder read for it.

    All rows have the same number of stored tokens; rows of different lengths are padded on the left.
    """

    def __init__(self, layers: list[LayerState], batch: int, capacity: int, device: torch.device):
        self.layers = layers
        self.capacity = capacity
        self.padding: torch.Tensor | None = None  # (B,) int64
        self.memory: Memory | None = None
        self.tokens = torch.zeros(batch, 0, dtype=torch.int64, device=device)  # all that were read, (B, length)
        self.pending = 0  # tokens at the end of `tokens` that the layers must read again
        self.reach = 0  # length of the sequences for which the layers' memory was made

    @property
    def length(self) -> int:
        """Tokens stored in each row, padding included."""
        return self.tokens.shape[1]

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Note (B, T) new tokens; returns what the layers have to read: those that a rewind left over come first."""
        assert self.length + tokens.shape[1] <= self.capacity, f"{self.length} + {tokens.shape[1]} > {self.capacity} tokens"
        self.tokens = torch.cat([self.tokens, tokens], dim=1)
        unread, self.pending, self.reach = tokens.shape[1] + self.pending, 0, self.length
        return self.tokens[:, self.length - unread :]

    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rows (int64 indices), in the given order."""
        for layer in self.layers:
            layer.select(rows)
        self.tokens = self.tokens[rows]
        if self.padding is not None:
            self.padding = self.padding[rows]
        if self.memory is not None:
            self.memory = self.memory.select(rows)

    def fork(self, copies: int) -> None:
        """Repeat every row `copies` times, copies side by side."""
        self.select(torch.arange(self.batch, device=self.tokens.device).repeat_interleave(copies))

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every row."""
        assert 0 <= tokens <= self.length
        kept = self.length - tokens
        boundary = kept
        while any(layer.last_boundary(boundary) != boundary for layer in self.layers):
            boundary = min(layer.last_boundary(boundary) for layer in self.layers)
        for layer in self.layers:
            layer.rewind_to(min(boundary, layer.length))
        self.tokens, self.pending = self.tokens[:, :kept], kept - boundary

    def restart(self, layers: list[LayerState]) -> None:
        """Take empty layers, which the next call fills with all tokens again."""
        self.layers, self.pending = layers, self.length

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(layer.bytes for layer in self.layers) + (0 if self.memory is None else self.memory.bytes)
