"""One engine in several processes, each with a part of the model (`inference.parallel`): the first decides, the others follow.

    process 0   submit · cancel ──┐                                       ┌─ tell whoever listens
                                  ├─ orders ─→ step: schedule, run, sample ┤
    process 1   follow()  ────────┘            Σ after each branch         └─ nobody listens

A step is the same in all processes because everything that it follows from is: an engine's decisions depend on what was asked,
on the clock, on how many pages there are and on the tokens that were sampled. So the first process sends, before each step,
what has been submitted and cancelled since the last one (as JSON: processes exchange no code); the clock is the first one's,
wherever a step reads it; all have as many pages as the one with the fewest; and the sampled tokens are those of the first one.
With the orders comes a checksum of what the answers have become, so that processes that part company say so.

Clients see no difference, but for what happens inside a step: a listener that cancels a job, or raises, ends it after that
step. A process that ends, or that answers no sum for `timeout` seconds (`parallel.join`), ends the run with one clear error.

Why the first one decides, instead of the same program in all: requests arrive at one process, at times that no other one knows.
What it gives up: one small message a step (about 0.1 ms on one machine) and one a sampling.
"""

import json
import re
import secrets
import zlib
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor

from headspring.artifacts import HeadspringError, UserError
from headspring.inference.engine.config import EngineConfig
from headspring.inference.engine.engine import Engine
from headspring.inference.engine.job import Job, Update
from headspring.inference.engine.runner import runner_for
from headspring.inference.inspection import Inspection
from headspring.inference.inspection.probe import row_shapes
from headspring.inference.sampling_params import SamplingParams

PATIENCE = timedelta(days=365)  # of a process that waits for orders; one that has ended is noticed at once
RECENT = 8  # tokens of each answer that a checksum is of: it is compared after every step
ROOM = 4096  # bytes of the first message; longer orders follow in a second one
DIVIDED = {"q", "k", "v", "pattern", "heads", "gate", "act"}  # sites of which each process has a part


class ProcessLost(BaseException):
    """Another process has ended, or answers no more. No `Exception`: nobody inside a step can go on without it."""


class Channel:
    """What processes say to each other beside the model's own sums. All of them make it at the same time."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.leads = dist.get_rank() == 0

    def send(self, message: Any) -> None:
        """From the first process to all others."""
        text = json.dumps(message, separators=(",", ":")).encode()
        first = torch.zeros(ROOM, dtype=torch.uint8)
        first[:8] = torch.tensor([len(text)]).view(torch.uint8)
        first[8 : 8 + len(text)] = _bytes(text[: ROOM - 8])
        self._share(first)
        if len(text) > ROOM - 8:
            self._share(_bytes(text[ROOM - 8 :]))

    def receive(self) -> Any:
        first = torch.zeros(ROOM, dtype=torch.uint8)
        self._share(first)
        length = int(first[:8].view(torch.int64))
        text = bytes(first[8 : 8 + length].numpy())
        if length > len(text):
            rest = torch.zeros(length - len(text), dtype=torch.uint8)
            self._share(rest)
            text += bytes(rest.numpy())
        return json.loads(text)

    def number(self, mine: Callable[[], float]) -> float:
        """What the first process measures."""
        value = torch.tensor([mine() if self.leads else 0.0], dtype=torch.float64)
        self._share(value)
        return float(value)

    def tokens(self, ids: Tensor) -> Tensor:
        """Those of the first process, ids (R,) int64."""
        shared = ids.cpu()
        self._share(shared)
        return shared

    def least(self, numbers: Rows[int]) -> list[int]:
        """Of each the smallest that a process has."""
        found = torch.tensor(numbers)
        with noticing():
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return found.tolist()

    def _share(self, tensor: Tensor) -> None:
        with noticing():
            dist.broadcast(tensor, 0, group=self.group)


class noticing:
    """Inside, a collective that fails raises `ProcessLost`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, RuntimeError):
            said = str(error).strip().splitlines()[0]
            raise ProcessLost(re.sub(r"^\[[^]]*\] ", "", said).split(". ")[0]) from error  # gloo begins with its own source


class _Ranked(Engine):
    """What leading and following engines have in common. The model is divided already, `tokenizer` and `config` are alike."""

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig | None = None, **options: Any):
        self.channel = Channel()
        config = config or EngineConfig()
        row_shapes(model)  # by a forward pass, which all must make together, and once
        runner = runner_for(model, config)
        counts = self.channel.least([group.num_pages for group in runner.groups] + [runner.snapshot_bytes or 0])
        runner.groups = [replace(group, num_pages=count) for group, count in zip(runner.groups, counts)]
        if runner.snapshot_bytes is not None:
            runner.snapshot_bytes = counts[-1]
        self.now: float | None = None  # while orders are given or taken, outside of a step
        measure = options.pop("clock", None)
        super().__init__(model, tokenizer, config, runner=runner, **({} if measure is None else {"clock": measure}), **options)
        self.measure, self.clock = self.clock, self._clock
        if self.speculator is not None:
            self.speculator.clock = self._clock
        self.answering.sampler.agreed = self.channel.tokens

    def _clock(self) -> float:
        return self.channel.number(self.measure) if self.now is None else self.now

    def checksum(self, below: int | None = None) -> int:
        """Of what the answers have become of all jobs, or of those with numbers `below` one."""
        parts = [
            (number, one.answer, one.computed, len(one.tokens), one.tokens[-RECENT:])
            for number, job in self.jobs.items()
            for one in job.sequences
            if below is None or number < below
        ]
        return zlib.crc32(repr(parts).encode())


