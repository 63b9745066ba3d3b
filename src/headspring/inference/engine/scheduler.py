"""Which sequences compute how many tokens in the next step.

A step has room for `chunk` tokens. First come the sequences that need one token (somebody waits for each), then the prompts
that are being read, then waiting ones as long as places, tokens and pages last; all by rank: priority, then arrival. A prompt
gets what is left of the chunk, so that reading a long one slows the others down and never stops them.

Where pages run out, the sequence of the last rank gives all of its own back and waits again; it will be computed anew, to the
same bits (*preemption by recompute*: a copy elsewhere would need a second pool, and on a CPU is read at the same speed). The
first in rank is never preempted by others, and `Engine.submit` takes no job that would not fit alone: so one always gets on.
"""

from bisect import insort
from collections.abc import Iterator

from headspring.inference.engine.cache import Cache, Copy
from headspring.inference.engine.sequence import Sequence, Work


class Scheduler:
    """`waiting` and `running` are sorted by rank. `copies` are pages to copy before the step that was just scheduled."""

    def __init__(self, cache: Cache, max_sequences: int, chunk: int):
        self.cache, self.max_sequences, self.chunk = cache, max_sequences, chunk
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.work: dict[Sequence, Work] = {}
        self.copies: list[tuple[Sequence, Copy]] = []  # in the order in which pages were given
        self.budget = 0
        self.preemptions = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its turn; one that holds pages already (a fork) runs at once where there is a place."""
        if sequence.tables and len(self.running) < self.max_sequences:
            self._start(sequence)
        else:
            self.cache.release(sequence)
            insort(self.waiting, sequence, key=lambda one: one.rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget it and free what it holds."""
        (self.running if sequence.running else self.waiting).remove(sequence)
        sequence.running = False
        self.cache.release(sequence)

    def _start(self, sequence: Sequence) -> None:
        sequence.running = True
        insort(self.running, sequence, key=lambda one: one.rank)

    def schedule(self) -> list[Work]:
        """The work of the next step; empty only where nothing is left to do."""
        self.work, self.copies, self.budget = {}, [], self.chunk
        before = self.preemptions
        for single in (True, False):
            for sequence in list(self.running):
                if sequence.running and sequence.uncomputed and (sequence.uncomputed == 1) == single:
                    self._continue(sequence)
        if self.preemptions == before:
            self._admit()
        if not self.work and self.waiting:
            self._make_way()
        return list(self.work.values())

    def extend(self, work: Work, proposals: list[int]) -> None:
        """Let a sequence that computes its last token compute proposed ones too, as far as room is left."""
        proposals = proposals[: self.budget]
        copies = self.cache.reserve(work.sequence, work.count + len(proposals)) if proposals else None
        if copies is not None:
            self.copies += [(work.sequence, copy) for copy in copies]
            work.sequence.proposals = proposals
            work.count, work.rows = work.count + len(proposals), work.rows + len(proposals)
            self.budget -= len(proposals)

    def _continue(self, sequence: Sequence) -> None:
        """Give a running sequence its tokens, at the cost of those behind it where pages lack."""
        count = self.cache.until_stop(sequence, min(sequence.uncomputed, self.budget))
        while count and not self._give(sequence, count):
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return

    def _give(self, sequence: Sequence, count: int) -> bool:
        copies = self.cache.reserve(sequence, count)
        if copies is None:
            return False
        self.copies += [(sequence, copy) for copy in copies]
        self.work[sequence] = Work(sequence, count)
        self.budget -= count
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits again, at its rank."""
        if (lost := self.work.pop(sequence, None)) is not None:
            self.budget += lost.count
        self.copies = [(owner, copy) for owner, copy in self.copies if owner is not sequence]
        self.running.remove(sequence)
        sequence.running, sequence.proposals = False, []
        self.cache.release(sequence)
        self.preemptions += 1
        insort(self.waiting, sequence, key=lambda one: one.rank)

    def _admit(self) -> None:
        """Start waiting sequences in order; none overtakes one that does not fit yet."""
        while self.budget and (sequence := next((one for one in self.waiting if one.row is None), None)) is not None:
            if len(self.running) == self.max_sequences or not self._fits(sequence):
                if not self._yields_to(sequence):
                    return
                continue
            self.waiting.remove(sequence)
            self._start(sequence)
            given = self._give(sequence, self.cache.until_stop(sequence, min(sequence.uncomputed, self.budget)))
            assert given

    def _fits(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its known prefix; whether there are pages for all that it has to compute now."""
        if sequence.job.reads_prefix:
            self.cache.match(sequence)
        if self.cache.has_room(sequence, self.chunk):
            self.cache.hits += sequence.computed
            return True
        self.cache.release(sequence)
        return False

    def _yields_to(self, sequence: Sequence) -> bool:
        """Preempt the last running sequence if it is of lower priority."""
        if not self.running or self.running[-1].job.priority >= sequence.job.priority:
            return False
        self.preempt(self.running[-1])
        return True

    def _make_way(self) -> None:
        """All that run wait for siblings that do not (beam search), and keep their logits without pages: let those run."""
        for sequence in list(self.running):
            self.preempt(sequence)
        self._admit()
