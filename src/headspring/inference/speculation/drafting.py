"""Drafting: another model, or the first layers of the same, writes ahead.

A draft is sampled as the answer will be: with the request's own uniform number at each place, its penalties, its mask. Two
distributions that are alike then mostly give the same token at the same number: token t is chosen by both at u where their
intervals for t overlap. That is what makes a draft worth its time at temperature 1, and it is all a draft can do: the check
does not ask how it came about.

Each answer has a state of its own in the draft model. What it read and the answer did not take is forgotten by `rewind`.
"""

from collections import OrderedDict
from weakref import ref

import torch
from torch import Tensor

from headspring.inference.adjusting import choose
from headspring.inference.generation import Request
from headspring.models.model import ModelModule
from headspring.models.state import SNAPSHOTS, KeyValueState, State

STATES = 64  # answers whose states are kept; the draft model reads another one's text again


class Drafting:
    """A proposer with a model of its own, whose tokenizer has `named` ids."""

    def __init__(self, model: ModelModule, named: int):
        self.model, self.named = model, named
        self._states: OrderedDict[ref[Request], State] = OrderedDict()

    @torch.inference_mode()
    def propose(self, request: Request, limit: int) -> list[int]:
        text = request.prompt + request.token_ids
        if len(text) >= self.model.config.context:
            return []
        limit = min(limit, self.model.config.context - len(text))
        state = self._state(request, text)
        proposed: list[int] = []
        unread = text[state.length :]
        while len(proposed) < limit:
            hidden = self.model(torch.tensor([unread], device=self.model.device), state=state)
            logits = self.model.logits(hidden[:, -1])[:, : self.named]
            token = choose(request, logits, proposed)
            if token is None:
                break
            proposed.append(token)
            if token in request.stop_ids:
                break
            unread = [token]
        return proposed

    def _state(self, request: Request, text: list[int]) -> State:
        """The state of this answer, at the longest beginning of `text` that it has read, short of the last token."""
        key = ref(request, self._drop)
        state = self._states.pop(key, None)
        if state is not None:
            read = state.tokens[0].tolist()
            common = next((i for i, (a, b) in enumerate(zip(read, text)) if a != b), min(len(read), len(text)))
            back = state.length - min(common, len(text) - 1)
            if back <= SNAPSHOTS or all(isinstance(layer, KeyValueState) for layer in state.layers):
                state.rewind(back)
            else:
                state = None
        if state is None:
            state = self.model.new_state(1, min(len(text) + request.remaining, self.model.config.context))
        self._states[key] = state
        if len(self._states) > STATES:
            self._states.popitem(last=False)
        return state

    def _drop(self, key: "ref[Request]") -> None:
        self._states.pop(key, None)

    def observe(self, request: Request, hidden: Tensor) -> None:
        """It has hidden states of its own."""
