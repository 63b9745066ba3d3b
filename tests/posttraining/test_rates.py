"""Intervals against known values and simulation."""

import numpy as np
import pytest

from headspring.posttraining.rates import difference, rate, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (50, 100, 0.4038, 0.5962)]
)
def test_wilson_against_published_values(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_rate_of_nothing():
    assert rate([]) == {"rate": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    assert rate([True, False])["rate"] == 0.5


def test_pairing_makes_the_interval_of_the_difference_narrow():
    rng = np.random.default_rng(0)
    before = list(rng.random(400) < 0.5)
    after = [bool(value or rng.random() < 0.1) for value in before]  # only ever better
    found = difference(before, after)
    assert found["low"] > 0 and found["low"] < found["mean"] < found["high"]
    unpaired = 1.96 * np.sqrt(2 * 0.25 / 400)
    assert found["high"] - found["low"] < unpaired
    assert difference(before, before) == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert difference(after, before)["high"] < 0


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        before, after = rng.random(150) < 0.4, rng.random(150) < 0.5
        found = difference(list(before), list(after), seed=trial, num_resamples=500)
        inside += found["low"] <= 0.1 <= found["high"]
    assert 180 <= inside <= 200


def test_answers_must_be_to_the_same_tasks():
    with pytest.raises(ValueError, match="same tasks"):
        difference([True], [True, False])
