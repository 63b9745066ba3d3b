"""The n-gram language model as a model of the house: tokens in, log-probabilities out, a state between calls.

It is counted and not trained: `count` reads documents once, and no gradient flows. Its hidden states are the logarithms of
its probabilities, one channel a token, and there is no matrix after them. Everything else (generation, scoring, padding,
packed documents, caches, folders) works as for any model.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from headspring.models.context import Context
from headspring.models.model import Model, ModelModule
from headspring.models.ngram.backoff import Table, stupid
from headspring.models.ngram.kneser_ney import KneserNey
from headspring.models.part import Cost, PartModule
from headspring.models.state import RecurrentState, State

NEVER = -100.0  # the logarithm that stands for a probability of 0
ROWS = 512  # distributions made at once


class NGram(Model):
    """`order` n: each prediction sees n − 1 tokens. `bos` begins documents and is never predicted.

    `sizes` is how many n-grams of each order were counted; an uncounted model has the unigrams only, all alike. The width
    is the vocabulary's size."""

    kind: Literal["ngram"] = "ngram"
    width: int = Field(0, ge=0)
    order: int = Field(5, gt=0)
    smoothing: Literal["kneser_ney", "stupid_backoff"] = "kneser_ney"
    bos: int | None = Field(0, ge=0)
    sizes: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> "NGram":
        if self.width not in (0, self.vocab):
            raise ValueError(f"the width of an n-gram model is its vocabulary's size, {self.vocab}")
        if self.bos is not None and self.bos >= self.vocab:
            raise ValueError(f"bos ({self.bos}) is outside the vocabulary of {self.vocab}")
        if self.smoothing == "kneser_ney" and self.bos is None:
            raise ValueError("kneser_ney needs bos: its documents begin with one")
        object.__setattr__(self, "width", self.vocab)
        return self

    @property
    def counted(self) -> bool:
        return True

    def module(self) -> "NGramModule":
        return NGramModule(self)


