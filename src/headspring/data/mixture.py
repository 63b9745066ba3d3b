"""The mixture: which source sample i comes from, as a function with an exact inverse.

How: the j-th sample of a source with weight w is due at time (j + ½) / w; the run is all samples in the order in which
they are due, ties going to the first source. So every prefix of the run holds the sources in the asked proportion: none
of S sources is ever more than (S + 1) / 2 samples off its share. Both directions, `locate(i) → (source, k)` and
`index(source, k) → i`, are closed formulas in whole numbers. A curriculum is a list of such phases; a source goes on in
the next phase at the sample where it stopped.

Why not a weighted random draw: its inverse needs the whole history, and short runs drift from their weights. What it
gives up: the order of sources is regular, not random. The samples of a source are shuffled anyway.
"""

import difflib
import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from headspring.artifacts import UserError, Value

Weight = Annotated[float, Field(ge=0)]
Weights = dict[str, Weight]


def _some_weight(weights: Weights | None) -> Weights | None:
    if weights is not None and not any(weights.values()):
        raise ValueError("every weight is zero; give at least one source a weight above 0")
    return weights


class Phase(Value):
    """Weights that hold until the fraction `until` of the run is done; null means to the end."""

    until: float | None = Field(default=None, gt=0, le=1)
    weights: Weights

    _check = field_validator("weights")(_some_weight)


class Mixture(Value):
    """Weights by source: shares of the samples, scaled to sum to 1; a source that is not named is left out.

    Without `weights` each source counts by its size, so that one epoch covers everything exactly once.
    `curriculum` replaces the weights up to each phase's `until`; after the last phase `weights` hold.
    """

    weights: Weights | None = None
    curriculum: tuple[Phase, ...] = ()

    _check = field_validator("weights")(_some_weight)

    @model_validator(mode="after")
    def _phases_in_order(self) -> "Mixture":
        ends = [1.0 if phase.until is None else phase.until for phase in self.curriculum]
        if any(second <= first for first, second in pairwise(ends)):
            raise ValueError("curriculum: each `until` must be larger than the one before; only the last may be null")
        if self._reaches_the_end and self.weights is not None:
            raise ValueError("weights: never used, since the curriculum reaches the end of the run; leave one out")
        return self

    def schedule(self, sizes: Mapping[str, int], num_samples: int) -> "Schedule":
        """The run of `num_samples` samples over sources of `sizes` samples an epoch each.

        Raises `UserError` for a source that `sizes` does not have."""
        names = tuple(sizes)
        self.named(names)
        base: Weights = dict(self.weights) if self.weights is not None else {name: sizes[name] for name in names}
        phases, start = [], 0
        for phase in (*self.curriculum, Phase(until=None, weights=base)):
            end = num_samples if phase.until is None else int(Fraction(str(phase.until)) * num_samples)
            if end > start:
                phases.append(Interleaving(_whole_numbers(phase.weights, names), end - start))
            start = max(start, end)
        return Schedule(names, phases)

    def named(self, known: Sequence[str]) -> list[str]:
        """Those of `known` that are given a weight above 0. Raises `UserError` for a name that is not among `known`."""
        mappings = [phase.weights for phase in self.curriculum] + ([self.weights] if self.weights else [])
        for name in (name for mapping in mappings for name in mapping):
            if name not in known:
                raise UserError(f"mixture: no source '{name}'; {nearest(name, known, 'the sources are')}")
        return [name for name in known if any(mapping.get(name) for mapping in mappings)]

    @property
    def by_size(self) -> bool:
        """Whether for some part of the run every source counts by its size."""
        return self.weights is None and not self._reaches_the_end

    @property
    def _reaches_the_end(self) -> bool:
        return bool(self.curriculum) and self.curriculum[-1].until in (None, 1.0)


