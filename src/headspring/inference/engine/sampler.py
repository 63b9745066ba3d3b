"""Logits to tokens for all sequences of a step: each request by its own settings and its own uniform numbers.

A request has one row of logits, or more where tokens were proposed for it (speculation): row j then follows the first j
proposals. Every row is sampled as it would have been without them, with the uniform number, the penalties and the mask of its
place; the first token that is not the proposed one ends the run, and what lies behind it is not looked at. So a proposal can
save a step and cannot change a token.

What a request alone can break (NaN, a structure that gives up) is its own failure, returned and not raised.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headspring.artifacts import HeadspringError
from headspring.inference.adjusting import adjust, adjusts
from headspring.inference.generation import Request
from headspring.inference.sampling import RowParams, SamplingParams, log_probs_of_logits, pick, tops_of

NO_PROPOSALS: tuple[int, ...] = ()


class Sampler:
    """Samples for requests of one model, whose tokenizer has `named` of its `vocab` ids; ids without text never come. `agreed`
    gives the ids (R,) int64 that all processes take, where there are several (`processes`)."""

    agreed: Callable[[Tensor], Tensor] | None = None

    def __init__(self, vocab: int, named: int, device: torch.device):
        self.vocab, self.named, self.device = vocab, named, device
        self._columns: tuple[list[SamplingParams], RowParams] = ([], RowParams.of([], named, device))

    def sample(
        self, requests: Sequence[Request], logits: Tensor, proposals: Sequence[Sequence[int]] | None = None
    ) -> list[Exception | None]:
        """Give each request its next tokens: one, and one more for each proposal that turned out right.

        logits (R, V) float32, of each request 1 + len(its proposals) rows. For each request: what went wrong with it alone."""
        proposed = proposals or [NO_PROPOSALS] * len(requests)
        starts = [0]
        for tokens in proposed:
            starts.append(starts[-1] + 1 + len(tokens))
        failures: list[Exception | None] = [None] * len(requests)
        ids = self._choose(requests, logits, proposed, starts, failures)
        runs = [_run(ids[start:end], tokens) for start, end, tokens in zip(starts, starts[1:], proposed)]
        self._hand_out(requests, logits, runs, starts, failures)
        return failures

    def _choose(
        self,
        requests: Sequence[Request],
        logits: Tensor,
        proposed: Sequence[Sequence[int]],
        starts: Sequence[int],
        failures: list[Exception | None],
    ) -> list[int]:
        """The token of every row, as if all proposals before it were right."""
        adjusted = logits[:, : self.named]
        changing = [i for i, request in enumerate(requests) if adjusts(request)]
        if changing:
            adjusted = adjusted.clone()
        for i in changing:
            try:
                adjust(adjusted[starts[i] : starts[i + 1]], requests[i], proposed[i])
            except HeadspringError as error:
                failures[i] = error
        params = [request.params for request, tokens in zip(requests, proposed) for _ in range(1 + len(tokens))]
        ids = pick(adjusted, self._rows(params), self._uniforms(requests, proposed))
        return (ids if self.agreed is None else self.agreed(ids)).tolist()

    def _rows(self, params: list[SamplingParams]) -> RowParams:
        """The settings as columns; a step mostly has the rows of the one before."""
        if len(params) != len(self._columns[0]) or any(a is not b for a, b in zip(params, self._columns[0])):
            self._columns = params, RowParams.of(params, self.named, self.device)
        return self._columns[1]

    def _uniforms(self, requests: Sequence[Request], proposed: Sequence[Sequence[int]]) -> Tensor:
        """(R,) float64; a row beyond the last token that a request may have needs none, and gets one that is used already."""
        numbers = []
        for request, tokens in zip(requests, proposed):
            first = len(request.token_ids)
            own = request.uniforms[first : first + 1 + len(tokens)]
            numbers += [own, own[-1:].expand(1 + len(tokens) - len(own))]
        return torch.cat(numbers).to(self.device)

    def _hand_out(
        self,
        requests: Sequence[Request],
        logits: Tensor,
        runs: Sequence[Sequence[int]],
        starts: Sequence[int],
        failures: list[Exception | None],
    ) -> None:
        """Give the requests their tokens, with log-probabilities under the model itself."""
        rows = [start + j for start, run in zip(starts, runs) for j in range(len(run))]
        if len(rows) < len(logits):
            logits = logits[torch.tensor(rows, device=logits.device)]
        ids = torch.tensor([token for run in runs for token in run], device=logits.device)
        log_probs = log_probs_of_logits(logits, ids).tolist()
        place = 0
        for i, (request, run) in enumerate(zip(requests, runs)):
            own = slice(place, place + len(run))
            place += len(run)
            if failures[i] is None:
                failures[i] = _take(request, logits[own], run, log_probs[own])


def _run(ids: Sequence[int], proposed: Sequence[int]) -> Sequence[int]:
    """The tokens that stand: up to the first that was not the proposed one."""
    for j, token in enumerate(proposed):
        if ids[j] != token:
            return ids[: j + 1]
    return ids


def _take(request: Request, logits: Tensor, run: Sequence[int], log_probs: Sequence[float]) -> Exception | None:
    """Hand a run to its request, until that has enough."""
    tops = tops_of(logits, run, log_probs, request.params.logprobs)
    for token, log_prob, top in zip(run, log_probs, tops, strict=True):
        if math.isnan(log_prob):
            return HeadspringError("the model gave NaN logits; its weights or an intervention are broken")
        try:
            request.accept(token, log_prob, top)
        except HeadspringError as error:
            return error
        if request.finish_reason is not None:
            break
    return None
