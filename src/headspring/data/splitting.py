"""Train, validation and test: decided by a hash, so that it does not change when other documents come or go.

What is hashed is not the document but the set it belongs to: the union of its group (the file it stands in) and of its
near-duplicates. So a docstring never sits in training while its file is in the test, and no near-duplicate straddles.
The hash is of the set's smallest group name. What it gives up: the fractions hold only on average, and
only of sets; one huge set goes to one side.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from pydantic import Field, model_validator

from headspring.artifacts.value import Value
from headspring.data.deduplication import Cluster, UnionFind


class SplitConfig(Value):
    """Fractions of the document sets that go to `validation` and `test`; the rest is trained on."""

    validation: float = Field(default=0.02, ge=0, lt=1)
    test: float = Field(default=0.02, ge=0, lt=1)

    @model_validator(mode="after")
    def _something_is_left(self) -> "SplitConfig":
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave nothing to train on; make them smaller")
        return self


def split_of(key: str, seed: int, config: SplitConfig) -> str:
    """The split of a set of documents from its key: a pure function of the two and the seed."""
    digest = blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    position = int.from_bytes(digest) / 2**64
    if position < config.test:
        return "test"
    return "validation" if position < config.test + config.validation else "train"


def smallest_working_fraction(
    groups: Sequence[str], clusters: Sequence[Cluster], kept: Sequence[int], seed: int
) -> float | None:
    """The least of some round fractions that, for validation and test each, leaves no split of `kept` empty."""
    for fraction in (0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3):
        splits = assign_splits(groups, clusters, seed, SplitConfig(validation=fraction, test=fraction))
        if {splits[index] for index in kept} == {"train", "validation", "test"}:
            return fraction
    return None


def assign_splits(groups: Sequence[str], clusters: Iterable[Cluster], seed: int, config: SplitConfig) -> list[str]:
    """The split of each document; `groups[i]` is document i's group, `clusters` holds document indices."""
    numbers: dict[str, int] = {}
    group_of = [numbers.setdefault(group, len(numbers)) for group in groups]
    names = list(numbers)
    sets = UnionFind(len(names))
    for cluster in clusters:
        for member in cluster.members[1:]:
            sets.union(group_of[cluster.survivor], group_of[member])
    smallest: dict[int, str] = {}
    for number, name in enumerate(names):
        root = sets.root(number)
        smallest[root] = min(name, smallest.get(root, name))
    of_set = {root: split_of(name, seed, config) for root, name in smallest.items()}
    return [of_set[sets.root(group)] for group in group_of]