class Interleaving:
    """`length` samples of S sources with whole-number `weights`, each at its own even pace. O(S log S) a call."""

    def __init__(self, weights: Sequence[int], length: int):
        self.weights, self.length = tuple(weights), length
        self._total = sum(weights)
        self._active = [s for s, weight in enumerate(weights) if weight]
        common = lcm(*(weights[s] for s in self._active))
        # Sample j is due at (2j + 1) / (2·weight), which times 2·common is the whole number (2j + 1)·pace.
        self._pace = [common // weight if weight else 0 for weight in weights]

    def locate(self, rank: int) -> tuple[int, int]:
        """Sample `rank` is sample j of source s: returns (s, j)."""
        counts = self.counts(rank)
        source = min(self._active, key=lambda s: ((2 * counts[s] + 1) * self._pace[s], s))
        return source, counts[source]

    def index(self, source: int, j: int) -> int:
        """The rank of sample j of `source`: how many samples are due before it."""
        twice, weight = 2 * j + 1, self.weights[source]  # due at twice / (2·weight)
        rank = j
        for other in self._active:
            if other < source:  # wins ties: samples due at or before: ⌊w·t + ½⌋
                rank += (self.weights[other] * twice + weight) // (2 * weight)
            elif other > source:  # loses ties: samples due before: ⌈w·t − ½⌉
                rank -= (weight - self.weights[other] * twice) // (2 * weight)
        return rank

    def counts(self, rank: int) -> list[int]:
        """How many of the first `rank` samples each source has."""
        # ⌊w·t + ½⌋ samples are due at time t; their sum is at most total·t + S/2, so this t is never too late.
        time = max(0, rank - len(self._active) // 2)
        counts = [(2 * weight * time + self._total) // (2 * self._total) for weight in self.weights]
        heap = [((2 * counts[s] + 1) * self._pace[s], s) for s in self._active]
        heapq.heapify(heap)
        for _ in range(rank - sum(counts)):
            _, s = heap[0]
            counts[s] += 1
            heapq.heapreplace(heap, ((2 * counts[s] + 1) * self._pace[s], s))
        return counts


class Schedule:
    """A mixture over a run of known length: phases one after the other. Pure functions of their arguments."""

    def __init__(self, names: Sequence[str], phases: Sequence[Interleaving]):
        self.names, self.phases = tuple(names), tuple(phases)
        # Samples before each phase: of the run, and of each source.
        self._starts, self._offsets = [0], [[0] * len(self.names)]
        for phase in phases:
            self._starts.append(self._starts[-1] + phase.length)
            self._offsets.append([a + b for a, b in zip(self._offsets[-1], phase.counts(phase.length))])

    @property
    def num_samples(self) -> int:
        return self._starts[-1]

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each source in the whole run."""
        return dict(zip(self.names, self._offsets[-1]))

    def locate(self, i: int) -> tuple[str, int]:
        """Sample `i` of the run is sample k of a source: returns (source, k)."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of a run of {self.num_samples}")
        phase = bisect_right(self._starts, i) - 1
        source, j = self.phases[phase].locate(i - self._starts[phase])
        return self.names[source], j + self._offsets[phase][source]

    def index(self, source: str, k: int) -> int:
        """The inverse: at which sample of the run sample `k` of `source` stands."""
        s = self.names.index(source)
        if not 0 <= k < self._offsets[-1][s]:
            raise IndexError(f"sample {k} of {source}: the run has {self._offsets[-1][s]}")
        phase = bisect_right(self._offsets, k, key=lambda offsets: offsets[s]) - 1
        return self._starts[phase] + self.phases[phase].index(s, k - self._offsets[phase][s])

    def tree(self, sizes: Mapping[str, int], tokens: Mapping[str, int]) -> str:
        """The run as a text tree: for each phase and source its share, samples, tokens and epochs.

        `sizes` are samples an epoch and `tokens` the tokens of each source."""
        lines, width = [f"mixture: {self.num_samples:,} samples"], max(map(len, self.names))
        for number, phase in enumerate(self.phases):
            start, end = self._starts[number : number + 2]
            branch, bar = ("└── ", "    ") if end == self.num_samples else ("├── ", "│   ")
            lines.append(f"{branch}samples {start:,} … {end - 1:,}")
            for s, name in enumerate(self.names):
                twig = "└── " if s == len(self.names) - 1 else "├── "
                count = self._offsets[number + 1][s] - self._offsets[number][s]
                share, epochs = phase.weights[s] / sum(phase.weights), count / sizes[name] if count else 0
                facts = f"{share:7.2%} {count:>9,} samples {epochs:8.2f} epochs of {tokens[name]:,} tokens"
                lines.append(f"{bar}{twig}{name:<{width}} {facts if count else 'left out'}")
        return "\n".join(lines)


def nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    """The end of an error about a name that does not exist: the nearest one that does, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"{otherwise} {', '.join(known)}"


def _whole_numbers(weights: Mapping[str, float], names: Sequence[str]) -> list[int]:
    """The weights as whole numbers in exactly the same proportion as the decimals the user wrote."""
    fractions = [Fraction(str(weights.get(name, 0))) for name in names]
    common = lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * common) for fraction in fractions]
    return [number // gcd(*whole) for number in whole]
