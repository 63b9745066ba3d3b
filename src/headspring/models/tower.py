"""A tower: what turns a picture or a sound into soft tokens of a decoder.

    raw (N, …) → pieces (N, P, F) → linear + place → blocks, every piece seeing every other → norm → projector → (N, P, D)

That is the vision transformer (arXiv 2010.11929) with the two-layer projector of LLaVA-1.5 (arXiv 2310.03744), whatever the
pieces are: patches of a picture, runs of frames of a spectrogram. Why soft tokens in the decoder's own stream and not
cross-attention: the decoder needs no new part, and text and pictures may stand in any order. What it gives up: every piece
takes a place in the context.
"""

from collections.abc import Iterable

import torch
from pydantic import Field, model_validator
from torch import nn

from headspring.artifacts.value import Variant
from headspring.models.block import Block, BlockModule
from headspring.models.context import Context
from headspring.models.embedding import Table
from headspring.models.mixer import Mixer
from headspring.models.norm import Norm, RMSNorm
from headspring.models.part import Cost, Linear, PartModule
from headspring.models.sites import Sites


class Tower(Variant):
    """`width` channels inside. `placeholder` is the token that each of its soft tokens replaces, `num_pieces` for an item."""

    placeholder: int = Field(ge=0)
    width: int = Field(64, gt=0)
    blocks: tuple[Block, ...] = ()
    norm: Norm = RMSNorm()

    @model_validator(mode="after")
    def _sees_all_pieces(self) -> "Tower":
        for index, block in enumerate(self.blocks):
            assert isinstance(block.mixer.f, Mixer)
            if block.mixer.f.causal or block.cross is not None:
                raise ValueError(
                    f"blocks.{index}: the pieces of a tower all see each other; use mask: {{kind: full}}, no cross"
                )
        return self

    @property
    def num_pieces(self) -> int:
        """Soft tokens of one item."""
        raise NotImplementedError

    @property
    def num_features(self) -> int:
        """Numbers of one piece."""
        raise NotImplementedError

    def pieces(self, raw: torch.Tensor) -> torch.Tensor:
        """Items (N, …) float32 → (N, num_pieces, num_features). Raises `UserError` for items of another shape."""
        raise NotImplementedError

    def build(self, width: int) -> "TowerModule":
        return TowerModule(self, width)


class TowerModule(PartModule):
    """Items (N, …) float32 → soft tokens (N, P, D). `sites` are those of its blocks."""

    def __init__(self, value: Tower, width: int):
        super().__init__()
        self.value = value
        self.read = Linear(value.num_features, value.width, bias=True)
        self.places = Table(value.num_pieces, value.width, "embedding")
        self.blocks = nn.ModuleList(block.build(value.width) for block in value.blocks)
        self.norm = value.norm.build(value.width)
        self.widen, self.project = Linear(value.width, 2 * width, bias=True), Linear(2 * width, width, bias=True)
        owners = (owner for i, block in enumerate(self._blocks()) for owner in block.owners(f"blocks.{i}"))
        self.sites = Sites({prefix: (module, names) for prefix, module, names in owners})

    def _blocks(self) -> Iterable[BlockModule]:
        for block in self.blocks:
            assert isinstance(block, BlockModule)
            yield block

    def forward(self, raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = self.read(self.value.pieces(raw).to(dtype)) + self.places.rows.to(dtype)
        context = Context.of(x.shape[1], 0, None, None, x.device)
        for block in self._blocks():
            block.prepare(context)
            x = block(x, context)
        return self.project(nn.functional.gelu(self.widen(self.norm(x))))

    def cost(self, name: str) -> Cost:
        """Per soft token, from its piece on: what makes bands of a sound is not counted."""
        pieces, width = self.places.rows.shape
        parts = [self.read.cost("read"), Cost("places", pieces * width, shape=f"{pieces} × {width}")]
        parts += [block.cost(f"blocks.{i}", pieces) for i, block in enumerate(self._blocks())]
        parts += [self.norm.cost("norm"), self.widen.cost("widen"), self.project.cost("project")]
        return Cost.sum(name, tuple(parts))
