"""A shuffle that is a function: element i of a random order of 0 … n − 1, and its inverse, without a table.

How: a Feistel network over pairs of digits in base ⌈√n⌉ permutes 0 … ⌈√n⌉² − 1; what lands outside 0 … n − 1 is sent
through again until it lands inside (cycle walking). Since ⌈√n⌉² − n ≤ 2√n, one pass is nearly always enough.
Why not a shuffled array: it costs memory and a pass for every epoch, and resuming must rebuild it. Why not a linear
congruence: neighbours stay correlated. What it gives up: about ten microseconds a call in Python; and it is a shuffle,
not cryptography.

Sources: Luby and Rackoff 1988 (Feistel networks as permutations); Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002 (cycle walking, mixed radix); Steele et al. 2014 (SplitMix64, the round function).
"""

import hashlib
from functools import lru_cache
from math import isqrt

ROUNDS = 6
MASK = (1 << 64) - 1


class Permutation:
    """A permutation of 0 … `size` − 1 chosen by `key` (any number of strings and integers)."""

    def __init__(self, size: int, *key: str | int):
        assert size >= 1, "a permutation needs at least one element"
        self.size = size
        self._base = isqrt(size - 1) + 1
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """The element at place `index` of the shuffled order."""
        self._check(index)
        while True:
            left, right = divmod(index, self._base)
            for key in self._keys:
                left, right = right, (left + _mix(right ^ key)) % self._base
            index = left * self._base + right
            if index < self.size:
                return index

    def inverse(self, element: int) -> int:
        """The place at which `element` stands: `inverse(p(i)) == i`."""
        self._check(element)
        while True:
            left, right = divmod(element, self._base)
            for key in reversed(self._keys):
                left, right = (right - _mix(left ^ key)) % self._base, left
            element = left * self._base + right
            if element < self.size:
                return element

    def _check(self, index: int) -> None:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside a permutation of {self.size}")


class Epochs:
    """`size` elements again and again, in another order every epoch: place p ↔ element, both ways in closed form."""

    def __init__(self, size: int, *key: str | int):
        self.size, self._key = size, key

    def __call__(self, place: int) -> int:
        """The element at `place`, any integer ≥ 0."""
        epoch, within = divmod(place, self.size)
        return self._order(epoch)(within)

    def places(self, element: int, count: int) -> list[int]:
        """The places below `count` at which `element` stands, ascending: one an epoch."""
        epochs = range(-(-count // self.size))
        found = [epoch * self.size + self._order(epoch).inverse(element) for epoch in epochs]
        return [place for place in found if place < count]

    def _order(self, epoch: int) -> Permutation:
        return permutation(self.size, *self._key, epoch)


@lru_cache(maxsize=4096)
def permutation(size: int, *key: str | int) -> Permutation:
    """`Permutation(size, *key)`, kept for the next call."""
    return Permutation(size, *key)


def _mix(value: int) -> int:
    """SplitMix64's finalizer: 64 bits in, 64 well-mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
