"""`generate` against a generator without cache and batch, and every identity that a caller relies on."""

from dataclasses import replace

import pytest
import torch

from headspring.artifacts import HeadspringError, UserError
from headspring.inference import Generation, LanguageModel, SamplingParams
from headspring.inference.engine.runner import RaggedRunner, Tables

from .reference import generate as reference
from .tiny import tiny_model

PROMPTS = ["def", "the quick brown fox", "x", "Straße 🙂 and the lazy dog jumps over", "", "日本"]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"seed": 5},
    {"seed": 6, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    {"seed": 7, "temperature": 2.0, "min_tokens": 10},
]


def same(some: list[Generation], others: list[Generation]) -> bool:
    """All but the last bits of the log-probabilities, which depend on the shape of a matrix product."""
    pairs = list(zip(some, others, strict=True))
    close = [pytest.approx(one.logprobs, abs=1e-4) == other.logprobs for one, other in pairs]
    return all(close) and all(replace(one, logprobs=[]) == replace(other, logprobs=[]) for one, other in pairs)


def check_against_reference(lm: LanguageModel, prompts, answers, **options):
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, log_probs = reference(lm, lm.prompt_ids(prompt), SamplingParams(**options))
        assert answer.token_ids == ids
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(log_probs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_cached_batch_is_the_reference(lm, options):
    options = {"max_tokens": 24, **options}
    check_against_reference(lm, PROMPTS, lm.generate(PROMPTS, **options), **options)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_batch_is_single(lm, options):
    together = lm.generate(PROMPTS, max_tokens=16, **options)
    for prompt, one in zip(PROMPTS, together, strict=True):
        assert same(lm.generate(prompt, max_tokens=16, **options), [one])


def test_control_another_sequences_pages_are_noticed(lm, monkeypatch):
    honest = [answer.token_ids for answer in lm.generate(PROMPTS, max_tokens=16, temperature=0.0)]
    tables = Tables.of
    monkeypatch.setattr(Tables, "of", lambda self, rows, device: tables(self, rows, device) * 0)
    assert [answer.token_ids for answer in lm.generate(PROMPTS, max_tokens=16, temperature=0.0)] != honest


def params_that_end_rows_early(lm) -> list[SamplingParams]:
    """Stop ids that greedy answers contain at different places, so that rows leave the batch one after another."""
    answers = lm.generate(PROMPTS, max_tokens=24, temperature=0.0, ignore_eos=True)
    stops = [(answer.token_ids[3 * row + 2],) for row, answer in enumerate(answers)]
    return [SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=stop) for stop in stops]


def test_rows_that_finish_leave_the_batch_unharmed(lm):
    params = params_that_end_rows_early(lm)
    answers = lm.generate(PROMPTS, params)
    assert len({len(answer.token_ids) for answer in answers}) > 2
    for prompt, one, answer in zip(PROMPTS, params, answers, strict=True):
        assert answer.token_ids == reference(lm, lm.prompt_ids(prompt), one)[0]


def test_control_hidden_states_of_others_are_noticed(lm, monkeypatch):
    params = params_that_end_rows_early(lm)
    honest = [answer.token_ids for answer in lm.generate(PROMPTS, params)]
    run = RaggedRunner.run
    monkeypatch.setattr(RaggedRunner, "run", lambda runner, work: run(runner, work).flip(0))
    assert [answer.token_ids for answer in lm.generate(PROMPTS, params)] != honest


def test_a_short_row_beside_a_long_one_gets_its_whole_context(lm):
    prompts = [[5] * (lm.context - 3), [6] * 40, [7, 8]]
    options = {"max_tokens": 1000, "temperature": 0.0, "ignore_eos": True}
    answers = lm.generate(prompts, **options)
    assert [len(answer.token_ids) for answer in answers] == [lm.context - len(prompt) for prompt in prompts]
    assert {answer.finish_reason for answer in answers} == {"length"}
    check_against_reference(lm, prompts, answers, **options)


def test_neither_batch_size_nor_order_matters(lm):
    honest = lm.generate(PROMPTS, max_tokens=12, seed=1)
    assert same(lm.generate(PROMPTS, max_tokens=12, seed=1, batch_size=2), honest)
    assert same(lm.generate(PROMPTS[::-1], max_tokens=12, seed=1)[::-1], honest)


def test_settings_can_differ_by_row(lm):
    params = [SamplingParams(max_tokens=5 + row, **options) for row, options in enumerate(SETTINGS)]
    answers = lm.generate(PROMPTS[:5], params)
    for prompt, one, answer in zip(PROMPTS, params, answers, strict=False):
        assert same(lm.generate(prompt, one), [answer])


def test_a_seed_decides_and_its_absence_does_not(lm):
    first, second = (lm.generate("the", max_tokens=20, seed=3)[0].token_ids for _ in range(2))
    assert first == second
    assert lm.generate("the", max_tokens=20, seed=4)[0].token_ids != first
    assert len({tuple(lm.generate("the", max_tokens=20)[0].token_ids) for _ in range(4)}) > 1


