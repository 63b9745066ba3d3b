"""Whether proposing pays: measured, not believed.

Proposals cost the time to make them and rows of a step to check them; they save steps where they are right. Which is more
depends on the text, on the machine and on how many answers run together. So both ways are tried for a few steps each, and the
one that gave more tokens a second goes on, for a period. Then the other one is tried again; each time it loses, the period
doubles.

This decides about time alone. Tokens are the same either way.
"""

from dataclasses import dataclass, field

TRIAL = 8  # steps of each way before a decision
PERIOD, LONGEST_PERIOD = 64, 4096  # steps between decisions


@dataclass
class Record:
    """Steps of one way since its trial began."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class Comparison:
    """Proposing (True) against not (False), for steps of about the same number of answers."""

    way: bool = True  # of the next step
    trying: bool = True
    records: dict[bool, Record] = field(default_factory=lambda: {True: Record(), False: Record()})
    left: int = TRIAL  # steps until the way may change
    period: int = PERIOD
    best: bool | None = None  # the last decision
    switched_off: int = 0  # times that it turned against proposing

    def note(self, proposed: bool, seconds: float, tokens: int) -> None:
        """A step was made."""
        if proposed != self.way:
            return  # decided before the way changed
        record = self.records[proposed]
        record.steps, record.seconds, record.tokens = record.steps + 1, record.seconds + seconds, record.tokens + tokens
        self.left -= 1
        if self.left == 0:
            self._turn()

    def _turn(self) -> None:
        """From one trial to the other, from both to a decision, from a period to the next trial."""
        other = not self.way
        if self.trying and self.records[other].steps == 0:
            self.way, self.left = other, TRIAL
        elif self.trying:
            best = max((True, False), key=lambda way: self.records[way].rate)
            self.period = min(2 * self.period, LONGEST_PERIOD) if best == self.best else PERIOD
            self.switched_off += not best and self.best is not False
            self.best = self.way = best
            self.trying, self.left = False, self.period
            self.records[best] = Record()
        else:
            self.trying, self.way, self.left = True, other, TRIAL
            self.records[other] = Record()


class Controller:
    """One comparison for each order of magnitude of answers that run together (1, 2, 3–4, 5–8, …)."""

    def __init__(self) -> None:
        self.comparisons: dict[int, Comparison] = {}

    @property
    def switched_off(self) -> int:
        """Times that proposing was given up for a while, because it did not pay."""
        return sum(one.switched_off for one in self.comparisons.values())

    def of(self, answers: int) -> Comparison:
        return self.comparisons.setdefault((answers - 1).bit_length(), Comparison())
