"""Looking ahead: heads of the model that were trained for the tokens after the next one.

A head's block reads the hidden states that the model left behind, so that those of the last `window` tokens are kept for each
answer. A head keeps no state and sees no further back than that; it may be wrong at no cost but time.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from headspring.inference.generation import Request
from headspring.models.early_exit import stack_of
from headspring.models.heads import MultiTokenModule
from headspring.models.model import ModelModule


class LookingAhead:
    """A proposer from the heads of `model`, whose tokenizer has `named` ids."""

    def __init__(self, model: ModelModule, head: MultiTokenModule, window: int, named: int):
        self.body, self.head, self.window, self.named = stack_of(model), head, window, named
        self._hidden: WeakKeyDictionary[Request, tuple[int, Tensor]] = WeakKeyDictionary()

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        return [self._propose(request, limit) if limit else [] for request, limit in zip(requests, limits, strict=True)]

    def _propose(self, request: Request, limit: int) -> list[int]:
        """The most likely tokens; the first of what the heads see is known by now."""
        text = request.prompt + request.token_ids
        end, hidden = self._hidden.get(request, (0, None))
        if hidden is None or end != len(text) - 1:
            return []  # what was computed elsewhere (a fork, a shared prefix) was not seen
        tokens = torch.tensor([text[-1 - len(hidden) :]], device=hidden.device)
        ahead = self.head.continue_from(self.body, hidden[None], tokens, limit)
        proposed = ahead[0].tolist()
        return proposed[: next((i for i, token in enumerate(proposed) if token >= self.named), len(proposed))]

    def observe(self, request: Request, hidden: Tensor) -> None:
        """Keep the hidden states (n, D) of the tokens before the last one of the answer."""
        end = len(request.prompt) + len(request.token_ids) - 1
        before, kept = self._hidden.get(request, (0, None))
        if kept is not None and before + len(hidden) == end:
            hidden = torch.cat([kept, hidden])
        self._hidden[request] = end, hidden[-self.window :].clone()