def test_several_answers_to_each_prompt_are_different_and_reproducible(lm):
    answers = lm.generate(["a", "b"], max_tokens=12, seed=1, n=4)
    assert [answer.prompt_token_ids for answer in answers] == [lm.prompt_ids(p) for p in "aaaabbbb"]
    assert len({tuple(answer.token_ids) for answer in answers}) == 8
    assert same(lm.generate("b", max_tokens=12, seed=1, n=4), answers[4:])


def answers_and_work(lm, **options) -> tuple[list[Generation], int]:
    """Four answers to each prompt, and how many tokens went through the model."""
    engine = lm.engine()
    jobs = [engine.submit(lm.prompt_ids(prompt), SamplingParams(n=4, max_tokens=12, **options)) for prompt in PROMPTS]
    engine.run()
    return [answer for job in jobs for answer in job.generations], engine.stats().computed_tokens


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_prompt_asked_several_times_is_read_once(lm, monkeypatch, options):
    """The same samples as from copies of the prompt, each read by itself: the law of the answers is untouched."""
    shared, tokens = answers_and_work(lm, **options)
    written = sum(len(answer.token_ids) - 1 for answer in shared)  # the last token of an answer is never read
    assert tokens == sum(len(lm.prompt_ids(prompt)) for prompt in PROMPTS) + written
    for prompt, place in zip(PROMPTS, range(0, len(shared), 4), strict=True):
        for answer in range(4):
            ids, _ = reference(lm, lm.prompt_ids(prompt), SamplingParams(max_tokens=12, **options), answer)
            assert shared[place + answer].token_ids == ids


def test_control_pages_that_are_not_copied_for_a_fork_are_noticed(lm, monkeypatch):
    honest, _ = answers_and_work(lm, seed=5)
    monkeypatch.setattr(RaggedRunner, "copy", lambda runner, copies: None)
    assert not same(answers_and_work(lm, seed=5)[0], honest)


def test_returned_log_probs_are_the_rescored_ones(lm):
    options = {"max_tokens": 20, "seed": 2, "temperature": 0.7, "top_k": 30, "repetition_penalty": 1.3}
    for answer in lm.generate(PROMPTS, **options):
        whole = answer.prompt_token_ids + answer.token_ids
        rescored = lm.logprobs([whole])[0][-len(answer.token_ids) :]
        torch.testing.assert_close(torch.tensor(answer.logprobs), rescored, atol=1e-4, rtol=1e-4)


def test_top_log_probs(lm):
    answer = lm.generate("the", max_tokens=6, temperature=0.0, logprobs=3)[0]
    for token, log_prob, top in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True):
        assert len(top) == 3 and next(iter(top)) == token
        assert top[token] == pytest.approx(log_prob, abs=1e-5)
    assert lm.generate("the", max_tokens=6)[0].top_logprobs is None


def test_min_tokens_keeps_stop_tokens_away(lm):
    first = lm.generate("the", max_tokens=9, temperature=0.0)[0].token_ids[0]
    stopped = lm.generate("the", max_tokens=9, temperature=0.0, stop_token_ids=[first])[0]
    assert (stopped.token_ids, stopped.text, stopped.finish_reason) == ([first], "", "stop")
    kept = lm.generate("the", max_tokens=9, temperature=0.0, stop_token_ids=[first], min_tokens=4)[0]
    assert len(kept.token_ids) >= 4 and first not in kept.token_ids[:4]


def test_ids_without_a_name_are_never_sampled(tokenizer):
    wide = LanguageModel(tiny_model(tokenizer.vocab_size + 500), tokenizer)
    answers = wide.generate(PROMPTS, max_tokens=20, seed=1, temperature=3.0)
    assert max(token for answer in answers for token in answer.token_ids) < tokenizer.vocab_size
    check_against_reference(wide, PROMPTS, answers, max_tokens=20, seed=1, temperature=3.0)


def test_nan_is_an_error_not_an_answer(lm):
    with lm.intervene({"final": lambda x: x * float("nan")}), pytest.raises(HeadspringError, match="NaN"):
        lm.generate("the", max_tokens=3)


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([1] * 96, {}, "context 96"),
        ([[]], {}, "empty"),
        ([[1, 10_000]], {}, "10000"),
        ([[1, -1]], {}, "-1"),
        ("x", {"stop_token_ids": [10_000]}, "10000"),
        ("x", {"batch_size": 0}, "batch_size"),
        ("x", {"temperatur": 0}, "did you mean temperature"),
        ("x", {"params": SamplingParams(), "top_k": 3}, "not both"),
        (["x", "y"], {"params": [SamplingParams()]}, "1 sampling params for 2"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_in_one_line(lm, prompt, options, says):
    with pytest.raises(UserError, match=says) as caught:
        lm.generate(prompt, **options)
    assert "\n" not in str(caught.value)


def test_no_prompts_no_answers(lm):
    assert lm.generate([]) == []
