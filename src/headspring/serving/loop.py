"""The engine's thread: the only one that touches models. Everybody else leaves an order, and reads what a session holds.

    tick:  orders (submit, embed …) → cancel what nobody wants → one step of each engine → end what has ended

Several models share the thread and take turns: on one machine they share its cores too. `EngineLoop` is the work of one turn,
without a thread, so that the fuzzer can run millions of them; `EngineThread` repeats it and sleeps where nothing is to do.

An engine whose step raises is one that broke outside of any single request (those fail alone, inside the engine). All its
jobs fail; where not even cancelling them works, the engine counts as broken: it takes nothing more, and /ready says so.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from headspring.artifacts import HeadspringError, UserError
from headspring.inference.engine import Engine, Job
from headspring.inference.sampling import SamplingParams
from headspring.serving.metrics import Metrics
from headspring.serving.session import End, Session

T = TypeVar("T")
LOGGER = logging.getLogger("headspring.serving")
NOBODY = "the server is stopping"


class EngineLoop:
    """Engines by name of their model, and the sessions that live in them."""

    def __init__(self, engines: Mapping[str, Engine], metrics: Metrics | None = None):
        self.engines, self.metrics = dict(engines), metrics or Metrics()
        self.live: dict[Session, str] = {}  # accepted and not ended → its model
        self.broken: dict[str, Exception] = {}
        self._orders: deque[Callable[[], None]] = deque()

    def submit(
        self,
        model: str,
        session: Session,
        prompt: list[int],
        params: SamplingParams,
        make: Callable[[], Mapping[str, Any]] = dict,
        **options: Any,
    ) -> None:
        """Leave the order that `session` shall run as `Engine.submit(prompt, params, **options, **make())` on `model`: `make`
        is for what only the engine's thread may make."""
        self._orders.append(lambda: self._submit(model, session, prompt, params, make, options))

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Leave an order to do some other work with a model, between two steps."""
        future: Future[T] = Future()

        def order() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)

        self._orders.append(order)
        return future

    @property
    def idle(self) -> bool:
        """Whether there is neither an order nor a session."""
        return not self._orders and not self.live

    def tick(self) -> bool:
        """One turn. False where nothing is left to do."""
        for _ in range(len(self._orders)):
            self._orders.popleft()()
        for session in [session for session in self.live if session.reason is not None]:
            self._cancel(session)
        busy = False
        for model, engine in self.engines.items():
            if model not in self.broken:
                busy |= self._step(model, engine)
        for session, model in list(self.live.items()):
            if session.job is not None and session.job.finished:
                self._end(session, model, *ending(session.job))
        return busy or bool(self._orders)

    def _submit(
        self,
        model: str,
        session: Session,
        prompt: list[int],
        params: SamplingParams,
        make: Callable[[], Mapping[str, Any]],
        options: dict[str, Any],
    ) -> None:
        if session.reason is not None:
            return self._end(session, model, "cancelled")
        if model in self.broken:
            return self._end(session, model, "failed", self.broken[model])
        try:
            job = self.engines[model].submit(prompt, params, notify=session.push, **options, **make())
        except UserError as error:
            return self._end(session, model, "rejected", error)
        except Exception as error:
            LOGGER.exception("a request could not be submitted to %s", model)
            return self._end(session, model, "failed", error)
        self.live[session] = model
        session.accept(job)

    def _cancel(self, session: Session) -> None:
        model = self.live[session]
        assert session.job is not None
        try:
            if not session.job.finished:
                self.engines[model].cancel(session.job)
        except Exception as error:
            self._break(model, error)

    def _step(self, model: str, engine: Engine) -> bool:
        try:
            return engine.step()
        except Exception as error:
            LOGGER.exception("a step of %s failed", model)
            for session in [session for session, of in self.live.items() if of == model]:
                session.error = error
                self._cancel(session)
                if model in self.broken:
                    return False
                self._end(session, model, "failed", error)
            return True

    def _break(self, model: str, error: Exception) -> None:
        """The engine cannot even cancel: nothing of it can be trusted any more."""
        LOGGER.error("%s is broken and takes no more requests: %s", model, error)
        self.broken[model] = HeadspringError(f"the engine of {model} is broken ({error}); restart the server")
        for session in [session for session, of in self.live.items() if of == model]:
            self._end(session, model, "failed", error)

    def _end(self, session: Session, model: str, end: End, error: Exception | None = None) -> None:
        session.end(end, error)
        self._count(session, model, end)
        self.live.pop(session, None)
        session.wake()

    def _count(self, session: Session, model: str, end: End) -> None:
        metrics = self.metrics
        metrics.outcomes.labels(model, end).inc()
        metrics.generated.labels(model).inc(session.num_tokens)
        if session.job is not None:
            metrics.prompts.labels(model).inc(len(session.job.prompt))
        assert session.ended is not None
        metrics.whole.labels(model).observe(session.ended - session.submitted)
        if session.first is not None:
            metrics.first.labels(model).observe(session.first - session.submitted)
            answers = max(1, len(session.job.requests)) if session.job is not None else 1
            if session.num_tokens > answers:
                metrics.each.labels(model).observe((session.ended - session.first) * answers / (session.num_tokens - answers))


def ending(job: Job) -> tuple[End, Exception | None]:
    """How a finished job ended, in a client's words: "stopped" where every answer came to its own end."""
    if job.outcome != "finished":
        return job.outcome or "failed", job.error
    stopped = all(answer.finish_reason == "stop" for answer in job.generations)
    return ("stopped" if stopped else "finished"), None


class EngineThread:
    """A loop that turns by itself."""

    def __init__(self, loop: EngineLoop):
        self.loop = loop
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="headspring-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is an order, or a session to cancel."""
        self._wake.set()

    def stop(self, seconds: float = 10.0) -> None:
        """Cancel everything, and end the thread. Waits for it at most so long."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                busy = self.loop.tick()
            except Exception:
                LOGGER.exception("the engine's loop failed")
                time.sleep(0.05)  # a defect of ours must not become a loop at full speed
                continue
            if not busy:
                self._wake.wait(timeout=0.05 if self.loop.live else 1.0)
        for session in list(self.loop.live):
            session.cancel(NOBODY)
        self.loop.tick()
