"""The books of the cache, with lists in the place of pages: whatever is taken, shared, forked, shortened and given back, every
sequence finds in its pages the tokens that it has computed."""

import random
from types import SimpleNamespace

import pytest

from headspring.inference.engine.cache import GONE, PAGE, Cache, Group
from headspring.inference.engine.sequence import Sequence

SCOPES = [("", ""), ("", ""), ("client", ""), ("", "edit")]
WINDOW = 40


def new_sequence(luck: random.Random) -> Sequence:
    """One that begins as many others do."""
    prompt = [luck.randrange(2) for _ in range(luck.randrange(3))] + [7] * luck.randrange(4 * PAGE) + [luck.randrange(3)]
    scope = luck.choice(SCOPES)
    return Sequence(SimpleNamespace(scope=scope, contents=()), SimpleNamespace(prompt=prompt, token_ids=[]), 0)


class Books:
    """A cache, and what its pages hold: {(group, page): [(scope, all tokens up to here), …]}."""

    def __init__(self, seed: int, groups: list[Group]):
        self.luck, self.cache, self.live = random.Random(seed), Cache(groups), []
        self.pages = {(group, page): [None] * PAGE for group, one in enumerate(groups) for page in range(one.num_pages)}
        self.counts = dict.fromkeys(("hits", "copies", "refused", "shortened"), 0)

    def step(self) -> None:
        choice = self.luck.random()
        if choice < 0.2 or not self.live:
            self.begin()
        elif choice < 0.7:
            self.compute(self.luck.choice(self.live))
        elif choice < 0.8 and len(self.live) < 8:
            self.fork(self.luck.choice(self.live))
        else:
            self.cache.release(one := self.live.pop(self.luck.randrange(len(self.live))))
            assert one.computed == 0
        self.check()

    def begin(self) -> None:
        one = new_sequence(self.luck)
        self.cache.match(one)
        self.counts["hits"] += one.computed
        self.live.append(one)

    def compute(self, one: Sequence) -> None:
        """Some tokens, of which the last may be guesses that turn out wrong."""
        guessed = self.luck.choice([0, 0, 3])
        count = self.luck.randrange(1, 50)
        while one.uncomputed < count:
            one.tokens.append(self.luck.randrange(2))
        one.running = True
        copies = self.cache.reserve(one, count + guessed)
        if copies is None:
            self.counts["refused"] += 1
            return
        for copy in copies:
            self.pages[copy.group, copy.target] = list(self.pages[copy.group, copy.source])
        self.counts["copies"] += len(copies)
        for place in range(one.computed, one.computed + count + guessed):
            known = tuple(one.tokens[: place + 1]) if place < one.computed + count else "a guess"
            for group, table in enumerate(one.tables):
                self.pages[group, table[place // PAGE]][place % PAGE] = (one.job.scope, known)
        one.computed += count + guessed
        if guessed:
            self.counts["shortened"] += 1
            self.cache.shorten(one, one.computed - guessed)
        self.cache.settle(one)

    def fork(self, parent: Sequence) -> None:
        child = Sequence(parent.job, SimpleNamespace(prompt=list(parent.tokens), token_ids=[]), 0)
        self.cache.fork(parent, child)
        self.live.append(child)

    def check(self) -> None:
        for one in self.live:
            one.running = False
        self.cache.check(self.live)
        for one in self.live:
            for group, table in enumerate(one.tables):
                window = self.cache.groups[group].window
                first = 0 if window is None else max(0, one.computed - window + 1)
                for place in range(first, one.computed):
                    assert table[place // PAGE] != GONE
                    assert self.pages[group, table[place // PAGE]][place % PAGE] == (
                        one.job.scope,
                        tuple(one.tokens[: place + 1]),
                    )


def play(seed: int) -> dict[str, int]:
    luck = random.Random(seed)
    groups = [Group(None, luck.randrange(6, 30)), Group(WINDOW, luck.randrange(6, 30))]
    books = Books(seed, luck.sample(groups, luck.choice([1, 2])))
    for _ in range(120):
        books.step()
    for one in books.live:
        books.cache.release(one)
    books.cache.check([])
    assert books.cache.used == 0
    return books.counts


def play_many(seeds) -> dict[str, int]:
    counts = [play(seed) for seed in seeds]
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def test_every_sequence_finds_its_tokens():
    counts = play_many(range(40))
    assert min(counts.values()) > 50 and counts["hits"] > 100 * PAGE


@pytest.mark.parametrize("bug", ["no copy", "scope", "window", "reference", "order"])
def test_control_planted_bugs_are_noticed(monkeypatch, bug):
    own, known, passed, fork = Cache._own, Cache._known, Cache._passed, Cache.fork

    def keeps(cache, sequence, number, page):
        copy = own(cache, sequence, number, page)
        return type(copy)(number, copy.target, copy.target)

    def of_anybody(cache, sequence):
        sequence.job.scope, kept = ("", ""), sequence.job.scope
        try:
            return known(cache, sequence)
        finally:
            sequence.job.scope = kept

    def uncounted(cache, parent, child):
        fork(cache, parent, child)
        for page in child.tables[0][:1] if child.tables else ():
            cache.pools[0].references[page] -= page != GONE

    planted = {
        "no copy": ("_own", keeps),
        "scope": ("_known", of_anybody),
        "window": (
            "_passed",
            staticmethod(lambda group, computed: passed(group, computed + PAGE if group.window else computed)),
        ),
        "reference": ("fork", uncounted),
        "order": ("_known", lambda cache, sequence: known(cache, sequence)[::-1]),
    }
    monkeypatch.setattr(Cache, *planted[bug])
    with pytest.raises(AssertionError):
        play_many(range(40))


def test_beginnings_live_longest():
    """Of what nobody holds, the last pages of a text are given away first."""
    cache, luck = Cache([Group(None, 4)]), random.Random(1)
    one = new_sequence(luck)
    one.tokens = list(range(4 * PAGE))
    assert cache.reserve(one, 3 * PAGE) == []
    one.computed = 3 * PAGE
    cache.settle(one)
    cache.release(one)
    other = new_sequence(luck)
    other.tokens = [500] * (2 * PAGE)
    assert cache.reserve(other, 2 * PAGE) == []  # the free page, and one of the three
    again = Sequence(one.job, SimpleNamespace(prompt=list(range(4 * PAGE)), token_ids=[]), 0)
    cache.match(again)
    assert again.computed == 2 * PAGE
