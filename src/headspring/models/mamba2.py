"""Mamba-2: state-space duality (arXiv 2405.21060).

    z, [x, B, C], δ = in_proj(u);  [x, B, C] ← silu(conv([x, B, C]));  Δ = softplus(δ + bias)
    S_t = exp(Δ_t A) S_{t−1} + B_t (Δ_t x_t)ᵀ      y_t = S_tᵀ C_t + D x_t      out(norm(y ⊙ silu(z)))

Where Mamba has a decay for each of its numbers, a head of Mamba-2 has one for all of them. That is the price of the dual form:
inside a chunk it is attention with C as queries, B as keys and a decaying mask, and the work is matrix products (`chunked`).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import silu, softplus

from headspring.models import kernels
from headspring.models.chunked import CHUNK, decayed, decayed_costs
from headspring.models.context import Context
from headspring.models.convolution import CausalConvolution
from headspring.models.mamba import step_bias
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.part import Cost, Linear, ParameterRule, PartModule, constant
from headspring.models.state import LayerState, RecurrentState


class Mamba2(Mixer):
    """`expand` · width channels in heads of `head_dim`, each with `state` · head_dim numbers; `groups` of heads share B and C.

    `conv` taps; `bias` on the projections in and out, `conv_bias` on the convolution; `epsilon` of the gated norm; `chunk`
    tokens are worked on at once, which changes rounding and speed.
    """

    kind: Literal["mamba2"] = "mamba2"
    state: int = Field(64, gt=0)
    head_dim: int = Field(64, gt=0)
    expand: int = Field(2, gt=0)
    groups: int = Field(1, gt=0)
    conv: int = Field(4, gt=0)
    bias: bool = False
    conv_bias: bool = True
    epsilon: float = Field(1e-5, gt=0)
    chunk: int = Field(CHUNK, gt=0)

    def build(self, width: int) -> "Mamba2Module":
        return Mamba2Module(self, width)


class Mamba2Module(MixerModule):
    """x (B, T, D) → (B, T, D). Sites: `x`, `y` (B, T, H, P); `dt` (B, T, H); `B`, `C` (B, T, G, N); `gate` (B, T, E); `state`
    (B, H, N, P), after the last token."""

    site_names = ("x", "dt", "B", "C", "gate", "y", "state", "out")
    cut = ("x", "dt", "B", "C", "gate")

    def __init__(self, value: Mamba2, width: int):
        super().__init__()
        inner = value.expand * width
        self.value, self.heads = value, inner // value.head_dim
        if inner % value.head_dim:
            raise ValueError(f"expand · width ({inner}) must be a multiple of head_dim ({value.head_dim})")
        if self.heads % value.groups:
            raise ValueError(f"expand · width / head_dim ({self.heads}) must be a multiple of groups ({value.groups})")
        self.inner, self.shared = inner, value.groups * value.state
        self.in_proj = Linear(width, 2 * inner + 2 * self.shared + self.heads, bias=value.bias)
        self.conv = CausalConvolution(inner + 2 * self.shared, value.conv, value.conv_bias)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.norm = GatedNorm(inner, value.groups, value.epsilon)
        self.out = Linear(inner, width, bias=value.bias, std=0.0)

    def rules(self) -> dict[str, ParameterRule]:
        """−A starts uniform in [1, 16]."""
        decay = lambda tensor, generator: tensor.uniform_(1.0, 16.0, generator=generator).log_()
        return {
            "A_log": ParameterRule(decay, "vector"),
            "D": ParameterRule(constant(1.0), "vector"),
            "dt_bias": ParameterRule(step_bias, "vector"),
        }

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        assert state is None or isinstance(state, RecurrentState)
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        z, mixed, step = self.in_proj(x).split([self.inner, self.inner + 2 * self.shared, self.heads], dim=-1)
        mixed, window = self.conv(mixed, context, None if state is None else state["window"])
        x, b, c = silu(mixed).to(wide).split([self.inner, self.shared, self.shared], dim=-1)
        x = self.site("x", x.unflatten(-1, (self.heads, -1)))
        b, c = (self.site(name, s.unflatten(-1, (self.value.groups, -1))) for name, s in (("B", b), ("C", c)))
        step = self.site("dt", softplus(step.to(wide) + self.dt_bias.to(wide)))
        z = self.site("gate", z)
        memory = self._empty(len(x), wide, x.device) if state is None else state["S"]
        log_decay = step * -self.A_log.to(wide).exp()
        y, memory = decayed(c, b, x * step.unsqueeze(-1), log_decay, memory, context.starts, self.value.chunk, dtype)
        y = self.site("y", torch.addcmul(y, self.D.to(wide).unsqueeze(-1), x))
        memory = self.site("state", memory)
        if state is not None:
            state.replace(x.shape[1], window=window, S=memory)
        return self.site("out", self.out(self.norm(y.flatten(-2), z).to(dtype)))

    def _empty(self, batch: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(batch, self.heads, self.value.state, self.value.head_dim, dtype=dtype, device=device)

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        memory = self._empty(batch, torch.promote_types(dtype, torch.float32), device)
        return RecurrentState(window=self.conv.new_window(batch, dtype, device), S=memory)

    def cost(self, name: str, context_length: int) -> Cost:
        value, mixed = self.value, self.inner + 2 * self.shared
        scan = decayed_costs(self.heads, value.groups, value.state, value.head_dim, context_length, value.chunk)
        kept = 4.0 * (mixed + 2 * self.heads) + 2.0 * (self.inner + self.heads)  # in float32; what lay beside it as it was made
        step = Cost("step", 3 * self.heads, 3.0 * self.inner + 7.0 * self.heads, kept)
        parts = [self.in_proj.cost("in_proj"), self.conv.cost("conv"), Cost("act", 0, 4.0 * mixed, 2.0 * mixed), step, *scan]
        shape = f"{self.heads} heads of {value.state} × {value.head_dim}, {value.groups} groups"
        return Cost.sum(name, (*parts, self.norm.cost("norm"), self.out.cost("out")), shape)


class GatedNorm(PartModule):
    """RMSNorm of y ⊙ silu(z) in each of `groups` parts of the channels, in float32 or wider: y (B, T, E), z (B, T, E)."""

    def __init__(self, channels: int, groups: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.groups, self.epsilon = groups, epsilon

    def rules(self) -> dict[str, ParameterRule]:
        return {"weight": ParameterRule(constant(1.0), "vector")}

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y = kernels.silu_multiply(z.to(y.dtype), y)
        if self.groups == 1:
            return kernels.rms_norm(y, self.weight, self.epsilon)
        parts, gain = y.unflatten(-1, (self.groups, -1)), self.weight.unflatten(-1, (self.groups, -1))
        return kernels.rms_norm_plain(parts, gain, self.epsilon).flatten(-2)

    def cost(self, name: str) -> Cost:
        width = self.weight.numel()
        return Cost(name, width, 9.0 * width, 4.0 * width * (3 if self.groups == 1 else 4), 0.0, f"{width}")
