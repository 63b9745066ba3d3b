"""The fuzzer for some seconds, and that it finds what is planted."""

import logging

import pytest

from headspring.inference.engine.cache import Cache
from headspring.inference.engine.engine import Engine
from headspring.inference.engine.scheduler import Scheduler
from headspring.serving.loop import EngineLoop
from headspring.serving.session import Session
from tests.serving.fuzzer import World


@pytest.fixture(autouse=True)
def quiet():
    """What breaks here was broken on purpose."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def run(tokenizer, seed: int, steps: int) -> World:
    world = World(tokenizer, seed)
    for _ in range(steps):
        world.step()
    world.settle()
    return world


def test_each_request_ends_once_and_nothing_is_left(tokenizer):
    ends = set()
    for seed in range(3):
        world = run(tokenizer, seed, 1500)
        ends |= set(world.ends_seen)
    assert ends == {"finished", "stopped", "cancelled", "timeout", "rejected", "failed"}


def twice(monkeypatch):
    """A session that ends twice."""
    plain = EngineLoop._cancel

    def cancel(self, session):
        plain(self, session)
        self._end(session, "fuzzed", "cancelled")
        self.live[session] = "fuzzed"

    monkeypatch.setattr(EngineLoop, "_cancel", cancel)


def leaking(monkeypatch):
    """Pages of a cancelled job that nobody frees."""

    def remove(self, sequence):
        (self.running if sequence.running else self.waiting).remove(sequence)
        if sequence.job.outcome is None and len(sequence.tables) and len(sequence.tables[0]) > 1:
            self.cache.pools[0].hold(sequence.tables[0][0])
        sequence.running = False
        self.cache.release(sequence)

    monkeypatch.setattr(Scheduler, "remove", remove)


def unnoticed(monkeypatch):
    """A client that leaves, and nobody looks."""
    monkeypatch.setattr(EngineLoop, "_cancel", lambda self, session: None)


def strangers(monkeypatch):
    """A prefix found by its first tokens only."""
    plain = Cache._known

    def known(self, sequence):
        found = plain(self, sequence)
        if not found and self.index and len(sequence.tokens) > 32:
            found = [next(iter(self.index.values()))]
        return found

    monkeypatch.setattr(Cache, "_known", known)


def lost(monkeypatch):
    """An update that does not arrive."""
    plain = Session.push

    def push(self, update):
        if self.num_tokens != 3:
            return plain(self, update)
        self.num_tokens += 1

    monkeypatch.setattr(Session, "push", push)


def contagious(monkeypatch):
    """One request that breaks and takes its neighbours along."""

    def compute(self, work):
        try:
            return plain(self, work)
        except Exception as error:
            for item in work:
                if not item.sequence.job.finished:
                    self.end(item.sequence.job, "failed", error)
            return []

    plain = Engine._compute
    monkeypatch.setattr(Engine, "_alone", lambda self, work: (_ for _ in ()).throw(RuntimeError("all of them")))
    monkeypatch.setattr(Engine, "_compute", compute)


@pytest.mark.parametrize("plant", [twice, leaking, unnoticed, strangers, lost, contagious])
def test_the_fuzzer_finds_what_is_planted(tokenizer, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        run(tokenizer, 1, 6000)
