"""Pictures and sounds as tokens: a codebook of vectors, of which each piece becomes the number of the nearest.

    pieces (N, P, F) → ids (N, P) → pieces, each the mean of those that became this id

The ids stand in the vocabulary after those of text, and a decoder that predicts them draws. The codebook is found by k-means
(Lloyd 1982, started as by Arthur and Vassilvitskii 2007), which minimises the squared error of the way there and back. Against
a trained VQ-VAE (arXiv 1711.00937), whose codes stand for what a network made of the pieces, it needs no network, no gradient
through a choice, and cannot collapse; it gives up that codes know their surroundings, and so needs more of them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from headspring.artifacts.errors import UserError


@dataclass(frozen=True)
class Codebook:
    """`centres` (K, F) float32; the id of centre 0 in a vocabulary is `offset`."""

    centres: torch.Tensor
    offset: int

    @property
    def size(self) -> int:
        return len(self.centres)

    def encode(self, pieces: torch.Tensor) -> torch.Tensor:
        """(…, F) → ids (…) int64."""
        return torch.cdist(pieces.flatten(0, -2), self.centres).argmin(1).unflatten(0, pieces.shape[:-1]) + self.offset

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (…) int64 → (…, F). Raises `UserError` for an id that is not of this codebook."""
        codes = ids - self.offset
        if bool(((codes < 0) | (codes >= self.size)).any()):
            raise UserError(f"ids of this codebook are {self.offset} … {self.offset + self.size - 1}")
        return self.centres[codes]

    def save(self, path: Path) -> None:
        save_file({"centres": self.centres.contiguous(), "offset": torch.tensor(self.offset)}, path)

    @staticmethod
    def load(path: Path) -> "Codebook":
        tensors = load_file(path)
        return Codebook(tensors["centres"], int(tensors["offset"]))


def fit_codebook(pieces: torch.Tensor, size: int, offset: int, steps: int = 30, seed: int = 0) -> Codebook:
    """K-means of pieces (n, F) float32 with `size` centres. Raises `UserError` for fewer different pieces than that."""
    if len(pieces.unique(dim=0)) < size:
        raise UserError(f"a codebook of {size} needs as many different pieces, not {len(pieces.unique(dim=0))}")
    generator = torch.Generator().manual_seed(seed)
    centres = _spread(pieces, size, generator)
    for _ in range(steps):
        nearest = torch.cdist(pieces, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, pieces)
        counts = nearest.bincount(minlength=size)[:, None]
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return Codebook(centres, offset)


def _spread(pieces: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Pieces drawn one after another, each in proportion to its squared distance from those drawn before."""
    chosen = [int(torch.randint(len(pieces), (1,), generator=generator))]
    distance = torch.full((len(pieces),), float("inf"))
    while len(chosen) < size:
        distance = torch.minimum(distance, (pieces - pieces[chosen[-1]]).square().sum(1))
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return pieces[chosen].clone()
