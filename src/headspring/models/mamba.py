"""Mamba, the selective state space (arXiv 2312.00752).

    x, z = in_proj(u);  x ← silu(conv(x));  δ, B, C = x_proj(x);  Δ = softplus(dt_proj(δ) + bias)
    h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t x_t) B_tᵀ      y_t = h_t C_t + D ⊙ x_t      out(y ⊙ silu(z))

Every channel keeps N numbers, and the input decides how much of them is kept (Δ, and with it the decay), what is written (B)
and what is read (C). Names are the paper's. What it gives up against attention: nothing can be looked up that the state,
which does not grow, has let go.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import linear, silu, softplus

from headspring.models import kernels
from headspring.models.context import Context
from headspring.models.convolution import CausalConvolution
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.part import Cost, Linear, ParameterRule, constant
from headspring.models.scan import BLOCK, selective_scan
from headspring.models.state import LayerState, RecurrentState

STEPS = (1e-3, 1e-1)  # Δ of the first tokens, log-uniform over the channels


class Mamba(Mixer):
    """`expand` · width channels with `state` numbers each, a convolution of `conv` taps; Δ comes through a bottleneck of `rank`
    (default: width / 16, rounded up). `bias` on the projections in and out, `conv_bias` on the convolution."""

    kind: Literal["mamba"] = "mamba"
    state: int = Field(16, gt=0)
    expand: int = Field(2, gt=0)
    conv: int = Field(4, gt=0)
    rank: int | None = Field(None, gt=0)
    bias: bool = False
    conv_bias: bool = True

    def build(self, width: int) -> "MambaModule":
        return MambaModule(self, width)


class MambaModule(MixerModule):
    """x (B, T, D) → (B, T, D). Sites: `x`, `dt`, `gate`, `y` (B, T, E); `B`, `C` (B, T, N); `state` (B, E, N), after the
    last token."""

    site_names = ("x", "dt", "B", "C", "gate", "y", "state", "out")
    cut = ("x", "dt", "B", "C", "gate")
    reads_weights = ("dt_proj",)  # in a wider dtype

    def __init__(self, value: Mamba, width: int):
        super().__init__()
        self.inner, self.states = value.expand * width, value.state
        self.rank = value.rank or math.ceil(width / 16)
        self.in_proj = Linear(width, 2 * self.inner, bias=value.bias)
        self.conv = CausalConvolution(self.inner, value.conv, value.conv_bias)
        self.x_proj = Linear(self.inner, self.rank + 2 * self.states)
        self.dt_proj = StepSize(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, self.states))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out = Linear(self.inner, width, bias=value.bias, std=0.0)

    def rules(self) -> dict[str, ParameterRule]:
        """A starts as −1, −2, … −N in every channel (S4D-real)."""
        real = lambda tensor, generator: tensor.copy_(torch.arange(1.0, self.states + 1).log())
        return {"A_log": ParameterRule(real, "vector"), "D": ParameterRule(constant(1.0), "vector")}

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        assert state is None or isinstance(state, RecurrentState)
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, window = self.conv(x, context, None if state is None else state["window"])
        x, z = self.site("x", silu(x)), self.site("gate", z)
        rank, b, c = self.x_proj(x).split([self.rank, self.states, self.states], dim=-1)
        step, b, c = self.site("dt", self.dt_proj(rank)), self.site("B", b), self.site("C", c)
        h = None if state is None else state["h"]
        a, b, c = -self.A_log.to(wide).exp(), b.to(wide), c.to(wide)
        y, h = selective_scan(x.to(wide), step, a, b, c, h, context.starts, dtype)
        y = self.site("y", torch.addcmul(y, self.D.to(wide), x.to(wide)).to(dtype))
        h = self.site("state", h)
        if state is not None:
            state.replace(x.shape[1], window=window, h=h)
        return self.site("out", self.out(kernels.silu_multiply(z, y)))

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        wide = torch.promote_types(dtype, torch.float32)
        h = torch.zeros(batch, self.inner, self.states, dtype=wide, device=device)
        return RecurrentState(window=self.conv.new_window(batch, dtype, device), h=h)

    def cost(self, name: str, context_length: int) -> Cost:
        """The scan: exp, two products in, a product and a sum in the recurrence, a product and a sum out, for each of E · N
        numbers; the softplus of Δ; it keeps its inputs in float32, and one state for each block of tokens."""
        size = self.inner * self.states
        parameters = self.A_log.numel() + self.D.numel()
        shape = f"{self.inner} channels of {self.states}"
        kept = 4.0 * (4 * self.inner + 2 * self.states + size / BLOCK)
        scan = Cost("scan", parameters, 7.0 * size + 7.0 * self.inner, kept, 0.0, shape, (), 4.0 * size)
        gate = Cost("multiply", 0, 5.0 * self.inner, 4.0 * self.inner)
        parts = [self.in_proj.cost("in_proj"), self.conv.cost("conv"), Cost("act", 0, 4.0 * self.inner, 2.0 * self.inner)]
        made = 2.0 * self.x_proj.weight.shape[0]  # δ, of which Δ is made, lies beside B and C
        step = replace(self.dt_proj.cost("dt_proj"), activation_bytes=made)
        parts += [self.x_proj.cost("x_proj"), step, scan, gate, self.out.cost("out")]
        return Cost.sum(name, tuple(parts), shape)


class StepSize(Linear):
    """Δ = softplus(W δ + bias), positive, in float32 or wider."""

    def __init__(self, rank: int, channels: int):
        super().__init__(rank, channels, bias=True)

    def rules(self) -> dict[str, ParameterRule]:
        uniform = lambda tensor, generator: tensor.uniform_(-self.std, self.std, generator=generator)
        return {"weight": ParameterRule(uniform, "matrix"), "bias": ParameterRule(step_bias, "vector")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.bias is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        return softplus(linear(x, self.weight.to(x.dtype)).to(wide) + self.bias.to(wide))


def step_bias(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fill with the b for which softplus(b) is log-uniform in `STEPS`."""
    low, high = map(math.log, STEPS)
    step = tensor.uniform_(low, high, generator=generator).exp_()
    tensor.copy_(step + torch.log(-torch.expm1(-step)))
