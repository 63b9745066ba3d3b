"""Attention from one sequence to another: a decoder's tokens ask, what an encoder read answers (arXiv 1706.03762, 3.2.3).

    x (B, T, D) asks, memory (B, M, D) answers → (B, T, D)

Every query sees every token of the source, so that there is no mask but the padding of the source, and no position: what
stands where, the encoder has written into its hidden states. Keys and values depend on the source alone; a `MemoryState`
keeps them from the first call on, and each further token costs one query.

Why a mixer of its own and not an option of `Attention`: it has neither mask nor position nor a cache that grows, which is
most of what that file is about.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from headspring.models.attend import Scoring, attention, scored_pattern, weigh
from headspring.models.context import Context, Visibility
from headspring.models.part import Cost, linear
from headspring.models.projected import Projected, ProjectedModule
from headspring.models.ragged import Ragged
from headspring.models.state import MemoryState

SEEN = "what is seen of the memory"


class CrossAttention(Projected):
    """`heads` query heads over `kv_heads` keys and values of the memory (default: as many). The fields mean what they do in
    `Attention`; `qk_norm` normalises queries and keys."""

    kind: Literal["cross_attention"] = "cross_attention"

    @property
    def reads_memory(self) -> bool:
        return True

    def build(self, width: int) -> "CrossAttentionModule":
        return CrossAttentionModule(self, width)


class CrossAttentionModule(ProjectedModule):
    """x (B, T, D) → (B, T, D), with a context that has a memory."""

    joins = (("k", "v"),)

    def __init__(self, value: CrossAttention, width: int):
        super().__init__(value, width)
        self.scoring = Scoring(value.scale)

    def prepare(self, context: Context) -> None:
        mask = None if context.memory_mask is None else context.memory_mask[:, None, None, :]
        context.once(SEEN, lambda: Visibility(mask, causal=False))

    def forward(self, x: torch.Tensor, context: Context, state: Any = None) -> torch.Tensor:
        """`state`: a `MemoryState`, or one for each of the sequences side by side."""
        q = self.q(x).unflatten(-1, (self.heads, self.channels))
        q = self.site("q", q if self.q_norm is None else self.q_norm(q)).transpose(1, 2)
        y = self._read(q, context, state) if context.ragged is None else self._read_each(q, context.ragged, state)
        y = self.site("heads", y.transpose(1, 2))  # (B, T, H, C)
        return self.site("out", self.out(y.flatten(2)))

    def _read_each(self, q: torch.Tensor, ragged: Ragged, states: Sequence[MemoryState]) -> torch.Tensor:
        """Queries (1, H, N, C) of several sequences, each of which has a memory of its own."""
        parts = []
        for number, span, own in ragged.alone():
            self.prepare(own)
            parts.append(self._read(q[:, :, span], own, states[number]))
        return torch.cat(parts, dim=2)

    def _read(self, q: torch.Tensor, context: Context, state: MemoryState | None) -> torch.Tensor:
        """What queries (B, H, T, C) find in the memory, (B, H, T, C)."""
        k, v = self._memory(context, state)
        k, v = self.site("k", k).transpose(1, 2), self.site("v", v).transpose(1, 2)
        visible = context.prepared[SEEN]
        if "pattern" not in self.watched:
            return attention(q, k, v, visible, self.scoring)
        return weigh(self.site("pattern", scored_pattern(q, k, visible, self.scoring)), v)

    def _memory(self, context: Context, state: MemoryState | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the source, (B, M, K, C) each: worked out once where there is a state to keep them."""
        if state is not None and state.keys is not None and state.values is not None:
            return state.keys, state.values
        assert context.memory is not None, "cross-attention without a memory to read"
        mixed = linear(context.memory, self.k, self.v)
        k, v = (part.unflatten(-1, (self.kv_heads, self.channels)) for part in mixed.chunk(2, dim=-1))
        k = k if self.k_norm is None else self.k_norm(k)
        if state is not None:
            state.keys, state.values = k, v
        return k, v

    def cost(self, name: str, context_length: int) -> Cost:
        """For each token of the decoder, beside a source that is as long: a source token's keys and values count as its."""
        kept = 2.0 * self.channels * (self.heads + 2 * self.kv_heads) + 4.0 * self.heads
        scores = Cost("pattern", 0, 4.0 * self.heads * self.channels * context_length, kept)
        k, v = (replace(part.cost(label), activation_bytes=0.0) for label, part in (("k", self.k), ("v", self.v)))
        parts = [self.q.cost("q"), k, v, scores, self.out.cost("out")]
        for label, norm, heads in (("q_norm", self.q_norm, self.heads), ("k_norm", self.k_norm, self.kv_heads)):
            if norm is not None:
                one = norm.cost(label)
                parts.append(Cost(label, one.parameters, one.flops * heads, one.activation_bytes * heads, 0.0, one.shape))
        parts.append(Cost("cache", state_bytes=4.0 * self.kv_heads * self.channels))
        return Cost.sum(name, tuple(parts), f"{self.heads} heads of {self.channels}, {self.kv_heads} key–value")
