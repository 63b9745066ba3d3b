"""The gated delta rule (arXiv 2412.06464): a memory of keys and values that is corrected, not only added to.

    q, k, v = silu(conv(q, k, v)),  q and k of length 1
    α = exp(−exp(A_log) softplus(a(x) + bias)),  β = σ(b(x))
    S_t = α_t S_{t−1} + k_t β_t (v_t − α_t S_{t−1}ᵀ k_t)ᵀ        y_t = S_tᵀ q_t / √N        out(norm(y) ⊙ silu(gate(x)))

α forgets everything a little, as Mamba-2 does; β says how far what stands under this key is replaced. Linear attention can
only add, so that a key that is written twice holds the sum; here it holds the last value.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import silu, softplus

from headspring.models import kernels
from headspring.models.chunked import CHUNK, delta, delta_costs
from headspring.models.context import Context
from headspring.models.convolution import CausalConvolution
from headspring.models.mamba import step_bias
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.norm import RMSNorm
from headspring.models.part import Cost, Linear, ParameterRule, same_input
from headspring.models.state import LayerState, RecurrentState


class GatedDelta(Mixer):
    """`heads` heads with keys of `head_dim` (default: width / heads) and values of `value_dim` (default: as many) channels; a
    convolution of `conv` taps over both; `chunk` tokens are worked on at once."""

    kind: Literal["gated_delta"] = "gated_delta"
    heads: int = Field(4, gt=0)
    head_dim: int | None = Field(None, gt=0)
    value_dim: int | None = Field(None, gt=0)
    conv: int = Field(4, gt=0)
    chunk: int = Field(CHUNK, gt=0)

    def build(self, width: int) -> "GatedDeltaModule":
        return GatedDeltaModule(self, width)


class GatedDeltaModule(MixerModule):
    """x (B, T, D) → (B, T, D). Sites: `q`, `k` (B, T, H, N); `v`, `gate`, `heads` (B, T, H, P); `decay` (log α) and `beta`
    (B, T, H); `state` (B, H, N, P), after the last token."""

    site_names = ("q", "k", "v", "decay", "beta", "gate", "heads", "state", "out")
    cut = ("q", "k", "v", "decay", "beta", "gate")

    def __init__(self, value: GatedDelta, width: int):
        super().__init__()
        if value.head_dim is None and width % value.heads:
            raise ValueError(f"width ({width}) must be a multiple of heads ({value.heads}), or head_dim be given")
        self.heads, self.chunk = value.heads, value.chunk
        self.keys = value.head_dim or width // value.heads
        self.values = value.value_dim or self.keys
        across, along = self.heads * self.keys, self.heads * self.values
        self.q, self.k, self.v = Linear(width, across), Linear(width, across), Linear(width, along)
        self.conv = CausalConvolution(2 * across + along, value.conv, bias=False)
        self.a, self.b = Linear(width, self.heads), Linear(width, self.heads)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(self.heads)), nn.Parameter(torch.empty(self.heads))
        self.gate = Linear(width, along)
        self.norm = RMSNorm(epsilon=1e-5).build(self.values)
        self.out = Linear(along, width, std=0.0)

    def rules(self) -> dict[str, ParameterRule]:
        decay = lambda tensor, generator: tensor.uniform_(1.0, 16.0, generator=generator).log_()
        return {"A_log": ParameterRule(decay, "vector"), "dt_bias": ParameterRule(step_bias, "vector")}

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        assert state is None or isinstance(state, RecurrentState)
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        mixed = torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)
        mixed, window = self.conv(mixed, context, None if state is None else state["window"])
        sizes = [self.heads * self.keys] * 2 + [self.heads * self.values]
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in silu(mixed).to(wide).split(sizes, dim=-1))
        q, k, v = self.site("q", unit(q)), self.site("k", unit(k)), self.site("v", v)
        decay = -self.A_log.to(wide).exp() * softplus(self.a(x).to(wide) + self.dt_bias.to(wide))
        decay, beta = self.site("decay", decay), self.site("beta", self.b(x).to(wide).sigmoid())
        memory = self._empty(len(x), wide, x.device) if state is None else state["S"]
        y, memory = delta(q * self.keys**-0.5, k, v, decay, beta, memory, context.starts, self.chunk, dtype)
        y, memory = self.site("heads", y), self.site("state", memory)
        if state is not None:
            state.replace(x.shape[1], window=window, S=memory)
        gate = self.site("gate", self.gate(x).unflatten(-1, (self.heads, -1)))
        y = kernels.silu_multiply(gate, self.norm(y).to(dtype))
        return self.site("out", self.out(y.flatten(-2)))

    def _empty(self, batch: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(batch, self.heads, self.keys, self.values, dtype=dtype, device=device)

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        memory = self._empty(batch, torch.promote_types(dtype, torch.float32), device)
        return RecurrentState(window=self.conv.new_window(batch, dtype, device), S=memory)

    def cost(self, name: str, context_length: int) -> Cost:
        heads, mixed = self.heads, self.heads * (2 * self.keys + self.values)
        shape = f"{heads} heads of {self.keys} × {self.values}"
        scan = delta_costs(heads, self.keys, self.values, context_length, self.chunk)
        gates = Cost("gates", 2 * heads, 6.0 * heads * self.keys + 12.0 * heads, 4.0 * 6 * heads)
        one, along = self.norm.cost("norm"), heads * self.values
        norm = Cost("norm", one.parameters, one.flops * heads, 4.0 * along, 0.0, one.shape)
        linears = {name: part.cost(name) for name, part in self.named_children() if isinstance(part, Linear) and name != "out"}
        read = dict(zip(linears, same_input(*linears.values()), strict=True))
        parts = [read["q"], read["k"], read["v"], self.conv.cost("conv")]
        parts += [Cost("act", 0, 4.0 * mixed, 6.0 * mixed), read["a"], read["b"], gates, *scan, norm]
        parts += [read["gate"], Cost("multiply", 0, 5.0 * along, 4.0 * along), self.out.cost("out")]
        return Cost.sum(name, tuple(parts), shape)


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x| over the last dimension, 0 for 0."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
