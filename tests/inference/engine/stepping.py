"""Requests run by the sampler alone: no cache, no scheduler, each text read again at each step."""

from collections.abc import Callable, Sequence

import torch

from headspring.inference import LanguageModel
from headspring.inference.engine.sampler import Sampler
from headspring.inference.generation import Generation, Request
from headspring.inference.sampling import SamplingParams

Propose = Callable[[Request], Sequence[int]]


def request(lm: LanguageModel, prompt: str | list[int], answer: int = 0, **options) -> Request:
    ids = prompt if isinstance(prompt, list) else lm.prompt_ids(prompt)
    ends = [end for end in (lm.tokenizer.eos_id, lm.tokenizer.end_id) if end is not None]
    return Request(lm.tokenizer, ids, SamplingParams.of(**options), context=lm.context, end_ids=ends, answer=answer)


@torch.no_grad()
def run(lm: LanguageModel, requests: Sequence[Request], propose: Propose | None = None) -> list[Generation]:
    """Step all requests together until each has finished. A failure is raised."""
    sampler = Sampler(lm.vocab_size, lm.tokenizer.vocab_size, lm.device)
    while live := [request for request in requests if request.finish_reason is None]:
        proposed = [list(propose(request))[: request.remaining - 1] if propose else [] for request in live]
        rows = [rows_of(lm, request, tokens) for request, tokens in zip(live, proposed)]
        for failure in sampler.sample(live, torch.cat(rows), proposed):
            if failure is not None:
                raise failure
    return [request.generation() for request in requests]


def rows_of(lm: LanguageModel, request: Request, proposed: Sequence[int]) -> torch.Tensor:
    """Logits after the text so far, and after each proposed token."""
    tokens = request.prompt + request.token_ids + list(proposed)
    return lm.model.logits(lm.model(torch.tensor([tokens]))[0, len(tokens) - 1 - len(proposed) :])
