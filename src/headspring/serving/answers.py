"""One HTTP request for text: its sessions, from the queue to the last byte.

    prepared prompts ─ start ─→ sessions ─┬─ whole:  wait for all, one JSON
                                          └─ events: what comes, as it comes, then [DONE] or an error

Whoever leaves is noticed while waiting and while writing; then all sessions of the request are cancelled, and what they held is
free before the engine's next step. A stream begins with its first token and not before: what goes wrong until then has a status
of its own.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headspring.inference.engine import Job, QueueFull, Update
from headspring.serving.errors import ApiError, refuse
from headspring.serving.prompts import Prepared
from headspring.serving.served import Served
from headspring.serving.session import Session

GONE = "the client has gone"
ENDS = {"cancelled": (503, "cancelled"), "timeout": (408, "timeout"), "failed": (500, "failed"), "rejected": (400, "rejected")}


class Answering:
    """The sessions of one request, in the order of its prompts."""

    def __init__(self, served: Served, prepared: Sequence[Prepared], *, key: str, seconds: float, streamed: bool):
        self.served, self.prepared, self.key, self.seconds = served, prepared, key, seconds
        self._changed, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self.watcher: asyncio.Future[None] | None = None  # who waits for its end; kept so that it is not collected
        lag = served.limits.lag
        self.sessions = [Session(self._wake, time.monotonic, lag, streamed) for _ in prepared]

    def start(self) -> None:
        """Leave the orders for the engine's thread."""
        for session, one in zip(self.sessions, self.prepared, strict=True):
            self.served.loop.submit(
                self.served.engine_name,
                session,
                one.prompt,
                one.params,
                make=partial(_made, self.served, one),
                source=one.source,
                edits=one.inspection,
                adapter=self.served.adapter,
                timeout=self.seconds,
                key=self.key,
            )
        self.served.thread.wake()

    async def begun(self, request: Request) -> None:
        """Return when the first token is there or all is over. Raises `ApiError` for a session that was not answered."""
        await self._until(lambda: self._over or any(session.first is not None for session in self.sessions), request)
        self._check(any_end=False)

    async def jobs(self, request: Request) -> list[Job]:
        """The finished jobs. Raises `ApiError` for one that did not finish."""
        await self._until(lambda: self._over or self._failed is not None, request)
        self._check(any_end=True)
        return [session.job for session in self.sessions if session.job is not None]

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """What comes, with the number of its prompt, until all have ended. Raises `ApiError` as `jobs`."""
        while True:
            over = self._over or self._failed is not None
            self._changed.clear()
            for index, session in enumerate(self.sessions):
                for update in session.take():
                    if update.finish_reason in (None, "stop", "length"):
                        yield index, update
            self._check(any_end=True)
            if over:
                return
            if not self._changed.is_set():
                await self._changed.wait()

    def cancel(self, reason: str) -> None:
        """End whatever of it runs. Harmless where all has ended."""
        for session in self.sessions:
            if session.end_as is None:
                session.cancel(reason)
        self.served.thread.wake()

    async def ended(self) -> None:
        """Return when every session has ended."""
        while not self._over:
            self._changed.clear()
            if not self._over:
                await self._changed.wait()

    @property
    def _over(self) -> bool:
        return all(session.end_as is not None for session in self.sessions)

    @property
    def _failed(self) -> Session | None:
        return next((one for one in self.sessions if one.end_as not in (None, "finished", "stopped")), None)

    def _wake(self) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # where the event loop is closed, nobody waits any more
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _until(self, done: Callable[[], bool], request: Request) -> None:
        """Wait; raise `Gone` when the client leaves first."""
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            while not done():
                self._changed.clear()
                if done():
                    break
                changed = asyncio.ensure_future(self._changed.wait())
                finished, _ = await asyncio.wait({changed, gone}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if gone in finished:
                    raise Gone
        finally:
            gone.cancel()

    def _check(self, any_end: bool) -> None:
        """Raise for the first session that ended badly; with `any_end` false only where no session has any token."""
        failed = self._failed
        if failed is not None and (any_end or failed.first is None):
            raise error_of(failed, self.served)


class Gone(Exception):
    """The client left while its answer was made."""


def error_of(session: Session, served: Served) -> ApiError:
    """Why a session has no answer."""
    assert session.end_as is not None
    status, code = ENDS[session.end_as]
    if isinstance(session.error, QueueFull):
        return ApiError(429, str(session.error), "queue_full", retry_after=served.wait_estimate())
    if session.end_as == "rejected":
        return refuse(str(session.error), reason="rejected")
    if session.end_as == "timeout":
        return ApiError(status, "the request took longer than its timeout", code)
    if session.end_as == "cancelled":
        return ApiError(status, session.reason or "cancelled", code, retry_after=5)
    said = str(session.error).splitlines()[0][:200] if str(session.error) else type(session.error).__name__
    return ApiError(status, f"this request failed: {said}", code)


def _made(served: Served, one: Prepared) -> dict[str, Any]:
    """What has to be made in the engine's thread, since it runs the model."""
    if one.inspection is not None:
        served.check_captures(one.inspection, len(one.prompt) + one.params.max_tokens, one.params.answers)
    return {"soft": served.look(one.items)} if one.items else {}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. Each is written whole; a write that takes longer than `reader_seconds` ends the request."""

    media_type = "text/event-stream"

    def __init__(self, answering: Answering, events: AsyncIterator[Mapping[str, Any]], seconds: float):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.answering, self.events, self.seconds = answering, events, seconds
        self._sending: float | None = None  # since when a write waits for its reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not (writing.done() or gone.done()):
                await asyncio.wait({writing, gone}, timeout=self.seconds / 4, return_when=asyncio.FIRST_COMPLETED)
                if self._sending is not None and time.monotonic() - self._sending > self.seconds:
                    self.answering.cancel("the reader does not read")
                    raise SlowReader
            if writing.done():
                writing.result()
        finally:
            self.answering.cancel(GONE)
            for task in (writing, gone):
                task.cancel()

    async def _write(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self.events:
                await self._event(send, json.dumps(event, ensure_ascii=False))
            await self._event(send, "[DONE]")
        except ApiError as error:
            await self._event(send, json.dumps(error.body(), ensure_ascii=False))
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, send: Send, data: str) -> None:
        body = f"data: {data}\n\n".encode("utf-8", "replace")
        await self._send(send, {"type": "http.response.body", "body": body, "more_body": True})

    async def _send(self, send: Send, message: Any) -> None:
        self._sending = time.monotonic()  # a timer for each write would cost more than the write
        await send(message)
        self._sending = None


class SlowReader(Exception):
    """Nobody reads; the connection is dropped without another word."""
