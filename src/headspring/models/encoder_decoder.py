"""The encoder–decoder: one stack reads a source in both directions, another writes and looks at what was read.

    source (B, M) → encoder → memory (B, M, D)
                                 ↓ cross-attention in every block
    tokens (B, T) ──────────→ decoder → hidden (B, T, D) → head → logits (B, T, V) of the next token

The original Transformer (arXiv 1706.03762), T5 (1910.10683) and BART (1910.13461). As a function of `tokens` it is a
decoder: causal, with a state, trained on the next token. The source is a second argument, given once.

Why not a decoder that reads source and answer as one text: the encoder sees the source both ways, and its part of the
state is as large as the source and never grows. What it gives up: the source ends before the answer begins, so that a
conversation has to be read again at every turn, and half of the parameters never see an answer's token.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.models.block import BlockModule
from headspring.models.decoder import Decoder, DecoderModule
from headspring.models.encoder import Encoder, EncoderModule
from headspring.models.model import Model, ModelModule
from headspring.models.part import Cost, ParameterRule, PartModule
from headspring.models.state import Memory, State

NO_SOURCE = "an encoder–decoder writes about what its encoder reads: give it a source"
OF_DECODER = ("vocab", "width", "context")


class EncoderDecoder(Model):
    """`encoder` has no head, every block of `decoder` a `cross` branch. `vocab`, `width` and `context` are the decoder's and
    need not be given. With `shared` both sides have one table of embeddings. Each answer begins with the token `start`."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    vocab: int = Field(0, gt=0)  # never the default: `_is_its_decoder` fills it in
    width: int = Field(0, gt=0)
    encoder: Encoder
    decoder: Decoder
    shared: bool = True
    start: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _is_its_decoder(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "decoder" not in value:
            return value
        decoder = Decoder.model_validate(value["decoder"])
        return {name: getattr(decoder, name) for name in OF_DECODER} | value | {"decoder": decoder}

    @model_validator(mode="after")
    def _fits_together(self) -> "EncoderDecoder":
        for name in OF_DECODER:
            if getattr(self, name) != getattr(self.decoder, name):
                decoder = getattr(self.decoder, name)
                raise ValueError(f"{name} ({getattr(self, name)}) is the decoder's ({decoder}); leave it out")
        if self.encoder.width != self.width:
            raise ValueError(f"the encoder's width ({self.encoder.width}) must be the decoder's ({self.width})")
        if self.encoder.head is not None or self.encoder.pooler:
            raise ValueError("an encoder that is read by a decoder predicts nothing itself: head: null, and no pooler")
        blind = [index for index, block in enumerate(self.decoder.layers) if block.cross is None]
        if blind:
            raise ValueError(f"decoder.layers.{blind[0]} does not read the encoder: give it cross: {{kind: cross_attention}}")
        if not self.decoder.causal:
            raise ValueError("the decoder sees later tokens, and what it is to write would stand before its eyes")
        sizes = [(side.vocab, side.embed.inner) for side in (self.encoder, self.decoder)]
        if self.shared and sizes[0] != sizes[1]:
            raise ValueError("a shared table needs the same vocab and embed.inner on both sides, or shared: false")
        if self.start >= self.vocab:
            raise ValueError(f"start ({self.start}) is no token of a vocabulary of {self.vocab}")
        return self

    @property
    def reads_source(self) -> bool:
        return True

    def module(self) -> "EncoderDecoderModule":
        return EncoderDecoderModule(self)


class EncoderDecoderModule(ModelModule):
    """The module of an `EncoderDecoder`."""

    config: EncoderDecoder

    def __init__(self, config: EncoderDecoder):
        super().__init__(config)
        self.encoder = EncoderModule(config.encoder)
        self.decoder = DecoderModule(config.decoder, self.encoder.embed if config.shared else None)
        self.complete()

    def adjusted(self, name: str, shape: Sequence[int], rule: ParameterRule) -> ParameterRule:
        side, _, rest = name.partition(".")
        return getattr(self, side).adjusted(rest, shape, rule)

    def owners(self) -> Iterator[tuple[str, PartModule, tuple[str, ...]]]:
        for side, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            for prefix, module, names in stack.owners():
                yield f"{side}.{prefix}".rstrip("."), module, names

    def blocks(self) -> Iterable[BlockModule]:
        return [*self.encoder.blocks(), *self.decoder.blocks()]

    # ---- the forward pass

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        segments: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        source_padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As every model's. `source` (B, M) int64, with `source_padding` (B,) pads on its left, is given with every call, or
        with the first one of a state, which remembers it. Documents packed in a row share its source.

        Raises `UserError` without a source.
        """
        memory = self._memory(tokens, state, source, source_padding)
        self.compute_alike()
        return self.decoder(tokens, state, segments, padding, memory=memory)

    def encode(self, source: torch.Tensor, padding: torch.Tensor | None = None) -> Memory:
        """What the decoder reads of sources (B, M) int64 with `padding` (B,) pads on the left."""
        self.compute_alike()
        hidden = self.encoder(source, padding=padding)
        if padding is None:
            return Memory(hidden, None)
        return Memory(hidden, torch.arange(source.shape[1], device=source.device) >= padding[:, None])

    def _memory(
        self, tokens: torch.Tensor, state: State | None, source: torch.Tensor | None, padding: torch.Tensor | None
    ) -> Memory:
        if state is not None and state.memory is not None:
            if source is not None:
                raise ValueError("the source is given with the first tokens of a state only, which remembers it")
            return state.memory
        if source is None:
            raise UserError(NO_SOURCE)
        if len(source) != len(tokens):
            raise ValueError(f"{len(source)} sources for {len(tokens)} rows of tokens")
        memory = self.encode(source, padding)
        if state is not None:
            state.memory = memory
        return memory

    def compute_alike(self) -> None:
        """What is set for the whole (a dtype, by `computing_in`) holds for both sides."""
        for stack in (self.encoder, self.decoder):
            stack.compute_dtype, stack.checkpoint_activations = self.compute_dtype, self.checkpoint_activations

    def new_state(self, batch: int, capacity: int | None = None) -> State:
        self.compute_alike()
        return self.decoder.new_state(batch, capacity)

    # ---- the head is the decoder's

    @property
    def output_weight(self) -> torch.Tensor:
        return self.decoder.output_weight

    @property
    def output_bias(self) -> torch.Tensor | None:
        return self.decoder.output_bias

    @property
    def softcap(self) -> float | None:
        return self.decoder.softcap

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder.head_input(hidden)

    def ledger(self, context_length: int | None = None) -> Cost:
        """For each token of the decoder, beside a source that is as long."""
        length = context_length or self.config.context
        wrote = 2.0 * self.config.width  # bytes of what every layer of the decoder reads
        memory = Cost("memory", activation_bytes=wrote, state_bytes=wrote)
        return Cost.sum(self.config.kind, (self.encoder.ledger(length), memory, self.decoder.ledger(length)))
