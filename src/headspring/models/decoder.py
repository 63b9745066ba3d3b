"""The decoder-only language model (arXiv 1706.03762, in the pre-norm form of arXiv 2302.13971 by default).

    tokens (B, T) → embed → blocks → norm → hidden (B, T, D) → head → logits (B, T, V)

`Decoder` is the value: a frozen description that reads like its paper's table and round-trips through JSON. `build()`
makes the module. What the blocks mix tokens with is theirs to say: attention, a recurrent net and a state-space model are
all decoders, and so is any pattern of them. The forward pass is that of `stack`.
"""

import math
from typing import Literal

from headspring.artifacts.errors import UserError
from headspring.models.stack import Stack, StackModule


class Decoder(Stack):
    """A stack that predicts the next token and keeps a state, so that text can be continued with it."""

    kind: Literal["decoder"] = "decoder"

    def module(self) -> "DecoderModule":
        if any(block.cross is not None for block in self.layers):
            raise UserError("this decoder reads an encoder: make it part of an encoder_decoder")
        return DecoderModule(self)

    def build(self, seed: int = 0) -> "DecoderModule":
        module = self.module()
        module.initialise(seed)
        return module


class DecoderModule(StackModule):
    """The module of a `Decoder`."""

    config: Decoder


def hidden_size(width: int, ratio: float = 8 / 3, multiple: int = 32) -> int:
    """The feed-forward width that gives SwiGLU the parameters of a 4× MLP, rounded up to a friendly multiple."""
    return multiple * math.ceil(width * ratio / multiple)
