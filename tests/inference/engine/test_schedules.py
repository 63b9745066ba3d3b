"""Random schedules: whatever arrives when, shares what, is preempted or cancelled, every answer is the reference's.

Page pools so small that sequences are preempted, chunks so small that prompts are read in many steps, prompts that begin alike,
several answers to one prompt, beams, priorities: the engine decides differently each time and must say the same.
"""

import math
import random

import pytest
import torch

from headspring.inference.engine import Engine, EngineConfig, QueueFull
from headspring.inference.engine.cache import PAGE, Cache
from headspring.inference.engine.runner import RaggedRunner
from headspring.inference.sampling_params import SamplingParams

from ..reference_engine import ReferenceEngine

PROMPTS = [
    [5, 6, 7],
    [9] * 31 + [4, 8],
    [9] * 31 + [4, 8, 3] + list(range(20, 50)),
    [9] * 31 + [4, 8, 3] + list(range(20, 52)),
    [*range(40, 110), 7],
    [2],
]
NEW = 8  # tokens, at most
SETTINGS = [
    {"temperature": 0.0},
    {"seed": 3},
    {"seed": 4, "n": 3, "temperature": 0.7},
    {"seed": 5, "n": 2, "best_of": 4},
    {"seed": 6, "top_p": 0.9, "top_k": 40, "min_tokens": 5},
    {"beam_width": 3, "n": 2},
]


@pytest.fixture(scope="module")
def expected(lm):
    """The reference's answer to each prompt under each setting, made when first asked for."""
    made, reference = {}, ReferenceEngine(lm)

    def answers(prompt: int, setting: int, tokens: int):
        key = prompt, setting, tokens
        if key not in made:
            made[key] = reference.answers(PROMPTS[prompt], params_of(setting, tokens))
        return made[key]

    return answers


def params_of(setting: int, tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=False, **SETTINGS[setting])


def bytes_of_page(lm) -> int:
    layers = RaggedRunner(lm.model, EngineConfig(max_sequences=1)).layers
    return sum(pages.bytes_per_page for pages in layers if pages is not None)


def play(lm, expected, seed: int, room: float = 1.0) -> dict[str, int]:
    """One random schedule, checked; what the engine counted. `room` is for what the memory holds beside pages."""
    luck = random.Random(seed)
    sequences = luck.choice([1, 2, 3, 8])
    config = EngineConfig(
        max_sequences=sequences,
        chunk=max(sequences, luck.choice([3, 8, 40, 200])),
        memory=math.ceil(bytes_of_page(lm) * luck.choice([3, 4, 6, 12, 40]) * room),
        prefix_sharing=luck.random() < 0.8,
        max_queue=luck.choice([None, None, 3]),
        debug=True,
    )
    engine, clock = Engine(lm.model, lm.tokenizer, config, clock=lambda: clock[0]), [0.0]
    asked = []
    while len(asked) < 7 or engine.jobs:
        if len(asked) < 7 and luck.random() < 0.5:
            asked.append((None, prompt := luck.randrange(len(PROMPTS)), setting := luck.randrange(len(SETTINGS)), NEW))
            timeout = 3.0 if luck.random() < 0.1 else None
            try:
                job = engine.submit(
                    PROMPTS[prompt],
                    params_of(setting, NEW),
                    priority=luck.randrange(3),
                    key=luck.choice(["", "", "a"]),
                    timeout=timeout,
                    notify=(lambda update: None) if luck.random() < 0.3 else None,
                )
                asked[-1] = (job, prompt, setting, NEW)
            except QueueFull:
                pass
        if engine.jobs and luck.random() < 0.02:
            engine.cancel(luck.choice(list(engine.jobs.values())))
        clock[0] += luck.random()
        engine.step()
    for job, *key in asked:
        if job is not None and job.outcome == "finished":
            check(job, expected(*key))
    engine.cache.check([])
    assert engine.stats().pages_used == 0
    return {"finished": engine.counts["finished"], "preempted": engine.scheduler.preemptions, "hits": engine.cache.hits}


def check(job, answers) -> None:
    assert [one.token_ids for one in job.generations] == [one.token_ids for one in answers]
    assert [one.text for one in job.generations] == [one.text for one in answers]
    assert [one.finish_reason for one in job.generations] == [one.finish_reason for one in answers]
    for one, other in zip(job.generations, answers, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-4, rtol=1e-4)


def play_many(lm, expected, seeds, room: float = 1.0) -> dict[str, int]:
    total: dict[str, int] = {}
    for seed in seeds:
        for name, count in play(lm, expected, seed, room).items():
            total[name] = total.get(name, 0) + count
    return total


def test_every_schedule_gives_the_references_answers(lm, expected):
    counted = play_many(lm, expected, range(8))
    assert counted["finished"] > 25 and counted["preempted"] > 10 and counted["hits"] > 10 * PAGE


@pytest.mark.slow
def test_many_schedules_give_the_references_answers(lm, expected):
    play_many(lm, expected, range(1000, 1400))


def test_control_a_page_taken_for_another_is_noticed(lm, expected, monkeypatch):
    """An index that compares the tokens of a page and not what came before it."""
    known = Cache._known

    def forgetful(cache, sequence):
        nodes = known(cache, sequence)
        if not nodes:
            wanted = tuple(sequence.tokens[:PAGE])[-4:]
            nodes = [node for node in cache.index.values() if node.key[1][-4:] == wanted and len(sequence.tokens) > PAGE][:1]
        return nodes or [node for node in cache.index.values() if len(sequence.tokens) > PAGE][:1]

    monkeypatch.setattr(Cache, "_known", forgetful)
    with pytest.raises(AssertionError):
        play_many(lm, expected, range(30))


def test_control_a_copy_that_is_forgotten_is_noticed(lm, expected, monkeypatch):
    monkeypatch.setattr(RaggedRunner, "copy", lambda runner, copies: None)
    with pytest.raises(AssertionError):
        play_many(lm, expected, range(30))
