"""Drafting: another model, or the first layers of the same, writes ahead.

A draft is sampled as the answer will be: with the request's own uniform number at each place, its penalties, its mask. Two
distributions that are alike then mostly give the same token at the same number: token t is chosen by both at u where their
intervals for t overlap. That is what makes a draft worth its time at temperature 1, and it is all a draft can do: the check
does not ask how it came about.

The draft model runs as the engine's own does, all answers side by side, with pages of its own. What it read and the answer did
not take is forgotten; an answer whose pages were needed for another is read again.
"""

from collections import OrderedDict
from collections.abc import Sequence as Rows
from collections.abc import Set

import torch

from headspring.inference.adjusting import choose
from headspring.inference.engine.cache import Cache
from headspring.inference.engine.config import EngineConfig
from headspring.inference.engine.job import Job
from headspring.inference.engine.runner import runner_for
from headspring.inference.engine.sequence import Sequence, Work
from headspring.inference.generation import Request
from headspring.inference.quantization.choice import prepare_for_serving
from headspring.models.model import ModelModule
from headspring.models.state import SNAPSHOTS

CHUNK = 512  # tokens of a text that are read at a time
KEPT = 256  # answers whose drafts are kept; more than run together


class Drafting:
    """A proposer with a model of its own, whose tokenizer has `named` ids."""

    def __init__(self, model: ModelModule, named: int):
        prepare_for_serving(model)
        self.model, self.named = model, named
        self.runner = runner_for(model, EngineConfig())
        self.cache = Cache(self.runner.groups, sharing=False)
        self.drafts: OrderedDict[Request, Sequence] = OrderedDict()  # the one unused longest first

    @torch.inference_mode()
    def propose(self, requests: Rows[Request], limits: Rows[int]) -> list[list[int]]:
        for ended in [request for request in self.drafts if request.finish_reason is not None]:
            self._drop(ended)
        proposed, going = [list[int]() for _ in requests], []
        for i, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            if limit and len(request.prompt) + len(request.token_ids) < self.model.config.context:
                going.append((self._draft(request), limit, proposed[i]))
        using = {draft.request for draft, _, _ in going}
        while going := [one for one in going if self._make_room(one[0], using)]:
            tokens = self._step([(draft, written) for draft, _, written in going])
            for (draft, _, written), token in zip(going, tokens, strict=True):
                if token is not None:
                    written.append(token)
                    draft.tokens.append(token)
            going = [one for one, token in zip(going, tokens, strict=True) if self._goes_on(*one, token)]
        return proposed

    def _goes_on(self, draft: Sequence, limit: int, written: list[int], token: int | None) -> bool:
        over = token is None or token in draft.request.stop_ids
        return not over and len(written) < limit and len(draft.tokens) < self.model.config.context

    def _step(self, drafts: Rows[tuple[Sequence, list[int]]]) -> list[int | None]:
        """The next token of each draft after what it has written; None where a structure allows none."""
        for draft, _ in drafts:
            while draft.uncomputed > CHUNK:
                self._run([Work(draft, CHUNK)])
        hidden = self._run([Work(draft, draft.uncomputed, 1) for draft, _ in drafts])
        logits = self.model.logits(hidden)[:, : self.named]
        return [choose(draft.request, row[None], written) for (draft, written), row in zip(drafts, logits, strict=True)]

    def _run(self, work: list[Work]) -> torch.Tensor:
        hidden = self.runner.run(work)
        for item in work:
            item.sequence.computed += item.count
        return hidden

    def _draft(self, request: Request) -> Sequence:
        """The draft of an answer, with what it has read that still stands."""
        text = request.prompt + request.token_ids
        draft = self.drafts.pop(request, None) or self._begun(request)
        same = next((i for i, (a, b) in enumerate(zip(draft.tokens, text, strict=False)) if a != b), len(text))
        kept = min(same, draft.computed, len(text) - 1)
        if draft.state is not None and draft.computed - kept > SNAPSHOTS:
            self.cache.release(draft)  # a folded state does not go back so far
        elif kept < draft.computed:
            self.cache.shorten(draft, kept if draft.state is None else self.runner.boundary(draft, kept))
        draft.tokens, self.drafts[request] = text, draft
        if len(self.drafts) > KEPT:
            self._drop(next(iter(self.drafts)))
        return draft

    @staticmethod
    def _begun(request: Request) -> Sequence:
        return Sequence(Job(0, request.prompt, request.params, request.source), request, 0)

    def _make_room(self, draft: Sequence, using: Set[Request]) -> bool:
        """Pages for what a draft has to compute, at the cost of drafts that nobody asks for now; else it proposes no more."""
        while self.cache.reserve(draft, draft.uncomputed) is None:
            if (unused := next((request for request in self.drafts if request not in using), None)) is None:
                self.cache.release(draft)
                return False
            self._drop(unused)
        return True

    def _drop(self, request: Request) -> None:
        self.cache.release(self.drafts.pop(request))

    def observe(self, request: Request, hidden: torch.Tensor) -> None:
        """It has hidden states of its own."""
