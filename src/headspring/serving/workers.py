"""A few threads for what may take long before a request can run: tokenizing, templates, grammars, pictures.

The event loop must never do that itself: one client's long text would stop everybody's tokens. Threads, their queue and the
time of each piece of work are bounded. A thread cannot be killed: work that is late keeps its thread until it ends, and its
client has its answer already. So the bounds on what is worked on (bytes, depth, a template's budget) are what really protects.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from headspring.serving.errors import ApiError

T = TypeVar("T")


class Workers:
    """At most `count` pieces of work at a time, and `queue` that wait."""

    def __init__(self, count: int, queue: int, seconds: float):
        self.most, self.seconds = count + queue, seconds
        self._pending, self._lock = 0, threading.Lock()
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="headspring-worker")

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work(*arguments)` in a thread. Raises `ApiError` 429 where too many wait, 400 where it takes too long."""
        with self._lock:
            if self._pending >= self.most:
                raise ApiError(429, "too many requests wait to be read; try again soon", "workers_busy", retry_after=1)
            self._pending += 1
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.seconds)
        except TimeoutError:
            raise ApiError(400, f"reading this request takes more than {self.seconds:g} s", "worker_seconds") from None

    def _done(self, _: Any) -> None:
        with self._lock:  # comes from the worker's thread
            self._pending -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
