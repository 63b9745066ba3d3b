"""Training to answer about pictures and sounds: cross-entropy of the answer, through decoder and towers at once.

A tower is written in a recipe by its few usual numbers (`Sense`); what it looks at says the rest.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from headspring.artifacts.errors import UserError
from headspring.artifacts.value import Variant
from headspring.data.multimodal import MultimodalBatch
from headspring.models import Attention, Block, Decoder, Full, NoPE, SwiGLU, repeat
from headspring.models.audio import Sound
from headspring.models.decoder import hidden_size
from headspring.models.model import ModelModule
from headspring.models.multimodal import Multimodal, MultimodalModule
from headspring.models.scoring import cross_entropy_sum
from headspring.models.tower import Tower
from headspring.models.vision import Vision
from headspring.training.objective import NextToken

SPARE = 32  # rows that a vocabulary grows by: a placeholder takes one, and the products with it stay whole


# ---- in a recipe


class Sense(Variant):
    """A tower of `depth` blocks of `width` channels, whose item has a shape that the questions decide."""

    kind: str
    name: ClassVar[str]  # of the items, in a model's `media`
    width: int = Field(64, gt=0)
    depth: int = Field(2, gt=0)
    heads: int = Field(4, gt=0)

    def tower(self, placeholder: int, shape: tuple[int, ...]) -> Tower:
        """The value of the tower. Raises `UserError` for items that it cannot take in."""
        raise NotImplementedError

    def _blocks(self) -> tuple[Block, ...]:
        mixer = Attention(heads=self.heads, position=NoPE(), mask=Full())
        return repeat(self.depth, Block(mixer=mixer, feedforward=SwiGLU(hidden=hidden_size(self.width))))


class Sight(Sense):
    """Pictures and films, cut into squares of `patch` pixels."""

    kind: Literal["vision"] = "vision"
    name: ClassVar[str] = "image"
    patch: int = Field(2, gt=0)

    def tower(self, placeholder: int, shape: tuple[int, ...]) -> Tower:
        if len(shape) != 3:
            raise UserError("a tower of kind vision looks at pictures, and these questions are about sounds: use kind: sound")
        channels, height, columns = shape
        if height % self.patch or columns % self.patch:
            raise UserError(f"patches of {self.patch} do not fill pictures of {height} × {columns}")
        pixels = {"channels": channels, "height": height, "columns": columns, "patch": self.patch}
        return Vision(placeholder=placeholder, width=self.width, blocks=self._blocks(), **pixels)


class Hearing(Sense):
    """Waves, as log-mel frames of which `frames` make a piece."""

    kind: Literal["sound"] = "sound"
    name: ClassVar[str] = "sound"
    frames: int = Field(4, gt=0)

    def tower(self, placeholder: int, shape: tuple[int, ...]) -> Tower:
        if len(shape) != 1:
            raise UserError("a tower of kind sound listens, and these questions are about pictures: use kind: vision")
        return Sound(placeholder=placeholder, width=self.width, blocks=self._blocks(), samples=shape[0], frames=self.frames)


def with_sense(model: ModelModule, sense: Sense, shape: tuple[int, ...], seed: int) -> MultimodalModule:
    """The decoder `model` beside a fresh tower for items of `shape`, and a placeholder after its vocabulary. As a function of
    text it is what it was. Raises `UserError` for a model that is no decoder."""
    decoder = model.config
    if not isinstance(decoder, Decoder):
        raise UserError(f"a tower stands beside a decoder, and this model is of kind {decoder.kind!r}")
    grown = decoder.model_copy(update={"vocab": decoder.vocab + SPARE})
    value = Multimodal(decoder=grown, towers={sense.name: sense.tower(decoder.vocab, shape)})
    built = value.build(seed)
    assert isinstance(built, MultimodalModule)
    with torch.no_grad():
        for name, parameter in built.body.named_parameters():
            known = model.get_parameter(name)
            parameter[: len(known)] = known
    return built


# ---- the objective


class Answers(NextToken):
    """The next token where it is part of an answer. Rows without items are plain text."""

    def loss(self, model: ModelModule, batch: MultimodalBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        media = {}
        if batch.media:
            if not isinstance(model, MultimodalModule):
                kinds = ", ".join(batch.media)
                raise UserError(
                    f"these rows have items ({kinds}), for which a model of kind {model.config.kind!r} has no tower"
                )
            media = {"media": batch.media}
        return cross_entropy_sum(model, model(batch.inputs, padding=batch.padding, **media), batch.targets), {}
