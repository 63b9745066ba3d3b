"""Beam search: the likeliest answers that can be found by going on, at each place, with the `beam_width` likeliest beginnings.

The rules are those of `transformers` (its `_beam_search`), so that equal settings find equal answers: of twice as many
candidates as there are beams (more where there are more stop tokens) those that do not end go on; one that ends is an answer if
it is among the first `beam_width`; answers are ranked by Σ log p / length ** `length_penalty`. `early_stopping` says when no
running beam could still beat the worst answer.

Here a beam is a sequence like any other. Its pages are shared with the beams that it split from; which of them the scheduler
runs in one step does not matter, because a beam keeps its hidden state (`Sequence.row`) until those of all others are there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headspring.artifacts import HeadspringError
from headspring.inference.adjusting import adjust, adjusts
from headspring.inference.engine.sequence import Sequence
from headspring.inference.generation import Request
from headspring.inference.inspection import Seen
from headspring.inference.sampling import log_distribution, log_probs_of_logits, tops_of
from headspring.inference.sampling_params import SamplingParams


@dataclass(frozen=True)
class Candidate:
    """A beam and a token that may follow it, with the sum of both their log-probabilities as the search sees them."""

    beam: int
    token: int
    total: float


@dataclass(frozen=True)
class Answer:
    """A finished one."""

    score: float
    request: Request
    seen: Seen | None


class Search:
    """The state of one job's search: the `totals` of its running beams, by their order, and the best answers so far."""

    def __init__(self, params: SamplingParams, new_tokens: int):
        assert params.beam_width is not None
        self.params, self.width, self.new_tokens = params, params.beam_width, new_tokens
        self.totals = [0.0]
        self.answers: list[Answer] = []

    def candidates(self, beams: list[Sequence], logits: Tensor, named: int) -> list[Candidate]:
        """The best continuations, best first; logits (B, V) float32. Raises `HeadspringError` where those are no numbers."""
        if bool(logits.isnan().any()):
            raise HeadspringError("the model gave NaN logits; its weights or an intervention are broken")
        scores = log_distribution(logits)[:, :named].clone()
        for row, beam in enumerate(beams):
            if adjusts(beam.request):
                adjust(scores[row : row + 1], beam.request, ())
        totals = (scores + torch.tensor(self.totals, device=scores.device)[:, None]).flatten()
        kept = max(2, 1 + len(beams[0].request.stop_ids)) * self.width
        values, places = totals.topk(min(kept, len(totals)))
        found = zip(places.tolist(), values.tolist(), strict=True)
        return [Candidate(place // named, place % named, total) for place, total in found if total > -torch.inf]

    def split(self, beams: list[Sequence], candidates: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Those that go on, and those that end and are answers."""
        written = len(beams[0].request.token_ids) + 1
        ends = [written == self.new_tokens or one.token in beams[one.beam].request.stop_ids for one in candidates]
        going = [one for one, end in zip(candidates, ends, strict=True) if not end][: self.width]
        ended = [one for one, end in zip(candidates[: self.width], ends, strict=False) if end]
        return going, ended

    def take(self, answers: list[Answer], going: list[Candidate], written: int) -> None:
        """Keep the best answers, and the totals of the beams that go on after `written` tokens."""
        self.answers = sorted(self.answers + answers, key=lambda one: -one.score)[: self.width]
        self.totals = [] if self._is_over(going, written) else [one.total for one in going]

    def _is_over(self, going: list[Candidate], written: int) -> bool:
        """Whether nothing that goes on could still become one of the best."""
        if not going:
            return True
        if len(self.answers) < self.width:
            return False
        far = self.params.early_stopping == "never" and self.params.length_penalty > 0
        reach = self.score(going[0].total, self.new_tokens if far else written)
        return self.params.early_stopping is True or reach <= self.answers[-1].score

    def score(self, total: float, length: int) -> float:
        """What answers are ranked by."""
        return total / length**self.params.length_penalty


def replay(request: Request, fresh: Request) -> Request:
    """Write into `fresh` what `request` has written."""
    tops = request.top_logprobs if request.params.logprobs is not None else [None] * len(request.token_ids)
    for token, log_prob, top in zip(request.token_ids, request.logprobs, tops, strict=True):
        fresh.accept(token, log_prob, top)
    return fresh


def extend(request: Request, logits: Tensor, token: int) -> Request:
    """One token more, which follows from logits (V,)."""
    row = logits[None]
    log_prob = log_probs_of_logits(row, torch.tensor([token], device=row.device)).tolist()
    request.accept(token, log_prob[0], tops_of(row, [token], log_prob, request.params.logprobs)[0])
    return request
