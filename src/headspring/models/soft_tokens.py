"""Soft tokens: vectors of the residual stream that stand where a prompt has placeholders.

    tokens      <img> <img> <img> <img>  w  h  i  c  h …
    stream      s₀    s₁    s₂    s₃     the embeddings of the words

The k-th placeholder of a kind in a row takes the k-th vector that its tower made for that row. Which one that is follows
from all the tokens of the row so far, so that a prompt may be cut anywhere, in the middle of a picture too, and a state that
reads tokens again gives each its own vector again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from headspring.artifacts.errors import UserError
from headspring.models.state import Memory


@dataclass(frozen=True)
class PlacedVectors:
    """`vectors` (n, D) for the `places` (n,) int64 of a row."""

    places: torch.Tensor
    vectors: torch.Tensor

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """x (1, N, D) with the vectors in their places."""
        return x.index_copy(1, self.places, self.vectors[None].to(x.dtype))


@dataclass(frozen=True)
class SoftTokens(Memory):
    """What the towers read: `hidden` (B, M, D), of which the columns `start … end − 1` of a span belong to the placeholder
    with the id it names: `spans` are (id, start, end)."""

    spans: tuple[tuple[int, int, int], ...] = ()

    def select(self, rows: torch.Tensor) -> "SoftTokens":
        return SoftTokens(self.hidden[rows], None, self.spans)

    def columns(self, prompt: Sequence[int]) -> list[int]:
        """Which of the vectors stands at each token of one row; −1 where the token itself does.

        Raises `UserError` where there are more placeholders than vectors."""
        columns = [-1] * len(prompt)
        for placeholder, start, end in self.spans:
            places = [place for place, token in enumerate(prompt) if token == placeholder]
            if len(places) > end - start:
                raise _too_many(placeholder, len(places), end - start)
            for order, place in enumerate(places):
                columns[place] = start + order
        return columns

    def contents(self, prompt: Sequence[int]) -> list[int | bytes]:
        """What stands at each token of one row, to tell prompts apart: the token, or a digest of the vector in its place."""
        rows = self.hidden[0].detach().float().cpu().numpy()
        columns = zip(prompt, self.columns(prompt), strict=True)
        return [token if column < 0 else blake2b(rows[column].tobytes()).digest() for token, column in columns]

    def place(self, x: torch.Tensor, tokens: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """x (B, T, D), the embeddings of the last T of `tokens` (B, S), with soft tokens in the place of placeholders.

        Raises `UserError` where a row has more placeholders than vectors.
        """
        for placeholder, start, end in self.spans:
            here = tokens == placeholder
            if padding is not None:  # what stands behind pads is nobody's picture
                here = here & (torch.arange(tokens.shape[1], device=tokens.device) >= padding[:, None])
            order = here.cumsum(1) - 1
            if int(order.max()) >= end - start:
                raise _too_many(placeholder, int(order.max()) + 1, end - start)
            index = (start + order.clamp(min=0))[:, -x.shape[1] :, None].expand(-1, -1, x.shape[-1])
            x = torch.where(here[:, -x.shape[1] :, None], self.hidden.to(x.dtype).gather(1, index), x)
        return x


def _too_many(placeholder: int, found: int, vectors: int) -> UserError:
    more = f"{found} placeholders (token {placeholder}) for {vectors} vectors"
    return UserError(f"a prompt has {more}: every picture or sound takes exactly as many as its tower makes")
