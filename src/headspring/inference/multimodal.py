"""Answers of a multimodal model: prompts with items in, token ids out, through the state that text uses too."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from headspring.data.batch import pad_left
from headspring.data.multimodal import join_media
from headspring.models.model import ModelModule


@torch.inference_mode()
def answer(
    model: ModelModule,
    prompts: Sequence[np.ndarray],
    media: Sequence[Mapping[str, np.ndarray]] = (),
    max_tokens: int = 16,
    end: int | None = None,
    allowed: range | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """What the model writes after each prompt (T,) int64, without the token `end` that stops a row. `media` are items (N, …)
    by tower, one mapping a prompt. `allowed` ids are the only ones it may write, such as those of a codebook.
    `temperature` 0 takes the most probable."""
    tokens, padding = pad_left(prompts)
    tokens, padding = tokens.to(model.device), None if padding is None else padding.to(model.device)
    given = {"media": {name: items.to(model.device) for name, items in join_media(media).items()}} if media else {}
    state = model.new_state(len(tokens), tokens.shape[1] + max_tokens)
    generator = torch.Generator(model.device).manual_seed(seed)
    hidden, written = model(tokens, state=state, padding=padding, **given), []
    for _ in range(max_tokens):
        logits = model.logits(hidden[:, -1])
        if allowed is not None:
            logits[:, : allowed.start], logits[:, allowed.stop :] = -torch.inf, -torch.inf
        written.append(_choose(logits, temperature, generator))
        ended = end is not None and bool((torch.cat(written, 1) == end).any(1).all())
        if ended or len(written) == max_tokens:
            break
        hidden = model(written[-1], state=state)
    rows = torch.cat(written, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """(B, V) → (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
