"""A short causal convolution over time, each channel with a kernel of its own: a recurrent mixer's view of the last tokens.

    y_t = Σ_i w_i ⊙ x_{t−i}   for i = 0 … W−1, within a document

Its state is the *window*, the W − 1 inputs before the next token. Written as W shifted products and not as
`torch.nn.functional.conv1d`: at these widths that operator's backward pass on a CPU takes a hundred times as long, and a tap
can be cut where it would reach into another document.
"""

import torch
from torch import nn

from headspring.models.context import Context
from headspring.models.kernels import installed
from headspring.models.part import Cost, ParameterRule, PartModule, constant


class CausalConvolution(PartModule):
    """x (B, T, E) → (B, T, E), in the dtype of x. `weight` (E, 1, W) has the layout of torch's Conv1d: the last tap is now."""

    def __init__(self, channels: int, width: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.width = width

    def rules(self) -> dict[str, ParameterRule]:
        bound = self.width**-0.5
        uniform = lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)
        rules = {"weight": ParameterRule(uniform, "vector")}
        if self.bias is not None:
            rules["bias"] = ParameterRule(constant(0.0), "vector")
        return rules

    def new_window(self, batch: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(B, W − 1, E): nothing has been read."""
        return torch.zeros(batch, self.width - 1, self.weight.shape[0], dtype=dtype, device=device)

    def forward(
        self, x: torch.Tensor, context: Context, window: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y, and the window that the next tokens find."""
        batch, time, _ = x.shape
        if window is None and installed.applies(x, x.dtype, context.starts) and time >= self.width:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            made = installed.convolution(x, self.weight.squeeze(1).to(x.dtype), bias)
            if made is not None:
                return made, x[:, 1 + time - self.width :].clone()
        taps = self.weight.squeeze(1).to(x.dtype).mT.flip(0)  # (W, E), now first
        window = self.new_window(batch, x.dtype, x.device) if window is None else window.to(x.dtype)
        whole = torch.cat([window, x], dim=1)
        y = x * taps[0] if self.bias is None else torch.addcmul(self.bias.to(x.dtype), x, taps[0])
        for i in range(1, self.width):
            past = whole[:, self.width - 1 - i : self.width - 1 - i + time]
            if context.starts is not None:
                past = torch.where((context.positions >= i).unsqueeze(-1), past, 0.0)
            y = torch.addcmul(y, past, taps[i])
        return y, whole[:, time:].clone()

    def cost(self, name: str) -> Cost:
        """Two bytes an element of the window, as of any activation."""
        channels, window = self.weight.shape[0], self.width - 1
        parameters = self.weight.numel() + (0 if self.bias is None else channels)
        shape = f"{self.width} taps, {channels} channels"
        return Cost(name, parameters, 2.0 * self.width * channels, 4.0 * channels, 0.0, shape, (), 2.0 * window * channels)
