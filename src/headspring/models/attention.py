"""Multi-head attention with grouped key–value heads (arXiv 2305.13245) and optional QK-norm (arXiv 2010.04245).

Where its heads look is a `mask`, how they know the order a `position`; both are values with files of their own. A mask that
hides most keys is read sparsely (`block_sparse`) where that is worthwhile; a sliding window has a state that does not grow
(`window`).
"""

from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from headspring.models import block_sparse, flex, kernels, strided
from headspring.models.attend import Scoring, added, attention, scored_pattern, weigh
from headspring.models.chosen import Chosen
from headspring.models.context import Context, Visibility
from headspring.models.mask import Causal, Mask, Strided
from headspring.models.norm import NormModule, RMSNormModule
from headspring.models.paged import Int8Pages, Pages
from headspring.models.part import Cost, ParameterRule, constant, linear, same_input
from headspring.models.position import Position, RoPE
from headspring.models.projected import Projected, ProjectedModule
from headspring.models.ragged import Ragged
from headspring.models.state import KeyValueState, LayerState
from headspring.models.window import WindowState, held_positions, held_visibility, room

TOGETHER = 16  # sequences whose keys are gathered and padded at once, where no operator reads them in their pages


class Attention(Projected):
    """`heads` query heads share `kv_heads` keys and values (default: as many). `head_dim` defaults to width / heads.

    `qk_norm` normalises each head's query and key before the rotation. `bias` puts biases on q, k and v, `out_bias` on the
    output. `scale` multiplies the scores (default 1 / sqrt(head_dim)); `softcap` bounds them, as softcap · tanh(s / softcap)
    (arXiv 2408.00118). `sink` adds a learned logit for each head to the softmax, which weighs nothing: a head may attend to
    no token at all (arXiv 2508.10925).
    """

    kind: Literal["attention"] = "attention"
    position: Position = RoPE()
    mask: Mask = Causal()
    softcap: float | None = Field(None, gt=0)
    sink: bool = False

    @model_validator(mode="after")
    def _position_fits(self) -> "Attention":
        if self.head_dim is not None and isinstance(self.position, RoPE):
            self.position.check(self.head_dim)
        return self

    @property
    def causal(self) -> bool:
        return self.mask.causal

    def build(self, width: int) -> "AttentionModule":
        return AttentionModule(self, width)


