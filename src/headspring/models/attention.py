"""Multi-head attention with grouped key–value heads (arXiv 2305.13245) and optional QK-norm (arXiv 2010.04245).

Where its heads look is a `mask`, how they know the order a `position`; both are values with files of their own.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from headspring.models.attend import added, attend, pattern, weigh
from headspring.models.context import Context, Visibility
from headspring.models.mask import Causal, Mask
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.norm import Norm, NormModule, RMSNorm
from headspring.models.part import Cost, Linear, ParameterRule, constant
from headspring.models.position import Position, RoPE
from headspring.models.state import KeyValueState, LayerState


class Attention(Mixer):
    """`heads` query heads share `kv_heads` keys and values (default: as many). `head_dim` defaults to width / heads.

    `qk_norm` normalises each head's query and key before the rotation. `bias` puts biases on q, k and v, `out_bias` on the
    output. `scale` multiplies the scores (default 1 / sqrt(head_dim)); `softcap` bounds them, as softcap · tanh(s / softcap)
    (arXiv 2408.00118). `sink` adds a learned logit for each head to the softmax, which weighs nothing: a head may attend to
    no token at all (arXiv 2508.10925).
    """

    kind: Literal["attention"] = "attention"
    heads: int = Field(4, gt=0)
    kv_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0)
    position: Position = RoPE()
    mask: Mask = Causal()
    qk_norm: Norm | None = RMSNorm()
    bias: bool = False
    out_bias: bool = False
    scale: float | None = Field(None, gt=0)
    softcap: float | None = Field(None, gt=0)
    sink: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> "Attention":
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim is not None and isinstance(self.position, RoPE):
            self.position.check(self.head_dim)
        return self

    @property
    def causal(self) -> bool:
        return self.mask.causal

    def build(self, width: int) -> "AttentionModule":
        return AttentionModule(self, width)


class AttentionModule(MixerModule):
    """x (B, T, D) → (B, T, D)."""

    site_names = ("q", "k", "v", "pattern", "heads", "out")
    plain_sites = ("pattern",)

    def __init__(self, value: Attention, width: int):
        super().__init__()
        if value.head_dim is None and width % value.heads:
            raise ValueError(f"width ({width}) must be a multiple of heads ({value.heads}), or head_dim be given")
        self.value = value
        self.heads, self.kv_heads = value.heads, value.kv_heads or value.heads
        self.channels = value.head_dim or width // value.heads
        self.q = Linear(width, self.heads * self.channels, bias=value.bias)
        self.k = Linear(width, self.kv_heads * self.channels, bias=value.bias)
        self.v = Linear(width, self.kv_heads * self.channels, bias=value.bias)
        self.out = Linear(self.heads * self.channels, width, bias=value.out_bias, std=0.0)
        self.q_norm: NormModule | None = value.qk_norm.build(self.channels) if value.qk_norm else None
        self.k_norm: NormModule | None = value.qk_norm.build(self.channels) if value.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(self.heads)) if value.sink else None
        self.position = value.position.build(self.heads, self.channels, value.mask.causal)
        self._mask_key, self._bias_key = repr(value.mask), f"{self.position.key} {value.mask!r}"

    @property
    def by_length(self) -> bool:
        return self.position.by_length

    def regime(self, length: int) -> int:
        return self.position.regime(length)

    def rules(self) -> dict[str, ParameterRule]:
        return {} if self.sinks is None else {"sinks": ParameterRule(constant(0.0), "vector")}

    def prepare(self, context: Context) -> None:
        context.visibility(self.value.mask)
        self.position.prepare(context)
        bias = self.position.bias(context)
        if bias is not None:
            visible, keys = context.prepared[self._mask_key], context.past + context.time
            context.once(self._bias_key, lambda: added(bias, visible, context.time, keys))

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        batch, time, _ = x.shape
        q = self.q(x).view(batch, time, self.heads, self.channels)
        k = self.k(x).view(batch, time, self.kv_heads, self.channels)
        v = self.v(x).view(batch, time, self.kv_heads, self.channels)
        q, k = self._place(q, self.q_norm, context), self._place(k, self.k_norm, context)
        q, k, v = self.site("q", q), self.site("k", k), self.site("v", v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if state is not None:
            assert isinstance(state, KeyValueState)
            k, v = state.append(k, v)
        y = self._attend(q, k, v, context).transpose(1, 2)
        y = self.site("heads", y)  # (B, T, H, C)
        return self.site("out", self.out(y.reshape(batch, time, -1)))

    def _place(self, x: torch.Tensor, norm: NormModule | None, context: Context) -> torch.Tensor:
        """Normalise and place (B, T, H, C)."""
        return self.position.place(x if norm is None else norm(x), context)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context) -> torch.Tensor:
        visible, bias = context.prepared[self._mask_key], context.prepared.get(self._bias_key)
        if bias is not None:
            visible = Visibility(None, causal=False)  # the mask is part of the bias
        if "pattern" not in self.watched and self.value.softcap is None and self.sinks is None:
            return attend(q, k, v, visible, scale=self.value.scale, bias=bias)
        cap, sinks = self.value.softcap, self.sinks
        made = pattern(q, k, visible, scale=self.value.scale, bias=bias, softcap=cap, sinks=sinks)
        return weigh(self.site("pattern", made), v)

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> KeyValueState:
        if not self.value.mask.causal:
            raise ValueError("attention that sees later tokens cannot read them one by one: it has no state")
        return KeyValueState(batch, self.kv_heads, capacity, self.channels, dtype, device)

    def cost(self, name: str, context_length: int) -> Cost:
        """Scores and values count the keys that a query sees on average: half the context under a causal mask."""
        keys = self.value.mask.keys_seen(context_length)
        scores = Cost("pattern", 0, 4.0 * self.heads * self.channels * keys, 2.0 * self.heads * self.channels)
        parts = [self.q.cost("q"), self.k.cost("k"), self.v.cost("v"), scores, self.out.cost("out")]
        if self.q_norm is not None and self.k_norm is not None:
            for label, norm, heads in (("q_norm", self.q_norm, self.heads), ("k_norm", self.k_norm, self.kv_heads)):
                one = norm.cost(label)
                activation = one.activation_bytes * heads
                parts.append(Cost(label, one.parameters, one.flops * heads, activation, 0.0, one.shape))
        position = self.position.cost("position", self.heads + self.kv_heads)
        if position is not None:
            parts.append(position)
        if self.sinks is not None:
            parts.append(Cost("sinks", self.heads))
        if self.value.mask.causal:
            parts.append(Cost("cache", state_bytes=2.0 * 2 * self.kv_heads * self.channels))
        return Cost.sum(name, tuple(parts), f"{self.heads} heads of {self.channels}, {self.kv_heads} key–value")
