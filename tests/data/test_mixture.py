"""The mixture against the obvious way to write it: list every sample's due time and sort."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from headspring.artifacts import UserError
from headspring.data.mixture import Interleaving, Mixture, Phase

whole_weights = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def sorted_by_due_time(weights, length):
    """The first `length` samples as (source, j)."""
    due = [(Fraction(2 * j + 1, 2 * w), s, j) for s, w in enumerate(weights) if w for j in range(length)]
    return [(s, j) for _, s, j in sorted(due)[:length]]


class ForgetsTies(Interleaving):
    """A planted bug: an inverse that breaks ties in favour of the last source."""

    def index(self, source, j):
        mirrored = Interleaving(self.weights[::-1], self.length)
        return mirrored.index(len(self.weights) - 1 - source, j)


@given(whole_weights, st.integers(1, 60))
def test_interleaving_is_the_sorted_order(weights, length):
    expected = sorted_by_due_time(weights, length)
    mixed = Interleaving(weights, length)
    assert [mixed.locate(i) for i in range(length)] == expected
    assert [mixed.index(*place) for place in expected] == list(range(length))
    for n in range(length + 1):
        assert mixed.counts(n) == [sum(s == source for s, _ in expected[:n]) for source in range(len(weights))]


def test_the_comparison_notices_a_planted_bug():
    expected = sorted_by_due_time([1, 1, 2], 12)
    wrong = ForgetsTies([1, 1, 2], 12)
    assert [wrong.index(*place) for place in expected] != list(range(12))


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6), st.integers(0, 10**12))
def test_inverse_and_shares_far_into_a_run(weights, i):
    mixed = Interleaving(weights, i + 1)
    assert mixed.index(*mixed.locate(i)) == i
    for weight, count in zip(weights, mixed.counts(i)):
        assert abs(count - Fraction(i * weight, sum(weights))) <= Fraction(len(weights) + 1, 2)


decimals = st.floats(0, 100, allow_subnormal=False).map(lambda x: round(x, 3))
names = ["a", "b", "c"]
some_weights = st.fixed_dictionaries(dict.fromkeys(names, decimals)).filter(lambda w: any(w.values()))


@given(st.lists(some_weights, max_size=3), some_weights, st.integers(0, 200))
def test_a_schedule_counts_every_source_through_its_phases(curriculum, weights, num_samples):
    phases = tuple(Phase(until=(n + 1) / (len(curriculum) + 1), weights=w) for n, w in enumerate(curriculum))
    schedule = Mixture(weights=weights, curriculum=phases).schedule(dict.fromkeys(names, 7), num_samples)
    seen = dict.fromkeys(names, 0)
    for i in range(num_samples):
        source, k = schedule.locate(i)
        assert k == seen[source], "a source goes on where it stopped"
        assert schedule.index(source, k) == i
        seen[source] += 1
    assert seen == schedule.counts and schedule.num_samples == num_samples
    for i in (-1, num_samples):
        with pytest.raises(IndexError):
            schedule.locate(i)
    for source, count in seen.items():
        with pytest.raises(IndexError):
            schedule.index(source, count)


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10**6), min_size=1))
def test_by_default_one_epoch_is_everything_once(sizes):
    assert Mixture().schedule(sizes, sum(sizes.values())).counts == sizes
    assert Mixture().schedule(sizes, 3 * sum(sizes.values())).counts == {name: 3 * size for name, size in sizes.items()}


def test_weights_change_during_the_run():
    mixture = Mixture(curriculum=[{"until": 0.3, "weights": {"a": 1}}], weights={"a": 1, "b": 3})
    schedule = mixture.schedule({"a": 10, "b": 10}, 100)
    sources = [schedule.locate(i)[0] for i in range(100)]
    assert set(sources[:30]) == {"a"}
    assert sources[30:].count("b") in (52, 53)
    assert schedule.locate(29) == ("a", 29) and schedule.index("a", 30) > 30


def test_weights_are_read_as_the_decimals_they_are_written_as():
    schedule = Mixture(weights={"a": 0.1, "b": 0.3}).schedule({"a": 1, "b": 1}, 400)
    assert schedule.phases[0].weights == (1, 3)
    assert schedule.counts == {"a": 100, "b": 300}


def test_tree():
    mixture = Mixture(curriculum=[{"until": 0.5, "weights": {"code": 1}}], weights={"code": 1, "prose": 3})
    tree = mixture.schedule({"code": 20, "prose": 15, "rest": 5}, 40).tree(
        {"code": 20, "prose": 15, "rest": 5}, {"code": 2000, "prose": 1500, "rest": 500}
    )
    assert tree.splitlines() == [
        "mixture: 40 samples",
        "├── samples 0 … 19",
        "│   ├── code  100.00%        20 samples     1.00 epochs of 2,000 tokens",
        "│   ├── prose left out",
        "│   └── rest  left out",
        "└── samples 20 … 39",
        "    ├── code   25.00%         5 samples     0.25 epochs of 2,000 tokens",
        "    ├── prose  75.00%        15 samples     1.00 epochs of 1,500 tokens",
        "    └── rest  left out",
    ]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"weights": {"a": -1}}, "greater than or equal to 0"),
        ({"weights": {"a": 0, "b": 0}}, "every weight is zero"),
        ({"weights": {}}, "every weight is zero"),
        ({"weights": {"a": float("nan")}}, "finite"),
        ({"curriculum": [{"until": 0.5, "weights": {"a": 0}}]}, "every weight is zero"),
        ({"curriculum": [{"until": 0, "weights": {"a": 1}}]}, "greater than 0"),
        ({"curriculum": [{"until": 1.5, "weights": {"a": 1}}]}, "less than or equal to 1"),
        (
            {"curriculum": [{"until": 0.5, "weights": {"a": 1}}, {"until": 0.5, "weights": {"a": 1}}]},
            "larger than the one",
        ),
        ({"curriculum": [{"weights": {"a": 1}}, {"until": 0.5, "weights": {"a": 1}}]}, "larger than the one"),
        ({"curriculum": [{"weights": {"a": 1}}], "weights": {"a": 1}}, "never used"),
        ({"wieghts": {"a": 1}}, "Extra inputs"),
    ],
)
def test_bad_mixtures_are_refused(mixture, message):
    with pytest.raises(ValidationError, match=message):
        Mixture.model_validate(mixture)


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(UserError, match=r"no source 'stdlb'; did you mean 'stdlib'\?"):
        Mixture(weights={"stdlb": 1}).schedule({"stdlib": 3, "topics": 4}, 10)
    with pytest.raises(UserError, match="no source 'zzz'; the sources are stdlib, topics"):
        Mixture(curriculum=[{"weights": {"zzz": 1}}]).schedule({"stdlib": 3, "topics": 4}, 10)