class NGramModule(ModelModule):
    """The module of an `NGram`: the buffers of each order are those of `backoff.Table`."""

    config: NGram

    def __init__(self, config: NGram):
        super().__init__(config)
        sizes = config.sizes or (config.vocab, *[0] * (config.order - 1))
        self.tables = nn.ModuleList(_Buffers(size) for size in sizes)
        first = self.buffers_of(1)
        first.keys.copy_(torch.arange(config.vocab))
        first.probabilities.fill_(1.0 / config.vocab)
        self.complete()

    def count(self, documents: Sequence[np.ndarray]) -> None:
        """Take what these documents (token ids, each beginning with `bos`) say, in place of what was known.

        Raises `UserError` where there is nothing to count."""
        config = self.config
        if config.smoothing == "kneser_ney":
            assert config.bos is not None
            tables = KneserNey(documents, config.vocab, config.bos, config.order).backed_off()
        else:
            tables = stupid(documents, config.vocab, config.bos, config.order)
        self.fill(tables)

    def fill(self, tables: Sequence[Table]) -> None:
        """Hold these tables."""
        self.config = self.config.model_copy(update={"sizes": tuple(len(table.keys) for table in tables)})
        device = self.device
        self.tables = nn.ModuleList(_Buffers(len(table.keys)) for table in tables).to(device)
        for buffers, table in zip(self.tables, tables, strict=True):
            for name in ("keys", "probabilities", "weights"):
                getattr(buffers, name).copy_(torch.from_numpy(getattr(table, name)))

    def table(self, n: int) -> Table:
        """The n-grams of order n."""
        buffers = self.buffers_of(n)
        return Table(*(getattr(buffers, name).cpu().numpy() for name in ("keys", "probabilities", "weights")))

    def buffers_of(self, n: int) -> "_Buffers":
        """Those of order n."""
        buffers = self.tables[n - 1]
        assert isinstance(buffers, _Buffers)
        return buffers

    @property
    def device(self) -> torch.device:
        return self.buffers_of(1).keys.device

    # ---- a model like any other

    def owners(self) -> Iterator[tuple[str, PartModule, tuple[str, ...]]]:
        yield "", self, ("final",)

    def blocks(self) -> Iterable[nn.Module]:
        return ()

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """log p(· | the last n − 1 tokens), (B, T, V) float32, of tokens (B, T) int64."""
        past, memory, (batch, time) = 0, None, tokens.shape
        before = torch.zeros(batch, self.config.order - 1, dtype=torch.int64, device=tokens.device)
        if state is not None:
            padding = self._check_state(state, time, segments, padding)
            past = state.length - state.pending
            tokens = state.read(tokens)
            memory = state.layers[0]
            assert isinstance(memory, RecurrentState)
            before = memory["window"]
        if past + tokens.shape[1] > self.config.context:
            raise ValueError(f"{past + tokens.shape[1]} tokens are more than the model's context of {self.config.context}")
        context = self._context(tokens.shape[1], past, segments, padding)
        line = torch.cat([before, tokens], dim=1)
        if isinstance(memory, RecurrentState):
            memory.replace(tokens.shape[1], window=line[:, tokens.shape[1] :])
        numbers = self._contexts(line, context.positions.expand(batch, -1))
        rows = [self._distributions(part) for part in numbers.flatten(0, 1).split(ROWS)]
        hidden = torch.cat(rows).view(batch, tokens.shape[1], -1)
        return self.site("final", hidden)[:, -time:]

    def _context(self, time: int, past: int, segments: torch.Tensor | None, padding: torch.Tensor | None) -> Context:
        return Context.of(time, past, segments, padding, self.device)

    def _contexts(self, line: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, T, n − 1): the number of the 1, 2, … n − 1 tokens that end at each token, −1 where they were never seen or
        reach over the beginning of the document."""
        time, found = positions.shape[1], []
        number = torch.zeros_like(line)
        for n in range(1, self.config.order):
            keys = self.buffers_of(n).keys
            if n > 1:  # the number of what ends one token earlier
                number = torch.cat([torch.full_like(line[:, :1], -1), number[:, :-1]], dim=1)
            wanted = number * self.config.vocab + line
            place = torch.searchsorted(keys, wanted.contiguous()).clamp(max=max(len(keys) - 1, 0))
            hit = (number >= 0) & (keys[place] == wanted) if len(keys) else torch.zeros_like(wanted, dtype=torch.bool)
            number = torch.where(hit, place, -1)
            found.append(number[:, -time:].masked_fill(positions < n - 1, -1))
        if not found:
            return positions.new_zeros(*positions.shape, 0)
        return torch.stack(found, dim=-1)

    def _distributions(self, numbers: torch.Tensor) -> torch.Tensor:
        """Logarithms (R, V) float32 of the distribution after each row of contexts (R, n − 1)."""
        vocab = self.config.vocab
        p = self.buffers_of(1).probabilities.repeat(len(numbers), 1)
        for n in range(2, self.config.order + 1):
            rows = (numbers[:, n - 2] >= 0).nonzero()[:, 0]
            context = numbers[rows, n - 2]
            p[rows] *= self.buffers_of(n - 1).weights[context][:, None]
            keys = self.buffers_of(n).keys
            low, high = (torch.searchsorted(keys, (context + more) * vocab) for more in (0, 1))
            lengths = high - low
            row = rows.repeat_interleave(lengths)
            place = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            place = place + low.repeat_interleave(lengths)
            p[row, keys[place] % vocab] = self.buffers_of(n).probabilities[place]
        return p.log().clamp(min=NEVER).float()

    def new_state(self, batch: int, capacity: int | None = None) -> State:
        capacity = min(capacity or self.config.context, self.config.context)
        window = torch.zeros(batch, self.config.order - 1, dtype=torch.int64, device=self.device)
        return State([RecurrentState(window=window)], batch, capacity, self.device)

    @property
    def output_weight(self) -> None:
        """None: hidden states are logits."""
        return None

    def ledger(self, context_length: int | None = None) -> Cost:
        parts = []
        for n in range(1, self.config.order + 1):
            size = len(self.buffers_of(n).keys)  # a probability and a weight each
            parts.append(Cost(f"{n}-grams", 2 * size, 2.0 * self.config.vocab, 0.0, 0.0, f"{size}"))
        parts.append(Cost("window", fixed_state_bytes=8.0 * (self.config.order - 1)))  # token ids
        return Cost.sum("ngram", tuple(parts))

    def num_parameters(self) -> int:
        """Probabilities and weights that were counted."""
        return self.ledger().parameters


class _Buffers(nn.Module):
    """A `backoff.Table` as tensors."""

    keys: torch.Tensor
    probabilities: torch.Tensor
    weights: torch.Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("probabilities", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("weights", torch.ones(size, dtype=torch.float64))

    def _apply(self, function, recurse=True):
        """Move, and keep precision: these are counts, whatever dtype activations have."""
        device = function(torch.zeros(())).device
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(device)  # type: ignore[union-attr]
        return self
