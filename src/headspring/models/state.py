"""What a mixer remembers between calls, behind one interface: append, select, fork, rewind, bytes.

The first implementation is a dense key–value cache: one buffer a layer, (B, K, capacity, C). Recurrent mixers will keep a
snapshot instead and pages will replace the buffer; the callers do not change.
"""

import torch


class KeyValueState:
    """Keys and values of one attention layer for up to `capacity` tokens a row."""

    def __init__(self, batch: int, kv_heads: int, capacity: int, channels: int, dtype: torch.dtype, device: torch.device):
        self.keys = torch.zeros(batch, kv_heads, capacity, channels, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
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
        """Keep the given rows, in the given order. A row may appear more than once."""
        self.keys, self.values = self._pick(self.keys, rows), self._pick(self.values, rows)

    def _pick(self, buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A buffer of the same capacity for `rows`; only what is stored is copied."""
        picked = buffer.new_empty(len(rows), *buffer.shape[1:])
        picked[:, :, : self.length] = buffer[rows, :, : self.length]
        return picked

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every row."""
        assert 0 <= tokens <= self.length
        self.length -= tokens

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


class State:
    """The memory of a whole model: one layer state a layer, and the left padding of its rows.

    All rows have the same number of stored tokens; rows of different lengths are padded on the left.
    """

    def __init__(self, layers: list[KeyValueState], capacity: int):
        self.layers = layers
        self.capacity = capacity
        self.padding: torch.Tensor | None = None  # (B,) int64

    @property
    def length(self) -> int:
        """Tokens stored in each row, padding included."""
        return self.layers[0].length

    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rows (int64 indices), in the given order."""
        for layer in self.layers:
            layer.select(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]

    def fork(self, copies: int) -> None:
        """Repeat every row `copies` times, copies side by side."""
        batch = self.layers[0].keys.shape[0]
        self.select(torch.arange(batch, device=self.layers[0].keys.device).repeat_interleave(copies))

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every row."""
        for layer in self.layers:
            layer.rewind(tokens)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(layer.bytes for layer in self.layers)
