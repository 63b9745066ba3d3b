"""What the engine promises around its answers: each job ends once, nothing leaks, one broken request is alone with it."""

import pytest
import torch

from headspring.artifacts import HeadspringError, UserError
from headspring.inference.engine import Engine, EngineConfig, QueueFull
from headspring.inference.engine.cache import PAGE
from headspring.inference.engine.runner import PlainRunner, RaggedRunner, groups_in
from headspring.inference.sampling_params import SamplingParams

LONG = [9] * 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(params=["ragged", "plain"])
def make(lm, request):
    """An engine with either runner."""

    def engine(clock=lambda: 0.0, **options):
        config = EngineConfig(debug=True, **{"max_sequences": 4, "chunk": 16, **options})
        runner = RaggedRunner(lm.model, config) if request.param == "ragged" else PlainRunner(lm.model, config)
        return Engine(lm.model, lm.tokenizer, config, runner=runner, clock=clock)

    return engine


def told(engine, prompt=LONG, params=GREEDY, **more):
    """A job, and the list in which its updates will stand."""
    updates = []
    return engine.submit(prompt, params, notify=updates.append, **more), updates


def is_empty(engine) -> bool:
    engine.cache.check([])
    return engine.stats().pages_used == 0 and not engine.jobs and not list(engine.scheduler)


def test_updates_add_up_to_the_answers(make):
    engine = make()
    job, updates = told(engine, params=SamplingParams(seed=1, n=3, max_tokens=9, logprobs=2, ignore_eos=True))
    engine.run()
    assert job.outcome == "finished" and len(job.generations) == 3
    for number, answer in enumerate(job.generations):
        mine = [update for update in updates if update.answer == number]
        assert [one for update in mine for one in update.token_ids] == answer.token_ids
        assert [one for update in mine for one in update.logprobs] == answer.logprobs
        assert [one for update in mine for one in update.top_logprobs] == answer.top_logprobs
        assert "".join(update.text for update in mine) == answer.text
        assert [update.finish_reason for update in mine if update.finish_reason] == [answer.finish_reason]
        assert mine[-1].finish_reason == answer.finish_reason
    assert is_empty(engine)


def test_answers_to_choose_from_are_told_when_they_are_chosen(make):
    engine = make()
    job, updates = told(engine, params=SamplingParams(seed=1, n=2, best_of=5, max_tokens=5, ignore_eos=True))
    engine.run()
    assert [update.token_ids for update in updates] == [answer.token_ids for answer in job.generations]
    means = [sum(answer.logprobs) / len(answer.logprobs) for answer in job.generations]
    assert len(means) == 2 and means == sorted(means, reverse=True)


@pytest.mark.parametrize("steps", range(0, 9, 2))
def test_a_cancelled_job_gives_everything_back_at_once(make, steps):
    engine = make()
    job, updates = told(engine, params=SamplingParams(seed=1, n=3, max_tokens=20, ignore_eos=True))
    other = engine.submit(LONG, GREEDY)
    for _ in range(steps):
        engine.step()
    engine.cancel(job)
    assert job.outcome == "cancelled" and not job.sequences and all(one.job is other for one in engine.scheduler)
    engine.cancel(job)  # changes nothing
    assert {update.finish_reason for update in updates} <= {None, "cancelled"} and updates[-1].finish_reason == "cancelled"
    engine.run()
    assert other.outcome == "finished" and is_empty(engine)


def test_a_listener_may_cancel_any_job(make):
    engine = make()
    jobs = []
    jobs += [engine.submit(LONG, GREEDY, notify=lambda update: [engine.cancel(job) for job in jobs]) for _ in range(3)]
    engine.run()
    assert {job.outcome for job in jobs} == {"cancelled"} and is_empty(engine)


