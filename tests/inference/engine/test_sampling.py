"""The sampler of the engine: every option alone, together, and in company, against a reference that does one row at a time."""

import random

import pytest
import torch

from headspring.artifacts import HeadspringError
from headspring.inference.engine import Engine, EngineConfig
from headspring.inference.engine.sampler import Sampler
from headspring.inference.generation import most_probable
from headspring.inference.sampling import Distribution, RowParams, SamplingParams, pick
from tests.inference.engine.stepping import request, rows_of, run

MIX = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_k": 5},
    {"seed": 3, "top_p": 0.6, "repetition_penalty": 1.4},
    {"seed": 4, "min_p": 0.2, "presence_penalty": 0.9, "frequency_penalty": 0.4},
    {"temperature": 0, "frequency_penalty": 1.5, "logit_bias": {70: 2.5, 71: -100}},
    {"seed": 5, "min_tokens": 6, "logprobs": 3},
    {"seed": 6, "structured": {"regex": "[a-z ]{4,12}"}},
]


def alone(lm, one) -> list[int]:
    """The tokens of a request, by the definitions: dense penalties, counted anew at each step."""
    written: list[int] = []
    params = one.params
    matcher = one.matcher.fork() if one.matcher else None
    while len(written) < one.new_tokens:
        tokens = one.prompt + written
        logits = lm.model.logits(lm.model(torch.tensor([tokens]))[0, -1:])[0, : lm.tokenizer.vocab_size].clone()
        for token in set(tokens):
            logits[token] = logits[token] / params.repetition_penalty if logits[token] > 0 else (
                logits[token] * params.repetition_penalty
            )  # fmt: skip
        for token in set(written):
            logits[token] -= params.presence_penalty + params.frequency_penalty * written.count(token)
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        if len(written) < params.min_tokens:
            logits[list(one.stop_ids)] = -torch.inf
        if matcher:
            logits[~torch.from_numpy(matcher.mask())] = -torch.inf
        uniform = one.uniforms[len(written)][None]
        token = pick(logits[None], RowParams.of([params], len(logits)), uniform).item()
        written.append(token)
        if matcher:
            matcher.accept(token)
        if token in one.stop_ids and len(written) > params.min_tokens:
            break
    return written


@pytest.fixture(scope="module")
def references(lm):
    with torch.no_grad():
        return [alone(lm, request(lm, "the quick", max_tokens=12, **options)) for options in MIX]


@pytest.mark.parametrize("options", MIX, ids=str)
def test_each_option_is_its_definition(lm, options, references):
    (found,) = run(lm, [request(lm, "the quick", max_tokens=12, **options)])
    assert found.token_ids == references[MIX.index(options)]
    plain = {"seed": options.get("seed"), "temperature": options.get("temperature", 1.0)}
    if len(options) > 1 and "min_tokens" not in options:  # the control: the option matters here
        (without,) = run(lm, [request(lm, "the quick", max_tokens=12, **plain)])
        assert without.token_ids != found.token_ids


@pytest.mark.parametrize("seed", range(4))
def test_the_same_tokens_in_any_company(lm, references, seed):
    chooser = random.Random(seed)
    order = [chooser.randrange(len(MIX)) for _ in range(6)]
    company = [request(lm, "the quick", max_tokens=12, **MIX[i]) for i in order]
    for i, generation in zip(order, run(lm, company)):
        assert generation.token_ids == references[i]


def test_a_seed_is_not_shared_by_prompts_and_answers(lm):
    options = {"seed": 7, "max_tokens": 8}
    first, second, third = run(
        lm, [request(lm, "a", **options), request(lm, "a", answer=1, **options), request(lm, "b", **options)]
    )
    assert first.token_ids != second.token_ids and first.token_ids != third.token_ids


def test_log_probabilities_are_the_models_own(lm):
    options = {"seed": 3, "max_tokens": 6, "temperature": 0.3, "presence_penalty": 2, "logit_bias": {5: 9.0}}
    one, every = (request(lm, "the", logprobs=count, **options) for count in (4, "all"))
    found, full = run(lm, [one, every])
    assert found.token_ids == full.token_ids
    expected = rows_of(lm, request(lm, "the"), found.token_ids).log_softmax(-1)[:-1]
    for row, token, log_prob, top, all_of_them in zip(
        expected, found.token_ids, found.logprobs, found.top_logprobs, full.top_logprobs
    ):
        assert log_prob == pytest.approx(row[token].item(), abs=1e-5)
        assert list(top) == row.topk(4).indices.tolist() and top.get(token, log_prob) == log_prob
        assert isinstance(all_of_them, Distribution) and len(all_of_them) == lm.vocab_size
        assert all_of_them[token] == log_prob
        torch.testing.assert_close(all_of_them.log_probs, row, atol=1e-5, rtol=1e-5)


def test_a_broken_row_fails_alone(lm):
    sampler = Sampler(lm.vocab_size, lm.tokenizer.vocab_size, lm.device)
    poisoned, stuck, well = (
        request(lm, "a", seed=1),
        request(lm, "a", structured={"choice": ["yes"]}),
        request(lm, "a", seed=1),
    )
    logits = torch.cat([rows_of(lm, one, []) for one in (poisoned, stuck, well)]).detach()
    logits[0, 3] = torch.nan
    logits[1] = torch.nan
    failures = sampler.sample([poisoned, stuck, well], logits)
    assert isinstance(failures[0], HeadspringError) and "NaN" in str(failures[0])
    assert isinstance(failures[1], HeadspringError) and failures[2] is None
    assert poisoned.token_ids == [] and stuck.token_ids == [] and len(well.token_ids) == 1


def test_nothing_left_to_choose_from_is_a_failure(lm):
    sampler = Sampler(lm.vocab_size, lm.tokenizer.vocab_size, lm.device)
    one = request(lm, "a", temperature=0)
    (failure,) = sampler.sample([one], torch.full((1, lm.vocab_size), -torch.inf))
    assert failure is not None and one.token_ids == []


def test_the_best_of_several(lm):
    answers = run(lm, [request(lm, "the", answer=i, seed=2, max_tokens=5, n=2, best_of=5) for i in range(5)])
    best = most_probable(answers, 2)
    means = sorted((sum(answer.logprobs) / len(answer.logprobs) for answer in answers), reverse=True)
    assert [sum(answer.logprobs) / len(answer.logprobs) for answer in best] == means[:2]


@pytest.mark.parametrize("count", [0, 3, "all"])
@pytest.mark.parametrize("chunk", [4, 512])
def test_log_probabilities_of_the_prompt(lm, count, chunk):
    engine = Engine(lm.model, lm.tokenizer, EngineConfig(chunk=chunk, max_sequences=2))
    prompt = lm.prompt_ids("the quick brown fox jumps over")
    for _ in range(2):  # the second time, pages that are known must not hide what was asked for
        job = engine.submit(prompt, SamplingParams.of(prompt_logprobs=count, max_tokens=3, seed=1, n=2))
        engine.run()
        expected = lm.model.logits(lm.model(torch.tensor([prompt])))[0, :-1].log_softmax(-1)
        given = expected.gather(-1, torch.tensor(prompt)[1:, None])[:, 0].tolist()
        assert job.prompt_logprobs == pytest.approx(given, abs=1e-5)
        if count == 0:
            assert not any(job.prompt_tops)
        for row, top in zip(expected, job.prompt_tops if count else (), strict=count != 0):
            assert len(top) == (3 if count == 3 else lm.vocab_size)
            assert all(value == pytest.approx(row[token].item(), abs=1e-4) for token, value in top.items())
            assert count == "all" or list(top) == row.topk(3).indices.tolist()
