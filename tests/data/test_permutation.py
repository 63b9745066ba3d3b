"""The stateless shuffle: a bijection, its inverse, and random enough."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headspring.data.permutation import Epochs, Permutation


@given(st.integers(1, 500), st.integers())
def test_every_element_once_and_the_inverse_is_exact(size, seed):
    shuffled = Permutation(size, seed)
    order = [shuffled(i) for i in range(size)]
    assert sorted(order) == list(range(size))
    assert [shuffled.inverse(element) for element in order] == list(range(size))


@given(st.integers(1, 10**15), st.integers(0, 10**15), st.integers())
def test_inverse_of_large_permutations(size, index, seed):
    shuffled = Permutation(size, seed)
    assert shuffled.inverse(shuffled(index % size)) == index % size


@given(st.integers(1, 60), st.integers(), st.integers(0, 200))
def test_epochs_hold_everything_once_and_places_is_their_inverse(size, seed, count):
    stream = Epochs(size, seed)
    for epoch in range(3):
        assert sorted(stream(epoch * size + i) for i in range(size)) == list(range(size))
    found = {place: element for element in range(size) for place in stream.places(element, count)}
    assert found == {place: stream(place) for place in range(count)}


def chi_square(place_of_zero, cells):
    expected = len(place_of_zero) / cells
    return sum((place_of_zero.count(cell) - expected) ** 2 / expected for cell in range(cells))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 17])
def test_every_element_is_equally_likely_at_every_place(size):
    keys = range(2000)
    # 99.99 % quantiles of chi-square with size − 1 degrees of freedom, rounded up.
    bound = {2: 16, 3: 19, 5: 24, 8: 30, 17: 45}[size]
    for place in (0, size - 1):
        assert chi_square([Permutation(size, key)(place) for key in keys], size) < bound
    assert chi_square([0 for _ in keys], size) > bound, "control: the identity is noticed"


def test_neighbours_part():
    """After a shuffle of n elements, neighbours are n/3 apart on average; a rotation (the control) leaves them at 1."""
    n = 10_000

    def distance(order):
        return sum(abs(a - b) for a, b in pairwise(order)) / (n - 1)

    assert abs(distance([Permutation(n, 1)(i) for i in range(n)]) - n / 3) < 0.03 * n
    assert distance([(i + 17) % n for i in range(n)]) < 10


def test_keys_give_different_orders():
    orders = {tuple(Permutation(50, *key)(i) for i in range(50)) for key in [(0,), (1,), ("0",), (0, 1), (0, "a", 1)]}
    assert len(orders) == 5


@pytest.mark.parametrize("index", [-1, 10])
def test_outside_is_an_error(index):
    with pytest.raises(IndexError):
        Permutation(10, 0)(index)
    with pytest.raises(IndexError):
        Permutation(10, 0).inverse(index)
