"""Speculated answers follow the target's distribution: a chi-square test of the first tokens over many seeds, against the exact
probabilities. The p-values are kept with the test's results (`record_property`) and logged.

The model is a table: the logits of the next token given the last one. The draft is another table.
"""

import itertools
import logging

import pytest
import torch

from headspring.inference.adjusting import choose
from headspring.inference.engine.sampler import Sampler
from headspring.inference.generation import Request
from headspring.inference.sampling import RowParams, SamplingParams, filtered

log = logging.getLogger(__name__)
VOCAB, ANSWERS, LENGTH = 8, 3000, 3
TARGET = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 1.2
DRAFT = TARGET + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2)) * 0.8
CASES = {
    "temperature": {"temperature": 0.8},
    "filters": {"temperature": 1.3, "top_k": 6, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
}


class Letters:
    """As much of a tokenizer as a request needs that asks for no text."""

    vocab_size = VOCAB

    def stream(self):
        return None


def requests(count: int, **options) -> list[Request]:
    params = [SamplingParams(seed=seed, max_tokens=LENGTH, **options) for seed in range(count)]
    return [Request(Letters(), [0], one, context=9) for one in params]  # type: ignore[arg-type]


def drafted(request: Request, count: int) -> list[int]:
    """Proposals of the draft table, coupled by the request's own numbers."""
    proposed: list[int] = []
    for _ in range(min(count, request.remaining - 1)):
        last = (request.prompt + request.token_ids + proposed)[-1]
        proposed.append(choose(request, DRAFT[last][None], proposed))
    return proposed


def observed(sampler: Sampler, count: int = ANSWERS, **options) -> tuple[torch.Tensor, float]:
    """How often each answer came, (V,) * LENGTH, and the share of proposals that were right."""
    live, tried, right = requests(count, **options), 0, 0
    everyone = live
    while live:
        proposed = [drafted(request, 2) for request in live]
        before = [len(request.token_ids) for request in live]
        rows = [TARGET[[(request.prompt + request.token_ids)[-1], *tokens]] for request, tokens in zip(live, proposed)]
        assert not any(sampler.sample(live, torch.cat(rows), proposed))
        tried += sum(map(len, proposed))
        right += sum(len(request.token_ids) - known - 1 for request, known in zip(live, before))
        live = [request for request in live if request.finish_reason is None]
    counts = torch.zeros((VOCAB,) * LENGTH)
    for request in everyone:
        counts[tuple(request.token_ids)] += 1
    return counts, right / tried


def exact(**options) -> torch.Tensor:
    """The probability of each answer, (V,) * LENGTH, by the definitions."""
    params = SamplingParams(**options)
    rows = RowParams.of([params], VOCAB)
    probabilities = torch.zeros((VOCAB,) * LENGTH, dtype=torch.float64)
    for answer in itertools.product(range(VOCAB), repeat=LENGTH):
        probability = 1.0
        for place, token in enumerate(answer):
            written = [0, *answer[:place]]
            logits = TARGET[written[-1]].clone()
            for seen in set(written):
                logits[seen] *= params.repetition_penalty ** (-1 if logits[seen] > 0 else 1)
                count = answer[:place].count(seen)
                logits[seen] -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
            probability *= filtered(logits[None] / rows.temperature, rows).softmax(-1)[0, token].item()
        probabilities[answer] = probability
    return probabilities


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's chi-square test; answers expected fewer than 5 times are taken together."""
    counts, expected = counts.flatten().double(), probabilities.flatten() * counts.sum()
    rare = expected < 5
    assert counts[expected == 0].sum() == 0
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    return torch.special.gammaincc((kept.sum() - 1) / 2, statistic / 2).item()


@pytest.mark.parametrize("case", CASES)
def test_the_target_distribution(case, record_property):
    counts, right = observed(Sampler(VOCAB, VOCAB, torch.device("cpu")), **CASES[case])
    p = p_value(counts, exact(**CASES[case]))
    log.info("speculation, %s: p = %.3f, %.0f %% of the proposals right", case, p, 100 * right)
    record_property("p_value", p)
    record_property("accepted_share", right)
    assert 0.3 < right < 0.95  # the control: proposals are made, taken, and refused
    assert p > 1e-4


class PrefersTheDraft(Sampler):
    """A planted bug: a proposal is taken wherever the target likes it at least as much as the draft did. What it refuses is
    sampled from the target, and not from what is left of it."""

    def _choose(self, requests, logits, proposed, starts, failures):
        ids = super()._choose(requests, logits, proposed, starts, failures)
        for request, start, tokens in zip(requests, starts, proposed):
            for j, token in enumerate(tokens):
                last = (request.prompt + request.token_ids + list(tokens))[len(request.token_ids) + j]
                if TARGET[last].softmax(-1)[token] >= DRAFT[last].softmax(-1)[token]:
                    ids[start + j] = token
        return ids


class OneNumber(Sampler):
    """A planted bug: all rows of a request use the uniform number of the first."""

    def _uniforms(self, requests, proposed):
        firsts = [
            request.uniforms[len(request.token_ids)].expand(1 + len(tokens)) for request, tokens in zip(requests, proposed)
        ]
        return torch.cat(firsts)


@pytest.mark.parametrize("bug", [PrefersTheDraft, OneNumber])
def test_planted_bugs_are_found_out(bug, record_property):
    options = CASES["temperature"]
    counts, _ = observed(bug(VOCAB, VOCAB, torch.device("cpu")), count=3000, **options)
    p = p_value(counts, exact(**options))
    log.info("speculation with a planted bug, %s: p = %.3g", bug.__name__, p)
    record_property("p_value", p)
    assert p < 1e-6
