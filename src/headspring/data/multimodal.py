"""Prompts with pictures and sounds: tokens, the answer to them, and the items that their placeholders stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headspring.artifacts.errors import UserError
from headspring.data.batch import IGNORE, pad_left
from headspring.data.rows import OnDevice


@dataclass(frozen=True)
class Example:
    """`inputs` (T,) int64, `targets` (T,) int64 that are IGNORE but for the answer, and items (N, …) float32 by tower."""

    inputs: np.ndarray
    targets: np.ndarray
    media: Mapping[str, np.ndarray]


def example(prompt: Sequence[int], answer: Sequence[int], media: Mapping[str, np.ndarray] | None = None) -> Example:
    """A prompt and the answer to it, which ends with the token that ends answers; the loss is that of the answer alone."""
    if not prompt or not answer:
        raise UserError("an example needs a prompt and an answer of one token at least")
    whole = np.array([*prompt, *answer], dtype=np.int64)
    targets = whole[1:].copy()
    targets[: len(prompt) - 1] = IGNORE
    return Example(whole[:-1], targets, media or {})


@dataclass
class MultimodalBatch(OnDevice):
    """Examples stacked, padded on the left; `media` (B, N, …) float32 by tower."""

    inputs: torch.Tensor
    targets: torch.Tensor
    padding: torch.Tensor | None
    media: dict[str, torch.Tensor]


def join_examples(rows: Sequence[Example]) -> MultimodalBatch:
    """Raises `UserError` where rows have other kinds or numbers of items than the first."""
    inputs, padding = pad_left([row.inputs for row in rows])
    targets, _ = pad_left([row.targets for row in rows], pad=IGNORE)
    return MultimodalBatch(inputs, targets, padding, join_media([row.media for row in rows]))


def join_media(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Items (N, …) of each row → (B, N, …) float32."""
    shapes = [{name: items.shape for name, items in row.items()} for row in rows]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(
            f"rows of a batch must have the same items: {shapes[0]} here, {next(s for s in shapes if s != shapes[0])}"
        )
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])).float() for name in rows[0]}