def test_a_deadline_ends_what_waits_and_what_runs(make):
    now = [0.0]
    engine = make(clock=lambda: now[0], max_sequences=1, chunk=16)
    running, waiting = engine.submit(LONG, GREEDY, timeout=5), engine.submit(LONG, GREEDY, timeout=9)
    patient = engine.submit(LONG, GREEDY)
    engine.step()
    now[0] = 5.0
    engine.step()
    assert (running.outcome, waiting.outcome) == ("timeout", None)
    now[0] = 20.0
    engine.run()
    assert (waiting.outcome, patient.outcome) == ("timeout", "finished") and is_empty(engine)


def test_a_full_queue_refuses_and_says_so(make):
    engine = make(max_sequences=1, chunk=16, max_queue=2)
    engine.submit(LONG, GREEDY)
    engine.step()
    for _ in range(2):
        engine.submit(LONG, GREEDY)
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        engine.submit(LONG, GREEDY)
    assert engine.stats().rejected == 1
    engine.run()
    engine.submit(LONG, GREEDY)


def test_priority_goes_first_then_arrival(make):
    engine, ended = make(max_sequences=1, chunk=64), []

    def ask(name, priority):
        engine.submit(LONG, GREEDY, priority=priority, notify=lambda update: update.finish_reason and ended.append(name))

    for name, priority in [("a", 0), ("b", 0), ("c", 2), ("d", 1), ("e", 2)]:
        ask(name, priority)
    engine.run()
    assert ended == ["c", "e", "d", "a", "b"]
    ask("low", 0)
    engine.step()
    ask("high", 1)  # takes the only place from the one that runs
    engine.run()
    assert ended[5:] == ["high", "low"] and engine.stats().preemptions == 1


