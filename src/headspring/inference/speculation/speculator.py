"""Before a step, proposals for the answers that are being written; after it, what came of them.

    engine.step   schedule ─→ `before` ─→ compute, sample ─→ `after`

The engine checks proposals as it samples: row by row, each as it would have been sampled without them (`engine/sampler.py`). So
nothing here can change a token, and a proposer that raises has only lost its proposals.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import Tensor

from headspring.inference.generation import Request
from headspring.inference.speculation.controller import Controller
from headspring.inference.speculation.values import Speculation
from headspring.models.model import ModelModule
from headspring.tokenization.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Proposer(Protocol):
    """A way to guess the tokens that come next."""

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        """For each request, at most `limit` tokens to follow its text."""
        ...

    def observe(self, request: Request, hidden: Tensor) -> None:
        """`hidden` (n, D) are those that the request's last n tokens were sampled from."""
        ...


class Speculator:
    """A proposer, how many tokens are worth proposing for each request, and whether to do it at all.

    `proposed` and `accepted` count tokens since the start."""

    def __init__(
        self,
        value: Speculation,
        model: ModelModule,
        tokenizer: Tokenizer,
        clock: Callable[[], float],
        controller: Controller | None = None,
    ):
        self.most, self.clock = value.tokens, clock
        self.proposer = value.proposer(model, tokenizer)
        self.controller = controller or Controller()
        self.proposed = self.accepted = 0
        self._limits: WeakKeyDictionary[Request, int] = WeakKeyDictionary()
        self._started, self._proposes = 0.0, False

    def before(self, requests: Sequence[Request], room: int) -> list[list[int]]:
        """Proposals for each of the requests that get one token in this step, at most `room` in all."""
        self._started = self.clock()
        self._proposes = bool(requests) and self.controller.of(len(requests)).way
        if not self._proposes:
            return [[] for _ in requests]
        limits = []
        for request in requests:
            limits.append(max(0, min(self._limits.get(request, self.most), request.remaining - 1, room)))
            room -= limits[-1]
        try:
            proposals = self.proposer.propose(requests, limits)
        except Exception:
            log.exception("a proposer failed; the step goes on without its proposals")
            return [[] for _ in requests]
        return [tokens[:limit] for tokens, limit in zip(proposals, limits, strict=True)]

    def check(self, request: Request, proposed: int, hidden: Tensor) -> None:
        """A request got its tokens from rows `hidden` (n, D), the first n of those computed; `proposed` were tried."""
        if proposed:
            right = min(len(hidden) - 1, proposed)
            self.proposed, self.accepted = self.proposed + proposed, self.accepted + right
            # Twice what was right and one more: a lucky text soon gets all it can take, an unlucky one little.
            self._limits[request] = min(self.most, 2 * right + 1)
        self.proposer.observe(request, hidden)

    def after(self, answers: int, tokens: int) -> None:
        """A step of `answers` single tokens, and nothing else, gave `tokens`."""
        if answers:
            self.controller.of(answers).note(self._proposes, self.clock() - self._started, tokens)
