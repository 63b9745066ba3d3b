"""Multi-head latent attention (arXiv 2405.04434, DeepSeek-V2 and V3): keys and values of all heads from one short vector.

    x ─ kv_down ─ norm ─ latent (R) ─┬─ k_up → keys of each head, without a position
    │                                └─ v_up → values of each head
    ├─ k_rotary ─ rotated → one key that all heads share, which alone knows the position
    └─ q, or q_down ─ norm ─ q_up → queries [unrotated; rotated] of each head

A state keeps the latent and the rotary key: R + rotary numbers a token, where attention keeps 2 · heads · channels. The
score of head h is linear in the latent, q_hᵀ (K_h c) = (K_hᵀ q_h)ᵀ c, so that k_up can move to the query's side and v_up
behind the average ("absorbed"): attention then runs on the latents themselves, as one key–value head of R channels. That is
cheaper for few queries and many keys (decoding), and dearer for many queries (training), because R is wider than a head: the
module takes the form with fewer operations. Both are the same function but for rounding.

Rotated pairs are (c, c + rotary/2); DeepSeek's files pair neighbours, which a dialect undoes by permuting rows.
"""

from typing import Literal

import torch
from pydantic import Field

from headspring.models.attend import attend, pattern, weigh
from headspring.models.context import Context, Visibility
from headspring.models.mask import Causal, Mask
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.norm import Norm, RMSNorm
from headspring.models.part import Cost, Linear, same_input
from headspring.models.position import RoPE, YaRN
from headspring.models.state import KeyValueState, LayerState


class MLA(Mixer):
    """`heads` heads, with keys and queries of `head_dim` + `rotary_dim` channels and values of `value_dim` (default:
    `head_dim`), from a latent of `latent` channels; queries from one of `query_latent`, or from x where that is None.

    `norm` stands on both latents. `bias` puts biases on what makes the latents and on the output. `scale` multiplies the
    scores; its default is 1 / sqrt(head_dim + rotary_dim), times the square of YaRN's sharpening at `mscale_all_dim`.
    """

    kind: Literal["mla"] = "mla"
    heads: int = Field(4, gt=0)
    head_dim: int = Field(gt=0)
    rotary_dim: int = Field(gt=0)
    value_dim: int | None = Field(None, gt=0)
    latent: int = Field(gt=0)
    query_latent: int | None = Field(None, gt=0)
    position: RoPE = RoPE()
    mask: Mask = Causal()
    norm: Norm = RMSNorm()
    bias: bool = False
    scale: float | None = Field(None, gt=0)

    @property
    def causal(self) -> bool:
        return self.mask.causal

    @property
    def score_scale(self) -> float:
        """What multiplies the scores."""
        if self.scale is not None:
            return self.scale
        scale, scaling = (self.head_dim + self.rotary_dim) ** -0.5, self.position.scaling
        if isinstance(scaling, YaRN) and scaling.mscale_all_dim:
            scale *= scaling.sharpening(scaling.mscale_all_dim) ** 2
        return scale

    def build(self, width: int) -> "MLAModule":
        return MLAModule(self, width)


