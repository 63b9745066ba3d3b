"""Progress bars with time left, in a terminal; one plain line every few seconds where there is none.

Everything that can take more than a few seconds wraps its iteration in `track(...)` or opens a `task(...)`; nobody
passes a progress object around. `quiet()` silences them (tests, library use).
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

_quiet = False
PLAIN_SECONDS = 10.0


class Task:
    """One piece of work with a known total (any unit). `advance(n)`, `describe(text)`, `expect(total)`."""

    def __init__(self, description: str, total: float | None):
        self.description, self.total, self.done = description, total, 0.0
        self.started = self.printed = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if not _quiet and now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            left = ""
            if self.total and self.done:
                seconds = (now - self.started) * (self.total - self.done) / self.done
                left = f" of {self.total:,.0f}, {seconds:.0f} s left"
            print(f"  {self.description}: {self.done:,.0f}{left}", file=sys.stderr, flush=True)

    def describe(self, text: str) -> None:
        self.description = text

    def expect(self, total: float) -> None:
        self.total = total


class _TerminalTask(Task):
    def __init__(self, progress: Progress, description: str, total: float | None):
        super().__init__(description, total)
        self._progress, self._id = progress, progress.add_task(description, total=total)

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._id, amount)

    def describe(self, text: str) -> None:
        self._progress.update(self._id, description=text)

    def expect(self, total: float) -> None:
        self._progress.update(self._id, total=total)


@contextmanager
def task(description: str, total: float | None = None) -> Iterator[Task]:
    """A running bar for the length of the block."""
    console = Console(stderr=True)
    if _quiet or not console.is_terminal:
        yield Task(description, total)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _TerminalTask(progress, description, total)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` with a bar; `total` defaults to `len(items)` where that exists."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(description, total) as running:
        for item in items:
            yield item
            running.advance()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress output inside the block."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before
