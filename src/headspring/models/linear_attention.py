"""Linear attention: softmax(q kᵀ) replaced by a product of features, φ(q) φ(k)ᵀ, so that keys and values fold into one matrix.

    S_t = S_{t−1} + φ(k_t) [v_t, 1]ᵀ          [y, n]_t = S_tᵀ φ(q_t)          out(y / n)

Features are a family of values: `EluPlusOne` (arXiv 2006.16236) and `Favor`, the positive orthogonal random features of the
Performer (arXiv 2009.14794), whose products are exp(q·k / √C) in expectation. What it gives up: features are few, so that keys
that differ a little cannot be told apart, and nothing is ever forgotten.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import elu, pad

from headspring.artifacts.value import Variant
from headspring.models.chunked import CHUNK, decayed, decayed_costs
from headspring.models.context import Context
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.part import Cost, Linear, same_input
from headspring.models.state import LayerState, RecurrentState


class Features(Variant):
    """The value of a feature map. A module computes it: `queries(q)` and `keys(k, …)`."""

    def build(self, channels: int) -> "FeaturesModule":
        raise NotImplementedError


class FeaturesModule(nn.Module):
    """Features of (B, T, H, C): (B, T, H, `count`), positive. `scaled` where keys are held relative to a running peak."""

    count: int
    scaled = False

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """φ(q), up to a factor for each query, which the normaliser takes out."""
        raise NotImplementedError

    def keys(
        self, k: torch.Tensor, peak: torch.Tensor | None, starts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """φ(k); what the memory is multiplied by before each token, as logarithm (B, T, H); the peak (B, H) afterwards."""
        raise NotImplementedError

    def flops(self, channels: int) -> tuple[float, float]:
        """FLOPs of one query's or key's features: in products of matrices, and element by element."""
        raise NotImplementedError


class EluPlusOne(Features):
    """φ(x) = elu(x) + 1."""

    kind: Literal["elu_plus_one"] = "elu_plus_one"

    def build(self, channels: int) -> "EluPlusOneModule":
        return EluPlusOneModule(channels)


class EluPlusOneModule(FeaturesModule):
    def __init__(self, channels: int):
        super().__init__()
        self.count = channels

    def queries(self, q):
        return elu(q) + 1

    def keys(self, k, peak, starts):
        return elu(k) + 1, None, None

    def flops(self, channels):
        return 0.0, 2.0 * channels


class Favor(Features):
    """φ(x) = exp(ω x − |x|²/2), with x divided by the fourth root of its size and `count` random directions ω, orthogonal in
    groups of C and drawn by `seed` (another seed is another draw). Default count: C ln C, rounded up."""

    kind: Literal["favor"] = "favor"
    count: int | None = Field(None, gt=0)
    seed: int = 0

    def build(self, channels: int) -> "FavorModule":
        return FavorModule(self, channels)


class FavorModule(FeaturesModule):
    """Exponents of keys are taken relative to the largest one *so far* in the same head and document. When the peak rises, what
    the memory holds is multiplied down: a decay as any other. The usual maximum over all keys would let the future in."""

    scaled = True

    def __init__(self, value: Favor, channels: int):
        super().__init__()
        self.count = value.count or max(1, math.ceil(channels * math.log(channels)))
        self.register_buffer("directions", orthogonal_directions(self.count, channels, value.seed), persistent=False)
        self.directions: torch.Tensor

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ω x, and x scaled."""
        x = x * x.shape[-1] ** -0.25
        return x @ self.directions.to(x.dtype).mT, x

    def queries(self, q):
        exponent, _ = self._project(q)
        return (exponent - exponent.detach().amax(-1, keepdim=True)).exp()

    def keys(self, k, peak, starts):
        exponent, k = self._project(k)
        exponent = exponent - k.square().sum(-1, keepdim=True) / 2
        with torch.no_grad():
            peaks = running_max(exponent.amax(-1), peak, starts)  # (B, T, H)
            before = torch.cat([peak.unsqueeze(1), peaks[:, :-1]], dim=1)
            new = before.isinf() if starts is None else before.isinf() | starts.unsqueeze(-1)
            rise = (before - peaks).masked_fill(new, 0.0)
        return (exponent - peaks.unsqueeze(-1)).exp(), rise, peaks[:, -1].clone()

    def flops(self, channels):
        return 2.0 * channels * self.count, 3.0 * self.count + 3.0 * channels