class MLAModule(MixerModule):
    """x (B, T, D) → (B, T, D). Sites: `q` (B, T, H, head_dim + rotary_dim), `latent` (B, T, R) and the shared key `rotary`
    (B, T, 1, rotary_dim) as the state keeps them, `pattern` (B, H, T, S), `heads` (B, T, H, value_dim)."""

    site_names = ("q", "latent", "rotary", "pattern", "heads", "out")
    plain_sites = ("pattern",)
    cut = ("q", "latent", "rotary")
    reads_weights = ("k_up", "v_up")  # absorbed in short calls

    def __init__(self, value: MLA, width: int):
        super().__init__()
        self.value, self.heads = value, value.heads
        self.value_dim = value.value_dim or value.head_dim
        query = value.heads * (value.head_dim + value.rotary_dim)
        if value.query_latent is None:
            self.q = Linear(width, query)
        else:
            self.q_down = Linear(width, value.query_latent, bias=value.bias)
            self.q_norm = value.norm.build(value.query_latent)
            self.q_up = Linear(value.query_latent, query)
        self.kv_down = Linear(width, value.latent, bias=value.bias)
        self.k_rotary = Linear(width, value.rotary_dim, bias=value.bias)
        self.kv_norm = value.norm.build(value.latent)
        self.k_up = Linear(value.latent, value.heads * value.head_dim)
        self.v_up = Linear(value.latent, value.heads * self.value_dim)
        self.out = Linear(value.heads * self.value_dim, width, bias=value.bias, std=0.0)
        self.position = value.position.build(value.heads, value.rotary_dim, value.mask.causal)
        self._mask_key = repr(value.mask)

    @property
    def by_length(self) -> bool:
        return self.position.by_length

    def regime(self, length: int) -> int:
        return self.position.regime(length)

    def prepare(self, context: Context) -> None:
        context.visibility(self.value.mask)
        self.position.prepare(context)

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        batch, time, _ = x.shape
        q = self.site("q", self._queries(x, context))
        latent = self.site("latent", self.kv_norm(self.kv_down(x)))
        rotary = self.site("rotary", self.position.place(self.k_rotary(x)[:, :, None], context))
        q, rotary, latent = q.transpose(1, 2), rotary.transpose(1, 2), latent[:, None]
        if state is not None:
            assert isinstance(state, KeyValueState)
            rotary, latent = state.append(rotary, latent)
        form = self._absorbed if self.absorbs(time, latent.shape[2]) else self._expanded
        y = self.site("heads", form(q, latent, rotary, context.prepared[self._mask_key]).transpose(1, 2))
        return self.site("out", self.out(y.reshape(batch, time, -1)))

    def _queries(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """(B, T, H, head_dim + rotary_dim), the last part rotated."""
        made = self.q(x) if self.value.query_latent is None else self.q_up(self.q_norm(self.q_down(x)))
        still, turned = made.unflatten(-1, (self.heads, -1)).split([self.value.head_dim, self.value.rotary_dim], dim=-1)
        return torch.cat([still, self.position.place(turned, context)], dim=-1)

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form has fewer operations than making keys and values of all heads."""
        latent, rotary = self.value.latent, self.value.rotary_dim
        head = self.value.head_dim + self.value_dim
        absorbed = queries * latent * head + queries * keys * (2 * latent + rotary)
        return absorbed < keys * latent * head + queries * keys * (head + rotary)

    def _expanded(self, q: torch.Tensor, latent: torch.Tensor, rotary: torch.Tensor, visible: Visibility) -> torch.Tensor:
        """Queries (B, H, T, ·), latent (B, 1, S, R) and rotary key (B, 1, S, ·) → (B, H, T, value_dim), through the keys and
        values of every head."""
        keys = self.k_up(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        values = self.v_up(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys = torch.cat([keys, rotary.expand(-1, self.heads, -1, -1)], dim=-1)
        return self._attend(q, keys, values, visible)

    def _absorbed(self, q: torch.Tensor, latent: torch.Tensor, rotary: torch.Tensor, visible: Visibility) -> torch.Tensor:
        """The same, with the latent as the one key and value of all heads."""
        still, turned = q.split([self.value.head_dim, self.value.rotary_dim], dim=-1)
        q = torch.cat([still @ self._by_head(self.k_up, q.dtype), turned], dim=-1)
        y = self._attend(q, torch.cat([latent, rotary], dim=-1), latent, visible)
        return y @ self._by_head(self.v_up, q.dtype).mT

    def _by_head(self, linear: Linear, dtype: torch.dtype) -> torch.Tensor:
        """(H, channels, R)."""
        return linear.weight.to(dtype).unflatten(0, (self.heads, -1))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visibility) -> torch.Tensor:
        scale = self.value.score_scale
        if "pattern" not in self.watched:
            return attend(q, k, v, visible, scale=scale)
        return weigh(self.site("pattern", pattern(q, k, visible, scale=scale)), v)

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> KeyValueState:
        """The rotary key and the latent, as the key and the value of one head."""
        return KeyValueState(batch, 1, capacity, self.value.rotary_dim, dtype, device, value_channels=self.value.latent)

    def _kept(self, read: int, context_length: int) -> float:
        """Bytes of a token's queries, keys and values; where values have another size than keys, which no fused kernel takes on
        a CPU, in float32 and with the pattern."""
        channels = 2 * read + self.value_dim
        if read == self.value_dim:
            return 2.0 * self.heads * channels
        return 4.0 * self.heads * (channels + context_length)

    def cost(self, name: str, context_length: int) -> Cost:
        """That of the expanded form, in which it is trained."""
        keys = self.value.mask.keys_seen(context_length)
        read = self.value.head_dim + self.value.rotary_dim
        scores = Cost("pattern", 0, 2.0 * self.heads * (read + self.value_dim) * keys, self._kept(read, context_length))
        linears = {label: part.cost(label) for label, part in self.named_children() if isinstance(part, Linear)}
        for group in (("q", "q_down", "kv_down", "k_rotary"), ("k_up", "v_up")):  # one reads x, the other the latent
            there = [label for label in group if label in linears]
            linears |= dict(zip(there, same_input(*(linears[label] for label in there)), strict=True))
        parts = [*linears.values()]
        parts += [self.kv_norm.cost("kv_norm"), scores]
        if self.value.query_latent is not None:
            parts.append(self.q_norm.cost("q_norm"))
        rotated = self.position.cost("position", self.heads + 1)
        if rotated is not None:
            parts.append(rotated)
        if self.value.mask.causal:
            parts.append(Cost("cache", state_bytes=2.0 * (self.value.latent + self.value.rotary_dim)))
        return Cost.sum(name, tuple(parts), f"{self.heads} heads, latent of {self.value.latent}")
