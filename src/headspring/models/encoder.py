"""The encoder-only model (BERT, arXiv 1810.04805): a stack in which every token sees every other.

    tokens (B, T) → embed → blocks → norm → hidden (B, T, D) → head → logits (B, T, V) of the tokens that stand there

A decoder's hidden state says what comes next; an encoder's says what its own token means in this place, with the words on
both sides in view. That is better for classifying, tagging, retrieving and filling gaps, and useless for writing: nothing
can be appended without changing what was read before, so that an encoder has no state and does not generate.

Why a value of its own and not `Decoder` with other masks: what may be asked of it differs, and a wrong question should be
refused in a sentence instead of answered with nonsense.
"""

from typing import Literal

import torch
from pydantic import model_validator

from headspring.artifacts.errors import UserError
from headspring.models.embedding import Head
from headspring.models.part import Cost, Linear
from headspring.models.stack import Stack, StackModule
from headspring.models.state import State

NO_STATE = "an encoder reads whole texts, in both directions: it keeps no state and cannot continue a text"
NO_HEAD = "this encoder was made without a head: it gives hidden states and embeddings, and predicts no tokens"


class Encoder(Stack):
    """A stack of mixers that see both ways (`Attention(mask=Full())`), trained to guess tokens that were hidden from it.

    Without a `head` it predicts nothing, as models made for embeddings (arXiv 1908.10084). `pooler` is BERT's extra layer
    over the first token, tanh(W h₀ + b): what its sentence-level objective was trained through.
    """

    kind: Literal["encoder"] = "encoder"
    head: Head | None = Head()  # type: ignore[assignment]
    pooler: bool = False

    @model_validator(mode="after")
    def _sees_both_ways(self) -> "Encoder":
        for index, mixer in enumerate(self.mixers()):
            if mixer.causal:
                why = f"{mixer.kind!r} reads from left to right; an encoder needs mask: {{kind: full}}"
                raise ValueError(f"layers.{index}: {why}")
        if any(block.cross is not None for block in self.layers):
            raise ValueError("an encoder has no cross: it is what a decoder's cross reads")
        if self.head is None and not self.tied:
            raise ValueError("an encoder without a head has no output matrix to untie; leave tied out")
        return self

    def module(self) -> "EncoderModule":
        return EncoderModule(self)

    def build(self, seed: int = 0) -> "EncoderModule":
        module = self.module()
        module.initialise(seed)
        return module


class EncoderModule(StackModule):
    """The module of an `Encoder`."""

    config: Encoder

    def __init__(self, config: Encoder):
        super().__init__(config)
        self.pooler = Linear(config.width, config.width, bias=True) if config.pooler else None
        self.complete()

    def pooled(self, first: torch.Tensor) -> torch.Tensor:
        """tanh(W h₀ + b) of the first tokens' hidden states, (B, D) → (B, D)."""
        if self.pooler is None:
            raise UserError("this encoder has no pooler; pool its hidden states by 'mean' or 'first'")
        return torch.tanh(self.pooler(first))

    @property
    def output_weight(self) -> torch.Tensor:
        if self.config.head is None:
            raise UserError(NO_HEAD)
        return super().output_weight

    def new_state(self, batch: int, capacity: int | None = None) -> State:
        raise UserError(NO_STATE)

    def ledger(self, context_length: int | None = None) -> Cost:
        """Of the pooler, the parameters: it runs once a text, and not once a token."""
        cost = super().ledger(context_length)
        if self.pooler is None:
            return cost
        parameters = sum(parameter.numel() for parameter in self.pooler.parameters())
        shape = f"{self.config.width} → {self.config.width}"
        return Cost.sum(cost.name, (*cost.children, Cost("pooler", parameters, shape=shape)))
