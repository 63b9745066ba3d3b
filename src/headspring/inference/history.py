"""What a text has had so far, for the penalties: each token once, with how often the answer has it.

Two short arrays and no mask over the vocabulary: a step then costs what the text is long, and not what the vocabulary is large.

    repetition   prompt and answer    logit / penalty where positive, · penalty where negative      arXiv 1909.05858
    presence     answer alone         logit − penalty where the answer has the token                OpenAI's API
    frequency    answer alone         logit − penalty · how often the answer has it                 OpenAI's API
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headspring.inference.sampling_params import SamplingParams


class History:
    """The tokens of a prompt, and those of the answer so far."""

    def __init__(self, prompt: Sequence[int]):
        self._ids = np.array(list(dict.fromkeys(prompt)), np.int64)
        self._counts = np.zeros(len(self._ids), np.float32)
        self._place = {token: place for place, token in enumerate(self._ids.tolist())}
        self._of_prompt = len(self._ids)
        self._answer: list[int] = []

    def push(self, token: int) -> None:
        """The answer goes on with `token`."""
        place = self._place.setdefault(token, len(self._ids))
        if place == len(self._ids):
            self._ids, self._counts = np.append(self._ids, token), np.append(self._counts, np.float32(0))
        self._counts[place] += 1
        self._answer.append(token)

    def pop(self) -> None:
        """Forget the last token of the answer."""
        place = self._place[token := self._answer.pop()]
        self._counts[place] -= 1
        if place >= self._of_prompt and not self._counts[place]:  # the last that came is the last in the arrays
            self._ids, self._counts = self._ids[:place], self._counts[:place]
            del self._place[token]

    def penalize(self, row: Tensor, params: SamplingParams) -> None:
        """Change the logits (V,) float32 of the next token in place."""
        ids = torch.from_numpy(self._ids).to(row.device)
        counts = torch.from_numpy(self._counts).to(row.device)
        logits, penalty = row[ids], params.repetition_penalty
        logits = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits -= (counts > 0) * params.presence_penalty + counts * params.frequency_penalty
        row[ids] = logits
