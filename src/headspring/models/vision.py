"""Pictures as patches (arXiv 2010.11929): a picture of H × W pixels is a row of squares of p × p, read line by line.

A film is its frames, each a picture with soft tokens of its own: the decoder reads them in order and compares them, so that
no tower has to know time.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from headspring.artifacts.errors import UserError
from headspring.models.tower import Tower


class Vision(Tower):
    """Pictures (N, channels, height, width) with values around 0 … 1, cut into squares of `patch` pixels."""

    kind: Literal["vision"] = "vision"
    height: int = Field(gt=0)
    columns: int = Field(gt=0)
    patch: int = Field(gt=0)
    channels: int = Field(1, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> "Vision":
        if self.height % self.patch or self.columns % self.patch:
            raise ValueError(f"patches of {self.patch} do not fill a picture of {self.height} × {self.columns}")
        return self

    @property
    def num_pieces(self) -> int:
        return (self.height // self.patch) * (self.columns // self.patch)

    @property
    def num_features(self) -> int:
        return self.channels * self.patch**2

    def pieces(self, raw: torch.Tensor) -> torch.Tensor:
        expected = (self.channels, self.height, self.columns)
        if raw.shape[1:] != expected:
            raise UserError(f"this model reads pictures of {expected} (channels, height, width), not {tuple(raw.shape[1:])}")
        return patches(raw, self.patch)


def patches(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """(N, C, H, W) → (N, P, C · size²), line by line."""
    squares = pictures.unfold(2, size, size).unfold(3, size, size)  # (N, C, H / size, W / size, size, size)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def from_patches(pieces: torch.Tensor, size: int, height: int, columns: int) -> torch.Tensor:
    """The inverse: (N, P, C · size²) → (N, C, H, W)."""
    down, across = height // size, columns // size
    squares = pieces.unflatten(2, (-1, size, size)).unflatten(1, (down, across))
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
