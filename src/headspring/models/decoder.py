"""The decoder-only language model (arXiv 1706.03762, in the pre-norm form of arXiv 2302.13971 by default).

    tokens (B, T) → embed → blocks → norm → hidden (B, T, D) → head → logits (B, T, V)

`Decoder` is the value: a frozen description that reads like its paper's table and round-trips through JSON. `build()`
makes the module. What the blocks mix tokens with is theirs to say: attention, a recurrent net and a state-space model are
all decoders, and so is any pattern of them.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from headspring.models.block import Block, BlockModule
from headspring.models.context import Context
from headspring.models.embedding import Bias, Embed, EmbedModule, Head, Table
from headspring.models.model import Model, ModelModule
from headspring.models.norm import Norm, RMSNorm
from headspring.models.part import Cost, PartModule
from headspring.models.state import State


class Decoder(Model):
    """`vocab` tokens, `width` channels, one value a layer. `context` is the longest sequence the model accepts.

    `tied` uses the embedding matrix as the head. `norm` stands before the head; post-norm stacks have none.
    """

    kind: Literal["decoder"] = "decoder"
    layers: tuple[Block, ...] = Field(min_length=1)
    norm: Norm | None = RMSNorm()
    tied: bool = True
    embed: Embed = Embed()
    head: Head = Head()

    def module(self) -> "DecoderModule":
        return DecoderModule(self)

    def build(self, seed: int = 0) -> "DecoderModule":
        module = self.module()
        module.initialise(seed)
        return module


class DecoderModule(ModelModule):
    """The module of a `Decoder`."""

    config: Decoder

    def __init__(self, config: Decoder):
        super().__init__(config)
        self.embed = EmbedModule(config.embed, config.vocab, config.width)
        self.layers = nn.ModuleList(block.build(config.width) for block in config.layers)
        self.norm = config.norm.build(config.width) if config.norm else None
        self.head: Table | Bias | None = None
        if not config.tied:
            self.head = Table(config.vocab, config.width, "head", bias=config.head.bias)
        elif config.head.bias:
            self.head = Bias(config.vocab)
        self.complete()

    def owners(self) -> Iterator[tuple[str, PartModule, tuple[str, ...]]]:
        yield "", self, ("embed", "final")
        for index, block in enumerate(self.blocks()):
            yield from block.owners(f"layers.{index}")

    def blocks(self) -> Iterable[BlockModule]:
        for block in self.layers:
            assert isinstance(block, BlockModule)
            yield block

    # ---- the forward pass

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        time = tokens.shape[1]
        if state is not None:
            padding = self._check_state(state, time, segments, padding)
            past = state.length - state.pending
            tokens = state.read(tokens)
        else:
            past = 0
        if past + tokens.shape[1] > self.config.context:
            raise ValueError(f"{past + tokens.shape[1]} tokens are more than the model's context of {self.config.context}")
        context = self._context(tokens.shape[1], past, segments, padding)
        x = self.site("embed", self.embed(tokens, self.compute_dtype))
        for index, block in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context, None if state is None else state.layers[index])
        x = self.site("final", x if self.norm is None else self.norm(x))
        return x[:, -time:]

    def _check_state(
        self, state: State, time: int, segments: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The padding of the state's rows, noted with its first tokens."""
        if segments is not None:
            raise ValueError("segments cannot be used with a state: documents would see each other's cache")
        if state.length + time > self.config.context:
            raise ValueError(f"{state.length + time} tokens are more than the model's context of {self.config.context}")
        if padding is not None:
            if state.length:
                raise ValueError("padding is given with the first tokens of a state only")
            state.padding = padding
        return state.padding

    def _context(self, time: int, past: int, segments: torch.Tensor | None, padding: torch.Tensor | None) -> Context:
        """What the blocks share, prepared."""
        context = Context.of(time, past, segments, padding, self.device)
        for block in self.blocks():
            block.prepare(context)
        return context

    @property
    def output_weight(self) -> torch.Tensor:
        return self.head.weight if isinstance(self.head, Table) else self.embed.weight

    @property
    def output_bias(self) -> torch.Tensor | None:
        return None if self.head is None else self.head.bias

    @property
    def softcap(self) -> float | None:
        return self.config.head.softcap

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        scale = self.config.head.scale
        return hidden if scale is None else hidden * scale

    def new_state(self, batch: int, capacity: int | None = None) -> State:
        capacity = min(capacity or self.config.context, self.config.context)
        layers = [block.new_state(batch, capacity, self.compute_dtype, self.device) for block in self.blocks()]
        return State(layers, batch, capacity, self.device)

    # ---- what it costs

    def ledger(self, context_length: int | None = None) -> Cost:
        length = context_length or self.config.context
        vocab, width = self.config.vocab, self.config.width
        parts = [self.embed.cost("embed")]
        parts += [block.cost(f"layers.{index}", length) for index, block in enumerate(self.blocks())]
        if self.norm is not None:
            parts.append(self.norm.cost("norm"))
        parameters = 0 if self.head is None else sum(parameter.numel() for parameter in self.head.parameters())
        shape = "tied" if self.config.tied else f"{width} → {vocab}"
        parts.append(Cost("head", parameters, 2.0 * vocab * width, 2.0 * width, 0.0, shape))
        return Cost.sum("decoder", tuple(parts))


def hidden_size(width: int, ratio: float = 8 / 3, multiple: int = 32) -> int:
    """The feed-forward width that gives SwiGLU the parameters of a 4× MLP, rounded up to a friendly multiple."""
    return multiple * math.ceil(width * ratio / multiple)
