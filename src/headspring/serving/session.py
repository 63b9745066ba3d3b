"""A session: one job from a client's side, between the engine's thread and whoever reads the answer.

    submitted ──→ accepted ──→ ended: finished · stopped · cancelled · timeout · rejected · failed      (once)
                     │  updates wait here, at most `lag` tokens of them
                     └→ cancel() at any time, from any thread

The engine's thread pushes and ends; the reader takes and cancels. Nothing here waits: a reader that lags too far is not waited
for but cancelled, so that it cannot stall the batch. There is no thread and no event loop in this file: `wake` is called when
there is something to read, and the fuzzer drives it as it likes.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

from headspring.inference.engine import Job, Update

End = Literal["finished", "stopped", "cancelled", "timeout", "rejected", "failed"]


class Session:
    """`submitted`, `first` and `ended` are times of `clock`, seconds; None before they come. `reason` says why it was
    cancelled; `error` what went wrong where it was rejected or failed."""

    def __init__(self, wake: Callable[[], None], clock: Callable[[], float], lag: int, streamed: bool = True):
        self.wake, self.clock, self.lag, self.streamed = wake, clock, lag, streamed
        self.submitted = clock()
        self.first: float | None = None
        self.ended: float | None = None
        self.end_as: End | None = None
        self.error: Exception | None = None
        self.reason: str | None = None
        self.job: Job | None = None
        self.num_tokens = 0
        self._waiting: deque[Update] = deque()
        self._held = 0  # tokens in `_waiting`
        self._lock = threading.Lock()

    # -- the reader's side -------------------------------------------------------------------------------------------

    def take(self) -> list[Update]:
        """What came since the last time."""
        with self._lock:
            taken, self._held = list(self._waiting), 0
            self._waiting.clear()
        return taken

    def cancel(self, reason: str = "cancelled by the client") -> None:
        """Nobody wants the rest: the engine's thread ends it before its next step. Harmless after the end."""
        if self.reason is None:
            self.reason = reason

    # -- the engine's side -------------------------------------------------------------------------------------------

    def push(self, update: Update) -> None:
        """Keep an update for the reader; one that cannot be kept cancels the session."""
        if self.first is None and update.token_ids:
            self.first = self.clock()
        self.num_tokens += len(update.token_ids)
        if not self.streamed or self.reason is not None:
            return
        with self._lock:
            self._held += len(update.token_ids)
            if self._held > self.lag:
                self.reason = f"the reader is more than {self.lag} tokens behind"
                self._waiting.clear()
            else:
                self._waiting.append(update)
        self.wake()

    def accept(self, job: Job) -> None:
        self.job = job
        self.wake()

    def end(self, end: End, error: Exception | None = None) -> None:
        """The one end. Whoever calls this wakes the reader, having kept its books."""
        assert self.end_as is None, f"a session ended as {self.end_as!r} and ends again as {end!r}"
        self.error, self.ended, self.end_as = error, self.clock(), end
