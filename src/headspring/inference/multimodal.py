"""Answers of a multimodal model: prompts with items in, token ids out, through the engine that answers everybody.

Ids are all there is: a codebook's have no text, and the questions of a trial are compared as they are. With text, and one
request at a time, it is `Engine.submit(prompt, params, soft=model.look(media))`.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch

from headspring.data.multimodal import join_media
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.sampling_params import SamplingParams
from headspring.models.model import ModelModule
from headspring.models.multimodal import MultimodalModule
from headspring.models.soft_tokens import SoftTokens
from headspring.tokenization.tokenizer import Tokenizer

TOGETHER = 64  # prompts whose items are looked at in one call
NEVER = -1e30  # added to a logit


class Wordless:
    """As much of a tokenizer as the engine needs where nobody reads the text: every id may come, and none says anything."""

    eos_id = end_id = None

    def __init__(self, vocab: int):
        self.vocab_size = vocab

    def stream(self) -> "Wordless":
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


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
    `temperature` 0 takes the most probable. Raises what a job failed with, `UserError` for prompts that do not fit."""
    vocab = model.config.vocab
    engine = Engine(model, cast(Tokenizer, Wordless(vocab)), EngineConfig())
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        stop_token_ids=() if end is None else (end,),
        logit_bias={} if allowed is None else {token: NEVER for token in range(vocab) if token not in allowed},
    )
    looked = _look(model, media) if media else [None] * len(prompts)
    jobs = [
        engine.submit(prompt.tolist(), params.model_copy(update={"seed": seed + row}), soft=soft)  # equal prompts differ
        for row, (prompt, soft) in enumerate(zip(prompts, looked, strict=True))
    ]
    engine.run()
    for job in jobs:
        if job.error is not None:
            raise job.error
    rows = [job.generations[0].token_ids for job in jobs]
    return [row[: row.index(end)] if end in row else row for row in rows]


@torch.inference_mode()
def _look(model: ModelModule, media: Sequence[Mapping[str, np.ndarray]]) -> list[SoftTokens]:
    """What towers see of each prompt's items."""
    assert isinstance(model, MultimodalModule)
    seen: list[SoftTokens] = []
    for start in range(0, len(media), TOGETHER):
        items = join_media(media[start : start + TOGETHER])
        soft = model.look({name: tensor.to(model.device) for name, tensor in items.items()})
        seen += [soft.select(torch.tensor([row], device=model.device)) for row in range(len(soft.hidden))]
    return seen