def test_what_can_never_fit_is_refused_at_once(lm, make):
    page = groups_in(EngineConfig(), lm.model, {None: 1})  # one byte a page: as many as can be used
    assert page[0].num_pages == 64 * 3
    one = sum(pages.bytes_per_page for pages in RaggedRunner(lm.model, EngineConfig()).layers)
    engine = make(memory=2 * one)
    with pytest.raises(UserError, match="40 tokens of prompt and 50 of answer need more memory"):
        engine.submit(LONG, SamplingParams(max_tokens=50))
    job = engine.submit(LONG, SamplingParams(max_tokens=2 * PAGE + 1 - len(LONG), ignore_eos=True))
    engine.run()
    assert job.outcome == "finished"
    with pytest.raises(UserError, match="less than one page"):
        make(memory=one // 4)


def test_preempted_answers_are_the_same(lm, make):
    one = sum(pages.bytes_per_page for pages in RaggedRunner(lm.model, EngineConfig()).layers)
    params = [SamplingParams(seed=seed, max_tokens=40, ignore_eos=True) for seed in range(6)]
    roomy, tight = make(), make(memory=4 * one)
    answers = []
    for engine in (roomy, tight):
        jobs = [engine.submit([7, seed], one) for seed, one in enumerate(params)]
        engine.run()
        answers.append([job.generations[0].token_ids for job in jobs])
    assert answers[0] == answers[1]
    assert roomy.stats().preemptions == 0 and tight.stats().preemptions > 0


class Broken(Exception):
    pass


def break_at(engine, poison: int) -> None:
    """Let every forward pass raise that reads the token `poison`."""
    run = engine.runner.run

    def raises(work):
        if any(poison in item.tokens for item in work):
            raise Broken
        return run(work)

    engine.runner.run = raises


def test_a_request_that_breaks_the_step_fails_alone(make):
    engine, alone = make(), make()
    alone.submit(LONG, GREEDY)
    healthy = alone.submit(LONG, GREEDY)
    alone.run()
    break_at(engine, poison=250)
    jobs = [engine.submit(prompt, GREEDY) for prompt in (LONG, [250, 3], LONG, [*LONG, 250])]
    engine.run()
    assert [job.outcome for job in jobs] == ["finished", "failed", "finished", "failed"]
    assert isinstance(jobs[1].error, Broken) and is_empty(engine)
    assert jobs[0].generations[0].token_ids == jobs[2].generations[0].token_ids == healthy.generations[0].token_ids


def test_logits_that_are_no_numbers_fail_alone(make):
    engine = make()
    run = engine.runner.run

    def poisoned(work):
        parts = run(work).split([item.rows for item in work])
        return torch.cat([part * float("nan") if 250 in item.tokens else part for part, item in zip(parts, work, strict=True)])

    engine.runner.run = poisoned
    jobs = [engine.submit(prompt, GREEDY) for prompt in (LONG, [250, 3], LONG)]
    engine.run()
    assert [job.outcome for job in jobs] == ["finished", "failed", "finished"]
    assert isinstance(jobs[1].error, HeadspringError) and is_empty(engine)


def test_a_listener_that_raises_fails_alone(make):
    engine = make()

    def raises(update):
        raise Broken

    job, other = engine.submit(LONG, GREEDY, notify=raises), engine.submit(LONG, GREEDY)
    engine.run()
    assert (job.outcome, other.outcome) == ("failed", "finished") and isinstance(job.error, Broken) and is_empty(engine)


def test_a_sampler_that_raises_for_one_fails_that_one(make, monkeypatch):
    engine = make()
    sample = engine.answering.sampler.sample

    def raises(requests, logits, proposals):
        if any(request.prompt == [250, 3] and len(request.token_ids) == 3 for request in requests):
            raise Broken
        return sample(requests, logits, proposals)

    monkeypatch.setattr(engine.answering.sampler, "sample", raises)
    jobs = [engine.submit(prompt, GREEDY) for prompt in (LONG, [250, 3], LONG)]
    engine.run()
    assert [job.outcome for job in jobs] == ["finished", "failed", "finished"]


def test_prompt_log_probabilities_are_the_rescored_ones(lm, make):
    engine = make(chunk=7)
    params = GREEDY.model_copy(update={"prompt_logprobs": 2, "n": 1})
    prompt = list(range(20, 60))
    first = engine.submit(prompt, GREEDY)
    engine.run()
    job = engine.submit(prompt, params)  # its prefix is known, and has to be computed all the same
    engine.run()
    assert first.generations[0].token_ids == job.generations[0].token_ids
    torch.testing.assert_close(torch.tensor(job.prompt_logprobs), lm.logprobs([prompt])[0], atol=1e-4, rtol=1e-4)
    assert [len(top) for top in job.prompt_tops] == [2] * 39


def test_a_known_prefix_is_not_computed_again_and_not_shown_to_others(lm):
    engine = Engine(lm.model, lm.tokenizer, EngineConfig(debug=True))
    prompt = list(range(20, 20 + 2 * PAGE + 5))

    def computed(**more) -> int:
        before = engine.stats().computed_tokens
        engine.submit(prompt, GREEDY, **more)
        engine.run()
        return engine.stats().computed_tokens - before

    whole = computed()
    assert whole == len(prompt) + GREEDY.max_tokens - 1
    assert computed() == whole - 2 * PAGE
    assert computed(key="someone else") == whole
    assert engine.stats().prefix_hits == 2 * PAGE


def test_windows_give_pages_back(tokenizer):
    from headspring.inference import LanguageModel
    from headspring.models import Attention, Block, SwiGLU
    from headspring.models.mask import Causal

    from ..tiny import tiny_model

    def block(mask):
        return Block(mixer=Attention(heads=4, kv_heads=2, mask=mask), feedforward=SwiGLU(hidden=64))

    model = tiny_model(tokenizer.vocab_size, layers=(block(Causal(window=20)), block(Causal())), context=400)
    lm = LanguageModel(model, tokenizer)
    engine = Engine(model, tokenizer, EngineConfig(debug=True, chunk=40, max_sequences=2))
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    jobs = [engine.submit(list(range(20, 130)), params), engine.submit([7], params)]
    most = 0
    while engine.step():
        windowed = next(number for number, group in enumerate(engine.cache.groups) if group.window == 20)
        held = [sum(page >= 0 for page in one.tables[windowed]) for one in engine.scheduler.running if one.tables]
        most = max([most, *held])
    assert most <= 4  # (window + chunk) / PAGE, and one at either end
    for job in jobs:
        ids = list(job.prompt)
        with torch.no_grad():
            for _ in range(30):
                ids.append(int(lm.logits([ids])[0, -1].argmax()))
        assert job.generations[0].token_ids[:30] == ids[len(job.prompt) :]
    fresh, few = (
        Engine(model, tokenizer, EngineConfig(debug=True, chunk=40, max_sequences=2)),
        params.model_copy(update={"max_tokens": 5}),
    )
    for hits in (0, 3 * PAGE):
        again = fresh.submit(list(range(20, 130)), few)
        fresh.run()
        assert again.generations[0].token_ids == jobs[0].generations[0].token_ids[:5] and fresh.stats().prefix_hits == hits


@pytest.mark.parametrize(
    ("options", "says"),
    [({"chunk": 3}, "none for some of max_sequences=64"), ({"memori": 3}, "did you mean memory"), ({"memory": 0}, "memory=0")],
    ids=str,
)
def test_a_bad_config_is_refused_in_one_line(lm, options, says):
    with pytest.raises(UserError, match=says):
        lm.engine(**options)


@pytest.mark.parametrize(
    ("prompt", "more", "says"),
    [
        ([], {}, "the prompt is empty"),
        ([10_000], {}, "10000"),
        ([3] * 96, {}, "the prompt has 96 tokens"),
        ([3], {"source": [4]}, "no encoder"),
        ([3], {"soft": object()}, "no pictures"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_in_one_line(lm, prompt, more, says):
    engine = Engine(lm.model, lm.tokenizer)
    with pytest.raises(UserError, match=says):
        engine.submit(prompt, GREEDY, **more)
    assert engine.stats().rejected == 1 and engine.stats().submitted == 0


def test_int8_pages_answer_nearly_the_same_and_take_half(lm):
    kinds = {dtype: Engine(lm.model, lm.tokenizer, EngineConfig(cache_dtype=dtype)) for dtype in ("auto", "int8")}
    bytes_of = {dtype: sum(pages.bytes_per_page for pages in engine.runner.layers) for dtype, engine in kinds.items()}
    assert bytes_of["int8"] < 0.6 * bytes_of["auto"]
    values = []
    for engine in kinds.values():
        job = engine.submit(list(range(20, 60)), GREEDY.model_copy(update={"prompt_logprobs": 0}))
        engine.run()
        values.append(torch.tensor(job.prompt_logprobs))
    assert 0 < (values[0] - values[1]).abs().max() < 0.3


@pytest.mark.parametrize("family", ["lstm", "jamba", "window_and_sinks", "griffin"])
def test_states_that_are_no_pages_survive_a_step_that_raises(family):
    """After a step of several raised, each of the others goes on from where it was, wherever the layers had got to."""
    from headspring.models.families import FAMILIES

    from .test_families import Named

    model = FAMILIES[family]().build(1).eval()
    answers = []
    for broken in (False, True):
        engine = Engine(model, Named(model.config.vocab), EngineConfig(debug=True, max_sequences=3, chunk=8))
        jobs = [engine.submit([3, 5, number], GREEDY) for number in range(3)]
        for number in range(8):
            if broken and number in (1, 3, 4):
                break_once(engine)
            engine.step()
        engine.run()
        answers.append([job.generations[0].token_ids for job in jobs])
    assert answers[0] == answers[1]


def break_once(engine) -> None:
    """Let the next forward pass of several sequences raise, after its last layer."""
    run = engine.runner.run

    def raises(work):
        engine.runner.run = run
        run(work)
        raise Broken

    engine.runner.run = raises
