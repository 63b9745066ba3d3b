"""Encoder–decoders in the pretrain stage: their architectures, and how well they fill in on held-out text.

The objective is next-token training of the answer (`objective.NextToken`): what makes it span corruption is the data
(`data.spans`). Its loss is that of a token of the answer, with the text on both sides in view, and is comparable with
neither a decoder's nor an encoder's.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field

from headspring.data.spans import CorruptedSpans
from headspring.models import (
    MLP,
    Attention,
    Block,
    Branch,
    CrossAttention,
    Decoder,
    Embed,
    Encoder,
    EncoderDecoder,
    FanIn,
    Full,
    LayerNorm,
    NoPE,
    Sinusoidal,
    SwiGLU,
    repeat,
)
from headspring.models.decoder import hidden_size
from headspring.models.model import Model, ModelModule
from headspring.training.architectures import Uniform
from headspring.training.objective import held_out_loss


class TwoStacks(Uniform):
    """`depth` layers on each side, of `width` channels."""

    kind: str
    depth: int = Field(3, gt=0)
    heads: int = Field(4, gt=0)
    hidden: int | None = Field(None, gt=0)

    def decoder(self, vocab: int) -> Decoder:
        raise self.refusal()

    def encoder(self, vocab: int) -> Encoder:
        raise self.refusal()


class HouseEncoderDecoder(TwoStacks):
    """The default Transformer on both sides: RoPE, SwiGLU, RMSNorm before each branch, one table of embeddings."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"

    def encoder_decoder(self, vocab: int, start: int) -> EncoderDecoder:
        sizes = {"vocab": vocab, "width": self.width, "context": self.context}
        feedforward = SwiGLU(hidden=self.hidden or hidden_size(self.width))
        reads = Block(mixer=Attention(heads=self.heads, mask=Full()), feedforward=feedforward)
        cross = CrossAttention(heads=self.heads)
        writes = Block(mixer=Attention(heads=self.heads), cross=cross, feedforward=feedforward)
        return EncoderDecoder(
            encoder=Encoder(**sizes, layers=repeat(self.depth, reads), head=None),
            decoder=Decoder(**sizes, layers=repeat(self.depth, writes), tied=self.tied),
            start=start,
        )


class OriginalTransformer(TwoStacks):
    """The Transformer of arXiv 1706.03762: a norm after each sum, sinusoids added to embeddings times √D, relu, one table for
    source, answer and head. `hidden` defaults to four times the width."""

    kind: Literal["vaswani"] = "vaswani"

    def encoder_decoder(self, vocab: int, start: int) -> EncoderDecoder:
        plain = {"heads": self.heads, "qk_norm": None}
        feedforward = _post_norm(MLP(hidden=self.hidden or 4 * self.width, activation="relu", bias=True))
        reads = Block(mixer=_post_norm(Attention(position=NoPE(), mask=Full(), **plain)), feedforward=feedforward)
        writes = Block(
            mixer=_post_norm(Attention(position=NoPE(), **plain)),
            cross=_post_norm(CrossAttention(**plain)),
            feedforward=feedforward,
        )
        same = {
            "vocab": vocab,
            "width": self.width,
            "context": self.context,
            "norm": None,
            "embed": Embed(scale=self.width**0.5, positions=Sinusoidal()),
            "init": FanIn(),
        }
        return EncoderDecoder(
            encoder=Encoder(**same, layers=repeat(self.depth, reads), head=None),
            decoder=Decoder(**same, layers=repeat(self.depth, writes), tied=self.tied),
            start=start,
        )


def _post_norm(f: Attention | CrossAttention | MLP) -> Branch:
    return Branch(f=f, pre=None, out=LayerNorm())


def begins_answers(model: Model, start: int) -> Model:
    """An encoder–decoder whose answers begin with `start`; any other model as it is."""
    return model.model_copy(update={"start": start}) if isinstance(model, EncoderDecoder) else model


def span_validation(
    model: ModelModule, data: CorruptedSpans, rows: int, batch_size: int, dtype: torch.dtype
) -> Callable[[], dict[str, float]]:
    """A function that measures, over samples 0 … rows − 1, the loss (nats a token of the answer) and the perplexity."""

    def measure() -> dict[str, float]:
        loss = held_out_loss(model, data, rows, batch_size, dtype, document_mask=False)
        return {"loss": loss, "perplexity": math.exp(min(loss, 80.0))}

    return measure
