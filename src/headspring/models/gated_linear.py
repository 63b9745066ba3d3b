"""The real-gated linear recurrent unit, RG-LRU, in the block of Hawk and Griffin (arXiv 2402.19427).

    x = conv(x_proj(u))                      r, i = σ(W_r x + b_r), σ(W_i x + b_i)     in blocks on the diagonal
    log a_t = −8 r_t softplus(Λ)             h_t = a_t ⊙ h_{t−1} + √(1 − a_t²) ⊙ i_t ⊙ x_t
    out(gelu(gate(u)) ⊙ h)

One number a channel, no matrix: the smallest state there is. The square root keeps the size of h whatever is forgotten; the
first token of a document enters whole.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import gelu, softplus

from headspring.models.context import Context
from headspring.models.convolution import CausalConvolution
from headspring.models.mixer import Mixer, MixerModule
from headspring.models.part import Cost, Linear, ParameterRule, PartModule, constant, normal, same_input
from headspring.models.scan import linear_scan
from headspring.models.state import LayerState, RecurrentState

SHARPNESS = 8.0  # c in the paper
FORGET = (0.9, 0.999)  # a^c at the start, uniform over the channels


class GatedLinear(Mixer):
    """`hidden` channels (default: width), their gates in `blocks` blocks; a convolution of `conv` taps; `bias` on the
    projections."""

    kind: Literal["gated_linear"] = "gated_linear"
    hidden: int | None = Field(None, gt=0)
    blocks: int = Field(4, gt=0)
    conv: int = Field(4, gt=0)
    bias: bool = True

    def build(self, width: int) -> "GatedLinearModule":
        return GatedLinearModule(self, width)


class GatedLinearModule(MixerModule):
    """x (B, T, D) → (B, T, D). Sites: `x`, `decay`, `input`, `gate`, `h` (B, T, E), where `input` is what a token adds to h."""

    site_names = ("x", "decay", "input", "gate", "h", "out")
    cut = ("decay", "input", "gate")

    def __init__(self, value: GatedLinear, width: int):
        super().__init__()
        self.hidden = value.hidden or width
        if self.hidden % value.blocks:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of blocks ({value.blocks})")
        self.gate = Linear(width, self.hidden, bias=value.bias)
        self.x_proj = Linear(width, self.hidden, bias=value.bias)
        self.conv = CausalConvolution(self.hidden, value.conv)
        self.input_gate = BlockLinear(self.hidden, value.blocks)
        self.recurrence_gate = BlockLinear(self.hidden, value.blocks)
        self.forgetting = nn.Parameter(torch.empty(self.hidden))  # Λ
        self.out = Linear(self.hidden, width, bias=value.bias, std=0.0)

    def rules(self) -> dict[str, ParameterRule]:
        def start(tensor: torch.Tensor, generator: torch.Generator) -> None:
            kept = tensor.uniform_(*FORGET, generator=generator)
            tensor.copy_(torch.log(torch.expm1(-kept.log() / SHARPNESS)))

        return {"forgetting": ParameterRule(start, "vector")}

    def forward(self, x: torch.Tensor, context: Context, state: LayerState | None = None) -> torch.Tensor:
        assert state is None or isinstance(state, RecurrentState)
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        gate = self.site("gate", gelu(self.gate(x), approximate="tanh"))
        x, window = self.conv(self.x_proj(x), context, None if state is None else state["window"])
        x = self.site("x", x)
        log_decay = -SHARPNESS * self.recurrence_gate(x).to(wide) * softplus(self.forgetting.to(wide))
        first = (context.positions == 0).unsqueeze(-1)
        # 1 − a² without cancellation, and away from 0, where the root has no slope
        size = (-torch.expm1(2 * log_decay)).clamp(min=1e-12).sqrt().masked_fill(first, 1.0)
        decay = self.site("decay", log_decay.exp().masked_fill(first, 0.0))
        added = self.site("input", size * (self.input_gate(x) * x).to(wide))
        before = x.new_zeros(len(x), self.hidden, dtype=wide) if state is None else state["h"]
        h = self.site("h", linear_scan(decay, added, before))
        if state is not None:
            state.replace(x.shape[1], window=window, h=h[:, -1].clone())
        return self.site("out", self.out(gate * h.to(dtype)))

    def new_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        h = torch.zeros(batch, self.hidden, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return RecurrentState(window=self.conv.new_window(batch, dtype, device), h=h)

    def cost(self, name: str, context_length: int) -> Cost:
        hidden = self.hidden
        scan = Cost("scan", hidden, 12.0 * hidden, 4.0 * 9 * hidden, 0.0, f"{hidden} channels", (), 4.0 * hidden)
        parts = [*same_input(self.gate.cost("gate"), self.x_proj.cost("x_proj")), self.conv.cost("conv")]
        gate = replace(self.input_gate.cost("input_gate"), activation_bytes=2.0 * hidden)  # reads what the other one reads
        parts += [gate, self.recurrence_gate.cost("recurrence_gate"), scan]
        parts += [Cost("act", 0, 17.0 * hidden, 6.0 * hidden), self.out.cost("out")]
        return Cost.sum(name, tuple(parts), f"{hidden} channels")


class BlockLinear(PartModule):
    """σ(W x + b) with W in `blocks` equal blocks on the diagonal: x (B, T, E) → (B, T, E). `weight` (K, E/K, E/K) maps rows."""

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        self.size = channels // blocks
        self.weight = nn.Parameter(torch.empty(blocks, self.size, self.size))
        self.bias = nn.Parameter(torch.empty(blocks, self.size))

    def rules(self) -> dict[str, ParameterRule]:
        return {
            "weight": ParameterRule(normal(self.size**-0.5), "vector"),
            "bias": ParameterRule(constant(0.0), "vector"),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1).unflatten(-1, (-1, self.size)).transpose(0, 1)  # (K, B·T, E/K)
        made = torch.baddbmm(self.bias.to(x.dtype).unsqueeze(1), rows, self.weight.to(x.dtype))
        return torch.sigmoid(made.transpose(0, 1).reshape(x.shape))

    def cost(self, name: str) -> Cost:
        channels = self.bias.numel()
        parameters = self.weight.numel() + channels
        shape = f"{len(self.bias)} blocks of {self.size}"
        return Cost(name, parameters, 2.0 * self.size * channels, 4.0 * channels, 0.0, shape)
