"""A sequence: one answer under way, as the scheduler and the cache see it.

    tokens    p p p p p p p p a a a       prompt, and answer so far
    computed  ───────────────→            what the cache holds; the others are `uncomputed`

Whether it is being read (many tokens uncomputed) or written (one) is no state of its own: both follow from two numbers.
"""

from collections.abc import Hashable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headspring.inference.engine.beside import Snapshot
from headspring.inference.engine.job import Job
from headspring.inference.generation import Request
from headspring.inference.inspection import Probe
from headspring.models.ragged import PAGE


class Sequence:
    """`tables` are its pages, one list for each group of layers, and `nodes` the serial numbers of its full pages in the index
    of prefixes. `state` is what a runner remembers of it beside pages, `snapshot` what it begins from where a prefix was known,
    and `stops` where a snapshot should be kept of what it computes. `row` (V,) are logits that wait for those of its
    siblings (beam search), `proposals` tokens guessed to come next, `probe` what looks at its activations."""

    __slots__ = (
        "answer",
        "computed",
        "job",
        "nodes",
        "probe",
        "proposals",
        "request",
        "row",
        "running",
        "snapshot",
        "state",
        "stops",
        "tables",
        "tokens",
    )

    def __init__(self, job: Job, request: Request, answer: int):
        self.job, self.request, self.answer = job, request, answer
        self.tokens: list[int] = request.prompt + request.token_ids
        self.computed = 0
        self.tables: list[list[int]] = []
        self.nodes: list[int] = []
        self.state: Any = None
        self.snapshot: Snapshot | None = None
        self.stops = {(len(request.prompt) - 1) // PAGE * PAGE}  # the last token is always read
        self.row: Tensor | None = None
        self.proposals: list[int] = []
        self.probe: Probe | None = None
        self.running = False

    def contents(self, start: int, stop: int) -> tuple[Hashable, ...]:
        """What stands at these places: tokens, or digests of what towers saw."""
        seen = self.job.contents
        return (*seen[start:stop], *self.tokens[max(start, len(seen)) : stop])

    @property
    def uncomputed(self) -> int:
        """Tokens that the cache does not hold yet."""
        return len(self.tokens) - self.computed

    @property
    def rank(self) -> tuple[int, int, int]:
        """Its place in every queue, the smallest first: priority, then arrival, then number of the answer."""
        return -self.job.priority, self.job.number, self.answer


@dataclass(slots=True)
class Work:
    """`count` tokens of a sequence, after those that are computed, to be computed in one step; of the last `rows` of them the
    hidden states are wanted."""

    sequence: Sequence
    count: int
    rows: int = 0

    @property
    def tokens(self) -> Rows[int]:
        """The ids to compute, proposals at the end."""
        one, start = self.sequence, self.sequence.computed
        known = one.tokens[start : start + self.count]
        return known + one.proposals[: self.count - len(known)]