class LeadingEngine(_Ranked):
    """The engine of process 0, used like any other; `close` (or `with`) lets the others go."""

    leads = True

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.orders: list[dict[str, Any]] = []
        self.late: list[Callable[[], None]] = []
        self.inside = self.closed = False
        self.before = self.checksum()  # as the others have it

    def submit(self, prompt: Rows[int], params: SamplingParams, **options: Any) -> Job:
        """As `Engine.submit`; raises `UserError` for pictures and sounds, and for sites of which each process has a part."""
        soft, edits, notify = options.pop("soft", None), options.get("edits"), options.pop("notify", None)
        if soft is not None:
            raise UserError("a model in several processes takes no pictures or sounds; serve it in one")
        _check_sites(edits)
        if params.seed is None and params.beam_width is None:
            params = params.model_copy(update={"seed": secrets.randbits(62)})  # the same in all processes
        prompt, self.now = [int(token) for token in prompt], self.measure()
        try:
            job = super().submit(prompt, params, notify=notify and self._listener(notify), **options)
        finally:
            now, self.now = self.now, None
        if job.notify is not None:
            job.notify.number = job.number  # type: ignore[attr-defined]
        given = {name: value for name, value in options.items() if name != "edits"}
        given["source"] = list(given.get("source", ()))
        told = {"edits": None if edits is None else edits.model_dump(mode="json"), "heard": notify is not None, "now": now}
        self.orders.append({"submit": prompt, "params": params.model_dump(mode="json"), "options": given, **told})
        return job

    def _listener(self, notify: Callable[[Update], None]) -> "_Listener":
        return _Listener(self, notify)

    def cancel(self, job: Job) -> None:
        self._end_later(job, "cancelled", None)

    def fail(self, number: int, error: Exception) -> None:
        """End a job whose listener raised."""
        if (job := self.jobs.get(number)) is not None:
            self._end_later(job, "failed", error)

    def _end_later(self, job: Job, outcome: Any, error: Exception | None) -> None:
        """End a job between two steps, here and everywhere."""

        def order() -> None:
            if not job.finished:
                self.orders.append({"end": job.number, "outcome": outcome, "error": str(error)})
                self.end(job, outcome, error)

        self.late.append(order) if self.inside else order()

    def step(self) -> bool:
        if self.closed:
            raise UserError("this engine is closed: its other processes have gone; start them again")
        if not self.jobs and not self.orders:
            return False
        self.inside = True
        try:
            self.channel.send({"orders": self.orders, "checksum": self.before})
            self.orders, told = [], self.counts["submitted"]
            super().step()
        except ProcessLost as lost:
            self.closed = True
            explain(lost)
        finally:
            self.inside = False
        late, self.late = self.late, []
        self.before = self.checksum(below=told)
        for order in late:
            order()
        return bool(self.jobs)

    def close(self) -> None:
        """Let the other processes go."""
        if not self.closed:
            self.closed = True
            try:
                self.channel.send(None)
            except ProcessLost as lost:
                explain(lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()


class _Listener:
    """Whoever listens to a job of a leading engine. What it raises ends its job after the step."""

    number = -1

    def __init__(self, engine: LeadingEngine, notify: Callable[[Update], None]):
        self.engine, self.notify = engine, notify

    def __call__(self, update: Update) -> None:
        try:
            self.notify(update)
        except Exception as error:
            self.engine.fail(self.number, error)


class FollowingEngine(_Ranked):
    """The engine of every other process."""

    leads = False

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig | None = None, **options: Any):
        config = (config or EngineConfig()).model_copy(update={"max_queue": None})  # the first process refuses
        super().__init__(model, tokenizer, config, **options)

    def submit(self, *arguments: Any, **options: Any) -> Job:
        raise UserError("this process follows the first one of its engine: submit and step there, and call follow() here")

    step = submit  # type: ignore[assignment]

    def follow(self) -> None:
        """Do what the first process says, until it closes its engine. Raises `HeadspringError` where one of them is lost."""
        try:
            while (message := self.channel.receive()) is not None:
                if message["checksum"] != self.checksum():
                    raise HeadspringError(
                        "the processes of this engine have computed different answers; start all of them again"
                    )
                for order in message["orders"]:
                    self._obey(order)
                super().step()
        except ProcessLost as lost:
            explain(lost)

    def _obey(self, order: dict[str, Any]) -> None:
        if "end" in order:
            error = HeadspringError(order["error"]) if order["outcome"] == "failed" else None
            return self.end(self.jobs[order["end"]], order["outcome"], error)
        edits = None if order["edits"] is None else Inspection.of(**order["edits"])
        self.now = order["now"]
        notify = _nobody if order["heard"] else None
        super().submit(order["submit"], SamplingParams(**order["params"]), edits=edits, notify=notify, **order["options"])
        self.now = None


def _nobody(update: Update) -> None:
    """The first process tells the client."""


def _check_sites(edits: Inspection | None) -> None:
    if edits is None:
        return
    sites = [*edits.capture, *(() if edits.lens is None else edits.lens.sites), *(edit.site for edit in edits.edits)]
    for site in map(str, sites):
        if site.rpartition(".")[2] in DIVIDED:
            raise UserError(f"each process has a part of {site!r}; look at residual, out, embed or final, or use one process")


def explain(lost: ProcessLost) -> NoReturn:
    """What a user is told."""
    raise HeadspringError(f"another process of this engine has ended or hangs ({lost}); start all of them again") from lost


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
