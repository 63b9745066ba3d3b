"""Speculation stays on where it pays and goes off where it does not, by a clock that the test turns."""

from itertools import pairwise

import pytest

from headspring.inference import LanguageModel
from headspring.inference.engine import Engine
from headspring.inference.engine.config import EngineConfig
from headspring.inference.sampling import SamplingParams
from headspring.inference.speculation import Controller, EarlyExit
from headspring.inference.speculation.controller import LONGEST_PERIOD, PERIOD, TRIAL

from ..tiny import tiny_model


def play(controller: Controller, steps: int, rates: dict[bool, float], answers: int = 1) -> list[bool]:
    """The way of each step, where a way gives so many tokens a second."""
    ways = []
    for _ in range(steps):
        way = controller.of(answers).way
        controller.of(answers).note(way, 1.0, int(100 * rates[way]))
        ways.append(way)
    return ways


def test_what_pays_stays():
    ways = play(Controller(), 4000, {True: 2.0, False: 1.0})
    assert ways[0] and sum(ways) > 0.97 * len(ways)


def test_what_does_not_pay_goes_off_and_is_tried_again_more_and_more_seldom():
    ways = play(Controller(), 4000, {True: 1.0, False: 1.1})
    trials = [i for i in range(1, len(ways)) if ways[i] and not ways[i - 1]]
    assert sum(ways) < 0.03 * len(ways) and len(trials) >= 3
    gaps = [b - a for a, b in pairwise(trials)]
    assert gaps == sorted(gaps) and gaps[-1] > gaps[0]


def test_times_that_it_was_given_up_are_counted():
    controller = Controller()
    for rates in ({True: 1.0, False: 2.0}, {True: 2.0, False: 1.0}) * 2:
        play(controller, 3000, rates)
    assert controller.switched_off == 2
    assert Controller().switched_off == 0


def test_a_change_of_the_text_is_noticed():
    controller = Controller()
    play(controller, 300, {True: 1.0, False: 1.2})
    ways = play(controller, 2 * LONGEST_PERIOD, {True: 3.0, False: 1.2})
    assert all(ways[-PERIOD + 2 * TRIAL :][:TRIAL]) or sum(ways[-300:]) > 250


def test_one_answer_and_many_are_told_apart():
    controller = Controller()
    for _ in range(40):
        play(controller, 20, {True: 2.0, False: 1.0}, answers=1)
        play(controller, 20, {True: 0.5, False: 1.0}, answers=13)
    assert controller.of(1).way and not controller.of(16).way and controller.of(16) is controller.of(9)


@pytest.mark.parametrize("pays", [True, False])
def test_in_the_engine(tokenizer, pays):
    """A clock that makes each row of a step cost time, or each step."""
    lm = LanguageModel(tiny_model(tokenizer.vocab_size), tokenizer)
    now = [0.0]
    engine = Engine(lm.model, tokenizer, EngineConfig(speculation=EarlyExit(layers=2)), clock=lambda: now[0])
    run = engine.runner.run

    def slow(work):
        now[0] += 1.0 if pays else sum(item.count for item in work) ** 2
        return run(work)

    engine.runner.run = slow  # type: ignore[method-assign]
    for seed in range(6):
        engine.submit(lm.prompt_ids("the"), SamplingParams(seed=seed, max_tokens=60))
        engine.run()
    assert engine.speculator.controller.of(1).best is pays
    assert engine.speculator.proposed > 20