class AttentionModule(ProjectedModule):
    """x (B, T, D) → (B, T, D)."""

    joins = (("q", "k", "v"),)

    def __init__(self, value: Attention, width: int):
        super().__init__(value, width)
        self.value = value
        self.sinks = nn.Parameter(torch.empty(self.heads)) if value.sink else None
        self.position = value.position.build(self.heads, self.channels, value.mask.causal)
        mask = value.mask
        self.sliding = mask if isinstance(mask, Causal) and mask.window is not None else None
        self.chosen = mask if isinstance(mask, Chosen) else None
        self._mask = mask.base if isinstance(mask, Chosen) else mask
        self._mask_key, self._bias_key = repr(self._mask), f"{self.position.key} {mask!r}"

    @property
    def by_length(self) -> bool:
        return self.position.by_length

    def regime(self, length: int) -> int:
        return self.position.regime(length)

    def rules(self) -> dict[str, ParameterRule]:
        return {} if self.sinks is None else {"sinks": ParameterRule(constant(0.0), "vector")}

    @property
    def pages(self) -> bool:
        sinks = self.sliding is not None and self.sliding.sinks
        return self.value.mask.causal and self.chosen is None and not sinks and not self.position.by_length

    @property
    def plain_on_pages(self) -> bool:
        """Whether all it does with rows on pages is: product, head norms, rotation, `kernels.paged_attention`, product."""
        norms = all(norm is None or isinstance(norm, RMSNormModule) for norm in (self.q_norm, self.k_norm))
        scored = isinstance(self._mask, Causal) and self.value.softcap is None and self.sinks is None
        return self.pages and norms and scored and self.position.fuses and not self.position.biased

    def prepare(self, context: Context) -> None:
        self.position.prepare(context)
        if context.ragged is not None:
            return
        if self._holds(context):
            self._held(context)
        elif self.chosen is not None and (self._flexes(context) or self._gathers(context)):
            block_sparse.lay_out(context, self.chosen.block)
        elif self._flexes(context):
            self._tiles(context)
        elif self._gathers(context) and isinstance(self._mask, Strided):
            self._columns(self._mask, context)
        elif self._gathers(context):
            context.visibility(self._mask) if self._maybe_native(context) else self._lists(context)
        else:
            context.visibility(self._mask)
            self._prepare_bias(context)

    def _prepare_bias(self, context: Context) -> None:
        bias = self.position.bias(context)
        if self.chosen is not None:
            block_sparse.lay_out(context, self.chosen.block)
        elif bias is not None:
            visible, keys = context.prepared[self._mask_key], context.past + context.time
            context.once(self._bias_key, lambda: added(bias, visible, context.time, keys))

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        q, k, v = self._query_key_value(x, context)
        q, k, v = self.site("q", q), self.site("k", k), self.site("v", v)
        if isinstance(state, Pages):
            return self._answer(self._attend_pages(q, k, v, state, context))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        asks = self._asks(q)
        if isinstance(state, WindowState):
            k, v = state.append(k, v, context.padding)
        elif state is not None:
            assert isinstance(state, KeyValueState)
            k, v = state.append(k if asks is None else torch.cat([k, asks], dim=-1), v)
            if asks is not None:
                k, asks = k.chunk(2, dim=-1)
        return self._answer(self._attend(q, k, v, asks, context).transpose(1, 2))

    def _answer(self, y: torch.Tensor) -> torch.Tensor:
        """What the heads (B, T, H, C) write to the stream."""
        return self.site("out", self.out(self.site("heads", y).flatten(2)))

    def _attend_pages(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: Pages, context: Context) -> torch.Tensor:
        """Queries (1, N, H, C) of several sequences, keys and values (1, N, K, C) → (1, N, H, C)."""
        ragged = context.ragged
        assert ragged is not None
        pages.write(k[0], v[0], ragged)
        scoring = Scoring(self.value.scale, self.value.softcap, self.sinks)
        causal = isinstance(self._mask, Causal) and not self.position.biased and "pattern" not in self.watched
        if causal and scoring.fused and kernels.pages_natively(q, pages):
            window = None if self.sliding is None else self.sliding.window
            return kernels.paged_attention(q[0], pages, ragged, window, scoring.scale)[None]
        if causal and (on_gpu := kernels.pages_on_gpu(q)) is not None:
            return self._attend_on_gpu(on_gpu, q[0], pages, ragged)[None]
        several = len(ragged.counts) > 1 or ragged.longest is not None
        if causal and several and all(count == 1 for count in ragged.counts):
            return self._attend_together(q, pages, ragged, scoring)
        parts = []
        for number, span, own in ragged.alone():
            self.position.prepare(own)
            seen, scores = own.visibility(self._mask), scoring.with_bias(self.position.bias(own))
            keys, values = pages.gather(number, ragged)
            queries = q[:, span].transpose(1, 2)
            if "pattern" in self.watched:
                parts.append(weigh(self.site("pattern", scored_pattern(queries, keys, seen, scores)), values))
            else:
                parts.append(attention(queries, keys, values, seen, scores))
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _attend_on_gpu(self, on_gpu: ModuleType, q: torch.Tensor, pages: Pages, ragged: Ragged) -> torch.Tensor:
        """Queries (N, H, C) by the operator of `kernels.triton_paged`."""
        step = ragged.tables[pages.group], ragged.offsets, ragged.lengths, ragged.positions[0]
        tiles = ragged.tiles(on_gpu.queries_of_a_tile(self.heads, self.kv_heads))
        window = None if self.sliding is None else self.sliding.window
        scale = self.channels**-0.5 if self.value.scale is None else self.value.scale
        scoring = {"scale": scale, "window": window, "softcap": self.value.softcap, "sinks": self.sinks}
        return on_gpu.attend(q, pages.tensors, *step, tiles, ragged.reach(), **scoring)

    def _attend_together(self, q: torch.Tensor, pages: Pages, ragged: Ragged, scoring: Scoring) -> torch.Tensor:
        """The same where each sequence has one query, some sequences at a time: (1, S, H, C)."""
        parts = []
        for start in range(0, len(ragged.counts), TOGETHER):
            rows = slice(start, start + TOGETHER)
            ends = ragged.lengths[rows, None] + 1
            length = ragged.reach(rows)
            place = torch.arange(length, device=q.device)
            seen = self._mask.allowed(ends - 1, place) & (place < ends)
            keys, values = pages.gather_several(rows, ragged, length)
            hidden = ~seen[:, None, :, None]  # 0 · NaN would be NaN, and nobody knows what stands there
            keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
            parts.append(attention(q[0, rows, :, None], keys, values, Visibility(seen[:, None, None], causal=False), scoring))
        return torch.cat(parts)[:, :, 0][None]

    def _query_key_value(self, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, H or K, C), from one product; queries and keys normalised and placed, by one operator where that is all."""
        heads, mixed = (self.heads, self.kv_heads), linear(x, self.q, self.k, self.v)
        q_norm, k_norm, fuses = self.q_norm, self.k_norm, self.position.fuses
        if fuses and isinstance(q_norm, RMSNormModule) and isinstance(k_norm, RMSNormModule):
            gains = q_norm.gain_for(x), k_norm.gain_for(x)
            return kernels.place_heads(mixed, heads, gains, self.position.rotation(context), q_norm.epsilon)
        if fuses and q_norm is None and k_norm is None:
            return kernels.place_heads(mixed, heads, None, self.position.rotation(context))
        q, k, v = kernels.place_heads(mixed, heads, None, None)
        return self._place(q, q_norm, context), self._place(k, k_norm, context), v

    def _place(self, x: torch.Tensor, norm: NormModule | None, context: Context) -> torch.Tensor:
        """Normalise and place (B, T, H, C)."""
        return self.position.place(x if norm is None else norm(x), context)

    def _asks(self, q: torch.Tensor) -> torch.Tensor | None:
        """(B, K, T, C): what each group of heads chooses blocks with, where that is done."""
        return None if self.chosen is None else q.unflatten(1, (self.kv_heads, -1)).mean(2)

    # ---- how the pattern is read: what a window holds, lists of keys, or all of it

    def _holds(self, context: Context) -> bool:
        """Whether the keys are those that a `WindowState` gives."""
        return self.sliding is not None and context.past > 0

    def _gathers(self, context: Context) -> bool:
        """Whether blocks of queries read lists of keys."""
        return "pattern" not in self.watched and block_sparse.worthwhile(self.value.mask, context)

    def _flexes(self, context: Context) -> bool:
        """Whether a kernel compiled for this mask and scoring reads it, and the fused one does not."""
        plain = self.chosen is None and self._mask.shows_all(context.time)
        plain = plain and context.segments is None and context.padding is None
        fused = self.value.softcap is None and self.sinks is None and not self.position.biased
        return "pattern" not in self.watched and not (plain and fused) and flex.serves(context, self.channels)

    def _tiles(self, context: Context) -> Any:
        """The tiles that such a kernel reads, of a mask that depends on positions alone."""
        return context.once(f"tiles: {self._mask_key}", lambda: flex.block_mask(self._mask, context))

    def _maybe_native(self, context: Context) -> bool:
        """Whether the operator for windows may take this; its dtype is not known before the first layer runs."""
        fused = self.value.softcap is None and self.sinks is None and self.value.scale is None
        plain = self.sliding is not None and not self.sliding.sinks and not self.position.biased
        return plain and fused and context.device.type == "cpu"

    def _held(self, context: Context) -> tuple[Visibility, torch.Tensor | None]:
        """What is seen of the keys that a window holds, and their bias."""

        def make() -> tuple[Visibility, torch.Tensor | None]:
            assert self.sliding is not None
            relative = held_positions(self.sliding, context)[:, None, :] - context.positions[:, :, None]
            return held_visibility(self.sliding, context), self.position.between(relative, context)

        return context.once(f"held: {self._bias_key}", make)

    def _lists(self, context: Context) -> tuple[block_sparse.Lists, torch.Tensor | None]:
        """The keys that blocks of queries read, and their bias."""

        def make() -> tuple[block_sparse.Lists, torch.Tensor | None]:
            lists = context.once(f"lists: {self._mask_key}", lambda: block_sparse.listed(self._mask, context))
            return lists, self._list_bias(lists, context)

        return context.once(f"lists and bias: {self._bias_key}", make)

    def _columns(self, mask: Strided, context: Context) -> tuple[block_sparse.Blocks, strided.Biases]:
        """The rows of a strided layout, and what is added to the scores of windows and of columns."""
        return context.once(f"columns: {self._bias_key}", lambda: strided.columns(mask, self.position, context))

    def _list_bias(self, lists: block_sparse.Lists, context: Context) -> torch.Tensor | None:
        return block_sparse.bias(lists, self.position, self.heads, context)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asks: torch.Tensor | None, context: Context
    ) -> torch.Tensor:
        scoring = Scoring(self.value.scale, self.value.softcap, self.sinks)
        if self._flexes(context):
            if self.chosen is not None and asks is not None:
                blocks = block_sparse.lay_out(context, self.chosen.block)
                choice = block_sparse.choices(self.chosen, blocks, asks, k)
                tiles = flex.chosen_block_mask(self.chosen, blocks, choice, context, self.heads)
            else:
                tiles = self._tiles(context)
            return flex.flex_attention(q, k, v, tiles, scoring, self.position, context)
        if self._gathers(context) and not (self._maybe_native(context) and kernels.attends_natively(q, v)):
            if isinstance(self._mask, Strided):
                return strided.strided_attention(q, k, v, self._mask, *self._columns(self._mask, context), scoring)
            if self.chosen is not None and asks is not None:
                lists = block_sparse.chosen(self.chosen, block_sparse.lay_out(context, self.chosen.block), asks, k)
                bias = self._list_bias(lists, context)
            else:
                lists, bias = self._lists(context)
            return block_sparse.block_attention(q, k, v, lists, scoring.with_bias(bias))
        visible, bias = self._seen(k, asks, context)
        scoring = scoring.with_bias(bias)
        if "pattern" not in self.watched:
            return attention(q, k, v, visible, scoring)
        return weigh(self.site("pattern", scored_pattern(q, k, visible, scoring)), v)

    def _seen(self, k: torch.Tensor, asks: torch.Tensor | None, context: Context) -> tuple[Visibility, torch.Tensor | None]:
        """What is seen of all keys, and the bias of their scores."""
        if self._holds(context):
            return self._held(context)
        if self.chosen is not None and asks is not None:
            base, blocks = context.prepared[self._mask_key], block_sparse.lay_out(context, self.chosen.block)
            visible = block_sparse.shown(self.chosen, base, blocks, asks, k, context.time, self.heads)
            return visible, self.position.bias(context)
        bias = context.prepared.get(self._bias_key)
        if bias is not None:
            return Visibility(None, causal=False), bias  # the mask is part of the bias
        return context.prepared[self._mask_key], None

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> KeyValueState | WindowState:
        if not self.value.mask.causal:
            raise ValueError("attention that sees later tokens cannot read them one by one: it has no state")
        if self.sliding is not None:
            return WindowState(batch, self.kv_heads, self.sliding, capacity, self.channels, dtype, device)
        keys = self.channels * (1 if self.chosen is None else 2)  # what chooses is kept beside each key
        return KeyValueState(batch, self.kv_heads, capacity, keys, dtype, device, value_channels=self.channels)

    def new_pages(
        self, count: int, dtype: torch.dtype, device: torch.device, stored: torch.dtype | None = None
    ) -> Pages | None:
        if not self.pages:
            return None
        group = None if self.sliding is None else self.sliding.window
        kind = Int8Pages if stored == torch.int8 else Pages
        return kind(count, self.kv_heads, self.channels, dtype, device, group)

    def _kept(self, context_length: int) -> float:
        """Bytes of a token's queries, keys and values as they were made, and of what the pattern is made of: queries and keys
        as placed, or, where the bias learns, which no fused kernel allows, all three and the pattern in float32. What is
        chosen from the keys is a mask in half precision."""
        made = 2.0 * self.channels * (self.heads + 2 * self.kv_heads)
        if self.position.learned:
            return made + 4.0 * self.heads * (3 * self.channels + context_length)
        placed = 2.0 * self.channels * (self.heads + self.kv_heads) + 4.0 * self.heads  # and how large each sum is
        dense = self.chosen is not None and not block_sparse.worthwhile_at(self.value.mask, context_length)
        return made + placed + (2.0 * self.heads * context_length if dense else 0.0)

    @property
    def _fuses(self) -> bool:
        """Whether one operator normalises and places queries and keys."""
        return self.position.fuses and (self.q_norm is None or isinstance(self.q_norm, RMSNormModule))

    def cost(self, name: str, context_length: int) -> Cost:
        """Scores and values count the keys that a query sees on average: half the context under a causal mask."""
        keys = self.value.mask.keys_seen(context_length)
        scores = Cost("pattern", 0, 4.0 * self.heads * self.channels * keys, self._kept(context_length))
        parts = [*same_input(self.q.cost("q"), self.k.cost("k"), self.v.cost("v")), scores, self.out.cost("out")]
        if self.q_norm is not None and self.k_norm is not None:
            for label, norm, heads in (("q_norm", self.q_norm, self.heads), ("k_norm", self.k_norm, self.kv_heads)):
                one = norm.cost(label)
                again = 0.0 if self._fuses else one.activation_bytes * heads
                parts.append(Cost(label, one.parameters, one.flops * heads, again, 0.0, one.shape))
        position = self.position.cost("position", self.heads + self.kv_heads)
        if position is not None:
            parts.append(position)
        if self.sinks is not None:
            parts.append(Cost("sinks", self.heads))
        kept = 2.0 * self.kv_heads * self.channels  # bytes of a token's keys, and of its values
        if self.sliding is not None:
            held = self.sliding.sinks + room(self.sliding.window or 1, context_length)
            parts.append(Cost("cache", fixed_state_bytes=2 * kept * held))
        elif self.value.mask.causal:
            parts.append(Cost("cache", state_bytes=kept * (2 if self.chosen is None else 3)))
        return Cost.sum(name, tuple(parts), f"{self.heads} heads of {self.channels}, {self.kv_heads} key–value")