def orthogonal_directions(count: int, channels: int, seed: int) -> torch.Tensor:
    """(count, C) float32 Gaussian rows, orthogonal in groups of C, as long as independent ones would be."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-count // channels)
    frames = torch.linalg.qr(torch.randn(groups, channels, channels, generator=generator)).Q.flatten(0, 1)
    lengths = torch.randn(groups * channels, channels, generator=generator).norm(dim=-1, keepdim=True)
    return (frames * lengths)[:count]


def running_max(x: torch.Tensor, before: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """The largest of x (B, T, H) so far, in each document; `before` (B, H) counts as far as memory reaches back."""
    x = torch.cat([before.unsqueeze(1), x], dim=1)
    if starts is None:
        return x.cummax(dim=1).values[:, 1:]
    document = pad(starts.cumsum(1), (1, 0)).unsqueeze(-1)
    reach = 1
    while reach < x.shape[1]:  # each step doubles how far back a token has looked
        same = document[:, reach:] == document[:, :-reach]
        x = torch.cat([x[:, :reach], torch.where(same, torch.maximum(x[:, reach:], x[:, :-reach]), x[:, reach:])], dim=1)
        reach *= 2
    return x[:, 1:]


class LinearAttention(Mixer):
    """`heads` heads of `head_dim` (default: width / heads) channels; `features` of queries and keys; `bias` on q, k, v."""

    kind: Literal["linear_attention"] = "linear_attention"
    heads: int = Field(4, gt=0)
    head_dim: int | None = Field(None, gt=0)
    features: Features = EluPlusOne()
    bias: bool = False
    chunk: int = Field(CHUNK, gt=0)

    def build(self, width: int) -> "LinearAttentionModule":
        return LinearAttentionModule(self, width)


class LinearAttentionModule(MixerModule):
    """x (B, T, D) → (B, T, D). Sites: `q`, `k`, `v`, `heads` (B, T, H, C); `state` (B, H, F, C + 1), after the last token."""

    site_names = ("q", "k", "v", "heads", "state", "out")

    def __init__(self, value: LinearAttention, width: int):
        super().__init__()
        if value.head_dim is None and width % value.heads:
            raise ValueError(f"width ({width}) must be a multiple of heads ({value.heads}), or head_dim be given")
        self.value, self.heads, self.channels = value, value.heads, value.head_dim or width // value.heads
        self.q, self.k, self.v = (Linear(width, self.heads * self.channels, bias=value.bias) for _ in range(3))
        self.features = value.features.build(self.channels)
        self.out = Linear(self.heads * self.channels, width, std=0.0)

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        assert state is None or isinstance(state, RecurrentState)
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        parts = (("q", self.q), ("k", self.k), ("v", self.v))
        q, k, v = (self.site(name, part(x).unflatten(-1, (self.heads, -1)).to(wide)) for name, part in parts)
        held = self._empty(len(x), wide, x.device) if state is None else state.tensors
        keys, rise, peak = self.features.keys(k, held.get("peak"), context.starts)
        y, memory = decayed(
            self.features.queries(q), keys, pad(v, (0, 1), value=1.0), rise, held["S"], context.starts, self.value.chunk
        )
        y = y[..., :-1] / y[..., -1:].clamp(min=torch.finfo(wide).tiny)
        y, memory = self.site("heads", y), self.site("state", memory)
        if state is not None:
            state.replace(x.shape[1], S=memory, **({} if peak is None else {"peak": peak}))
        return self.site("out", self.out(y.flatten(-2).to(dtype)))

    def _empty(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        empty = {"S": torch.zeros(batch, self.heads, self.features.count, self.channels + 1, dtype=dtype, device=device)}
        if self.features.scaled:
            empty["peak"] = torch.full((batch, self.heads), -torch.inf, dtype=dtype, device=device)
        return empty

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        return RecurrentState(**self._empty(batch, torch.promote_types(dtype, torch.float32), device))

    def cost(self, name: str, context_length: int) -> Cost:
        heads, count, size = self.heads, self.features.count, self.channels + 1
        scan = decayed_costs(heads, heads, count, size, context_length, self.value.chunk, decays=False)  # none that learns
        along, peak = heads * self.channels, 4.0 * heads * self.features.scaled
        products, rest = (2.0 * heads * flops for flops in self.features.flops(self.channels))
        kept = (4.0 if self.features.scaled else 8.0) * along
        features = Cost("features", 0, products, kept, 0.0, f"{self.channels} → {count}", (), peak)
        positive = Cost("positive", 0, rest, 8.0 * heads * count * self.features.scaled)
        parts = [*same_input(self.q.cost("q"), self.k.cost("k"), self.v.cost("v")), features, positive, *scan]
        parts.append(Cost("divide", 0, along, 4.0 * heads * (size + 1)))
        return Cost.sum(name, (*parts, self.out.cost("out")), f"{heads} heads of {count} × {size}")
