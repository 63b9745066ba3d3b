"""A stack of blocks between an embedding and a head: what decoders and encoders have in common.

    tokens (B, T) → embed → blocks → norm → hidden (B, T, D) → head → logits (B, T, V)

`Stack` holds the fields of both values and `StackModule` the forward pass. Whether a token sees what follows it is said by
the masks of the mixers and by nothing else, so that one text serves both; an encoder only has no state.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from headspring.models.block import Block, BlockModule
from headspring.models.context import Context
from headspring.models.embedding import Bias, Embed, EmbedModule, Head, Table
from headspring.models.fused_block import FusedStack
from headspring.models.initialisation import Init, ZeroOutput, count_branches
from headspring.models.mixer import Mixer
from headspring.models.model import Model, ModelModule
from headspring.models.norm import Norm, RMSNorm
from headspring.models.paged import BatchState, Pages
from headspring.models.part import Cost, Linear, ParameterRule, PartModule
from headspring.models.soft_tokens import SoftTokens
from headspring.models.state import Memory, State


class Stack(Model):
    """`vocab` tokens, `width` channels, one value a layer. `context` is the longest sequence the model accepts.

    `tied` uses the embedding matrix as the head. `norm` stands before the head; post-norm stacks have none.
    """

    layers: tuple[Block, ...] = Field(min_length=1)
    norm: Norm | None = RMSNorm()
    tied: bool = True
    embed: Embed = Embed()
    head: Head = Head()
    init: Init = ZeroOutput()

    @model_validator(mode="after")
    def _starts_as_it_is_built(self) -> "Stack":
        self.init.check(self.width, self.layers, self.head)
        return self

    @property
    def causal(self) -> bool:
        return all(mixer.causal for mixer in self.mixers())

    def mixers(self) -> Iterator[Mixer]:
        """What mixes the tokens of each layer."""
        for block in self.layers:
            assert isinstance(block.mixer.f, Mixer)
            yield block.mixer.f


class StackModule(ModelModule):
    """The module of a `Stack`."""

    config: Stack

    def __init__(self, config: Stack, table: Table | None = None):
        """`table`: another stack's embedding, in the place of one of its own."""
        super().__init__(config)
        self.embed = EmbedModule(config.embed, config.vocab, config.width, config.context, table)
        self.layers = nn.ModuleList(block.build(config.width) for block in config.layers)
        self.norm = config.norm.build(config.width) if config.norm else None
        self.head_value = config.head or Head()
        self.head: Table | Bias | None = None
        inner = config.embed.inner
        self.narrow = Linear(config.width, inner) if inner and config.head else None
        if not config.tied:
            self.head = Table(config.vocab, inner or config.width, "head", bias=self.head_value.bias)
        elif self.head_value.bias:
            self.head = Bias(config.vocab)
        self.transform = self.head_value.transform.build(config.width) if self.head_value.transform else None
        self.complete()

    def adjusted(self, name: str, shape: Sequence[int], rule: ParameterRule) -> ParameterRule:
        return self.config.init.rule(name, shape, rule, self.config.width, count_branches(self.config.layers))

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
        state: State | BatchState | None = None,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
        memory: Memory | None = None,
        soft: SoftTokens | None = None,
    ) -> torch.Tensor:
        """As every model's; `types` (B, T) int64 where the embedding knows types of tokens (default: all of type 0);
        `memory` is what the blocks with `cross` read; `soft` are vectors for placeholders among the tokens. With a `BatchState`
        the row (1, N) holds the tokens of several sequences."""
        time = tokens.shape[1]
        if isinstance(state, BatchState):
            context = state.ragged.context()
            return self._run(tokens, context, state.layers, types, None if state.soft is None else state.soft.place)
        if state is not None:
            if types is not None:
                raise ValueError("types cannot be used with a state, which does not remember them")
            padding = self._check_state(state, time, segments, padding)
            if state.length > state.pending and self._outgrown(state, time):
                state.restart(self.new_state(state.batch, state.capacity).layers)
            past = state.length - state.pending
            tokens = state.read(tokens)
        else:
            past = 0
        if past + tokens.shape[1] > self.config.context:
            raise ValueError(f"{past + tokens.shape[1]} tokens are more than the model's context of {self.config.context}")
        context = self._context(tokens.shape[1], past, segments, padding, memory)
        place = None if soft is None else lambda x: soft.place(x, tokens if state is None else state.tokens, padding)
        return self._run(tokens, context, None if state is None else state.layers, types, place)[:, -time:]

    def _run(
        self,
        tokens: torch.Tensor,
        context: Context,
        layers: Sequence[Any] | None,
        types: torch.Tensor | None = None,
        place: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states of all tokens; `layers` are the memories of the blocks, `place` puts vectors among the embeddings."""
        x = self.embed(tokens, self.compute_dtype, context.positions, types)
        x = self.site("embed", x if place is None else place(x))
        fused, done = FusedStack.of(self.layers, layers or (), x, context), 0
        for index, block in enumerate(self.blocks()):
            if index < done:
                continue
            if fused is not None and (done := fused.reach(index)) > index:
                x = fused.run(x, context, index, done)
            elif self.checkpoint_activations and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, context, use_reentrant=False)
            else:
                if context.ragged is not None:
                    block.prepare(context)  # only the blocks that are not fused need it
                x = block(x, context, None if layers is None else layers[index])
        return self.site("final", x if self.norm is None else self.norm(x))

    def _outgrown(self, state: State, time: int) -> bool:
        """Whether some layer reads sequences that are `time` tokens longer in another way than what the state holds."""
        mixers = [block.mixes for block in self.blocks() if block.mixes.by_length]
        if not mixers:
            return False
        pads = {0} if state.padding is None else set(state.padding.tolist())
        lengths = [(state.reach - pad, state.length + time - pad) for pad in pads]
        return any(mixer.regime(before) != mixer.regime(after) for mixer in mixers for before, after in lengths)

    def _context(
        self,
        time: int,
        past: int,
        segments: torch.Tensor | None,
        padding: torch.Tensor | None,
        memory: Memory | None = None,
    ) -> Context:
        """What the blocks share, prepared."""
        read = () if memory is None else (memory.hidden, memory.mask)
        context = Context.of(time, past, segments, padding, self.device, *read)
        self._prepare(context)
        return context

    def _prepare(self, context: Context) -> None:
        for block in self.blocks():
            block.prepare(context)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.head.weight if isinstance(self.head, Table) else self.embed.rows

    @property
    def output_bias(self) -> torch.Tensor | None:
        return None if self.head is None else self.head.bias

    @property
    def softcap(self) -> float | None:
        return self.head_value.softcap

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.narrow is not None:
            hidden = self.narrow(hidden)
        return hidden if self.head_value.scale is None else hidden * self.head_value.scale

    def new_state(self, batch: int, capacity: int | None = None) -> State:
        capacity = min(capacity or self.config.context, self.config.context)
        layers = [block.new_state(batch, capacity, self.compute_dtype, self.device) for block in self.blocks()]
        return State(layers, batch, capacity, self.device)

    @property
    def side_by_side(self) -> bool:
        """Whether it reads a row of several sequences, and pages or states of their own remember them."""
        blocks = list(self.blocks())
        return self.config.causal and not any(block.mixes.by_length for block in blocks)

    def new_pages(self, count: int, dtype: torch.dtype | None = None) -> list[Pages | None]:
        """A pool of `count` pages for each layer that keeps keys and values in them; None for the others. `dtype`: int8, or
        by default that of the activations."""
        return [block.mixes.new_pages(count, self.compute_dtype, self.device, dtype) for block in self.blocks()]

    # ---- what it costs

    def ledger(self, context_length: int | None = None) -> Cost:
        length = context_length or self.config.context
        vocab, width = self.config.vocab, self.config.embed.inner or self.config.width
        parts = [self.embed.cost("embed")]
        parts += [block.cost(f"layers.{index}", length) for index, block in enumerate(self.blocks())]
        if self.norm is not None:
            parts.append(self.norm.cost("norm"))
        if self.transform is not None:
            parts.append(self.transform.cost("transform"))
        if self.narrow is not None:
            parts.append(self.narrow.cost("narrow"))
        if self.config.head is not None:
            parameters = 0 if self.head is None else sum(parameter.numel() for parameter in self.head.parameters())
            shape = "tied" if self.config.tied else f"{width} → {vocab}"
            parts.append(Cost("head", parameters, 2.0 * vocab * width, 2.0 * width, 0.0, shape))
        return Cost.sum(self.config.kind, tuple(parts))
