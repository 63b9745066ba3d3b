"""The engine: many requests, one model, one `step()` at a time.

    submit ─→ waiting ─ schedule ─→ running ─ compute · sample ─→ finished, once
                 ▲                     │
                 └───── preempted ─────┘

A step schedules sequences, computes their tokens by one call of the module, samples, and tells whoever listens. Nothing that a
request gets depends on what else runs: every row is computed from its own sequence alone and sampled by its own numbers.

The engine belongs to one thread; a server queues in front of it. `notify` is called inside a step and may cancel or submit.
What goes wrong in one request (logits that are not numbers, a matcher or an edit that raises) ends that request alone: where a
whole step raises, its sequences are computed again one by one, and the one that raises is the one that failed.

What it gives up: a step waits for its slowest part, and Python says what comes next. Beside the model a step takes 0.2 ms for
one sequence and 2 ms for 64.
"""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, get_args

import torch
from torch import Tensor

from headspring.artifacts import UserError
from headspring.inference.adapters import check_adapters
from headspring.inference.engine.answering import Answering
from headspring.inference.engine.cache import Cache
from headspring.inference.engine.config import EngineConfig, QueueFull
from headspring.inference.engine.job import Job, Outcome, Update
from headspring.inference.engine.runner import Runner, runner_for
from headspring.inference.engine.scheduler import Scheduler
from headspring.inference.engine.sequence import Sequence, Work
from headspring.inference.engine.snapshots import Snapshots
from headspring.inference.engine.submission import check_soft, checked_prompt, require_causal
from headspring.inference.inspection import Inspection, Probe
from headspring.inference.quantization.choice import prepare_for_serving
from headspring.inference.sampling_params import SamplingParams
from headspring.inference.speculation import Speculator
from headspring.models.lora import Adapter
from headspring.models.model import ModelModule
from headspring.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Statistics:
    """Counts since the start, and `waiting`, `running`, `pages_used`, `pages_total` as they are now. `waiting` and `running`
    are answers; `tokens` were sampled, `computed_tokens` went through the model, `prefix_hits` did not have to. Of
    `proposed` tokens (speculation) the `accepted` ones were right; `speculation_off` counts how often proposing was given up.
    `snapshots` of states beside pages are kept now, of `snapshot_bytes` bytes."""

    waiting: int
    running: int
    pages_used: int
    pages_total: int
    steps: int
    tokens: int
    computed_tokens: int
    prefix_hits: int
    preemptions: int
    snapshots: int
    snapshot_bytes: int
    proposed: int
    accepted: int
    speculation_off: int
    submitted: int
    rejected: int
    finished: int
    cancelled: int
    timeout: int
    failed: int


class Engine:
    """Answers requests to `model`, or to it with one of `adapters` by name. `clock` gives seconds that only grow."""

    def __init__(
        self,
        model: ModelModule,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        adapters: Mapping[str, Adapter] | None = None,
        runner: Runner | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.tokenizer, self.config, self.clock = model, tokenizer, config or EngineConfig(), clock
        require_causal(model.config)
        self.adapters = check_adapters(model, adapters or {})
        prepare_for_serving(model)
        self.runner = runner or runner_for(model, self.config)
        sharing, room = self.runner.shares and self.config.prefix_sharing, self.runner.snapshot_bytes
        snapshots = Snapshots(self.runner.snapshot, room) if sharing and room is not None else None
        self.cache = Cache(self.runner.groups, sharing, snapshots)
        self.scheduler = Scheduler(self.cache, self.config.max_sequences, self.config.chunk)
        self.context = min(model.config.context, self.config.context or model.config.context)
        self.answering = Answering(self)
        value = self.config.speculation
        self.speculator = None if value is None else Speculator(value, model, tokenizer, clock)
        self.jobs: dict[int, Job] = {}  # that have not ended, by number
        self.deadlines: list[tuple[float, int]] = []  # a heap of times and numbers of jobs
        self.counts = dict.fromkeys(("steps", "computed_tokens", "submitted", "rejected", *get_args(Outcome)), 0)

    # ---- what a client does

    def submit(
        self,
        prompt: Rows[int],
        params: SamplingParams,
        *,
        source: Rows[int] = (),
        soft: Any = None,
        priority: int = 0,
        timeout: float | None = None,
        key: str = "",
        edits: Inspection | None = None,
        adapter: str | None = None,
        notify: Callable[[Update], None] | None = None,
    ) -> Job:
        """Ask for answers to a prompt of token ids. `source` is what an encoder reads, `soft` what towers made of pictures and
        sounds (`SoftTokens`). Higher `priority` goes first; after `timeout` seconds the job ends, finished or not. Jobs of
        different `key` share no prefixes. `edits` look at activations or change them, `adapter` names one of the engine's.
        `notify` gets an `Update` for each step of each answer, unless the answers are still to be chosen from (best_of, beams):
        then one each.

        Raises `UserError` for what can never be answered, `QueueFull` where too many wait already."""
        try:
            adapted = self._adapter(adapter)
            job = self._job(prompt, params, source, soft, edits, notify)
        except UserError:
            self.counts["rejected"] += 1
            raise
        job.priority = priority
        if timeout is not None:
            heappush(self.deadlines, (self.clock() + timeout, job.number))
        job.adapter = adapted
        changes = ["" if change is None else change.key for change in (job.probe, adapted)]
        job.scope = key, *changes, tuple(job.source)
        self.counts["submitted"] += 1
        self.jobs[job.number] = job
        self.scheduler.add(job.sequences[0])
        return job

    def _job(
        self,
        prompt: Rows[int],
        params: SamplingParams,
        source: Rows[int],
        soft: Any,
        edits: Inspection | None,
        notify: Callable[[Update], None] | None,
    ) -> Job:
        """A job that can be answered, or an error."""
        limit = self.config.max_queue
        if limit is not None and len({sequence.job.number for sequence in self.scheduler.waiting}) >= limit:
            raise QueueFull(f"{limit} requests are waiting already; try again later")
        tokens = checked_prompt(self.model.config, prompt, params, source)
        job = Job(self.counts["submitted"], tokens, params, list(source), soft, notify=notify)
        sequence = self.answering.first(job)
        new = sequence.request.new_tokens
        for group in self.cache.groups:
            if group.most_pages(len(tokens) + new - 1, self.config.chunk) > group.num_pages:
                raise UserError(
                    f"{len(tokens)} tokens of prompt and {new} of answer need more memory than the engine has in all; "
                    "ask for fewer, or give it more (memory)"
                )
        if soft is not None:
            check_soft(self.model, soft, tokens)
            job.contents, job.columns = soft.contents(tokens), soft.columns(tokens)
        if edits is not None:
            sequence.probe = job.probe = Probe.of(self.model, edits, len(tokens), new)
        return job

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is not None and name not in self.adapters:
            raise UserError(f"there is no adapter {name!r} here; there is {', '.join(self.adapters) or 'none'}")
        return None if name is None else self.adapters[name]

    def cancel(self, job: Job) -> None:
        """End a job, wherever it is; what it holds is free at once. One that has ended stays as it ended."""
        if not job.finished:
            self.end(job, "cancelled")

    # ---- a step

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute and sample once. False where nothing is left to do."""
        self._expire()
        work = self.scheduler.schedule()
        if work:
            self.counts["steps"] += 1
            self.answering.ask(work)
            before, writing = self.answering.tokens, self._speculate(work)
            done = self._compute(work)
            self.answering.answer(done)
            if self.speculator is not None:
                self.speculator.after(writing, self.answering.tokens - before)
        assert work or not self.jobs, "jobs are left, and none of them can go on"
        if self.config.debug:
            self.cache.check(self.scheduler)
        return bool(self.jobs)

    def _expire(self) -> None:
        """End the jobs whose time is over."""
        while self.deadlines and self.deadlines[0][0] <= self.clock():
            job = self.jobs.get(heappop(self.deadlines)[1])
            if job is not None:
                self.end(job, "timeout")

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.step():
            pass

    def _speculate(self, work: list[Work]) -> int:
        """Let answers that get one token compute proposed ones too. How many these are; 0 where the step does other work, so
        that its time says nothing about theirs."""
        writing = [item for item in work if item.count == 1 and item.sequence.request.token_ids]
        writing = [item for item in writing if item.sequence.job.params.beam_width is None]
        if self.speculator is None or not writing:
            return 0
        proposals = self.speculator.before([item.sequence.request for item in writing], self.scheduler.budget)
        for item, tokens in zip(writing, proposals, strict=True):
            self.scheduler.extend(item, tokens)
        return len(writing) if len(writing) == len(work) else 0

    def _compute(self, work: list[Work]) -> list[tuple[Work, Tensor]]:
        """Each work that succeeded, with the hidden states (rows, D) that it wanted."""
        self.runner.copy([copy for _, copy in self.scheduler.copies])
        try:
            hidden = self.runner.run(work)
            done = list(zip(work, hidden.split([item.rows for item in work]), strict=True))
        except Exception:
            alone = [(item, self._alone(item)) for item in work]
            done = [(item, rows) for item, rows in alone if rows is not None and not item.sequence.job.finished]
        for item, _ in done:
            item.sequence.computed += item.count
            self.counts["computed_tokens"] += item.count
        return done

    def _alone(self, work: Work) -> Tensor | None:
        """The same for one sequence, after a step of several raised; None where it is the one that does: twice, because what
        passes by itself may fall into its turn."""
        try:
            try:
                return self._once_more(work)
            except Exception:
                return self._once_more(work)
        except Exception as error:
            self.end(work.sequence.job, "failed", error)
        return None

    def _once_more(self, work: Work) -> Tensor | None:
        sequence = work.sequence
        if sequence.job.finished:
            return None  # with another of its answers
        if sequence.state is None or self.runner.boundary(sequence, sequence.computed) == sequence.computed:
            return self.runner.run([work])  # into the pages that were reserved for the step
        self.scheduler.preempt(sequence)  # it begins again, in a step of its own making
        return None

    def go_back(self, sequence: Sequence, length: int) -> bool:
        """Forget what was computed after `length` tokens, or a little more where a state cannot go back to just there: then
        False."""
        kept = length if sequence.state is None else self.runner.boundary(sequence, length)
        self.cache.shorten(sequence, kept)
        return kept == length

    # ---- the end of a job

    def end(self, job: Job, outcome: Outcome, error: Exception | None = None) -> None:
        """End a job and free what it holds."""
        unfinished = [sequence.answer for sequence in job.sequences] or [0]
        for sequence in job.sequences:
            self.scheduler.remove(sequence)
        job.sequences.clear()
        del self.jobs[job.number]
        self.counts[outcome] += 1
        job.end(outcome, error)
        if outcome != "finished" and job.notify is not None:
            for answer in unfinished:
                with suppress(Exception):  # who listens has been told, or cannot be
                    job.notify(Update(answer, "", [], [], None, outcome))

    def stats(self) -> Statistics:
        """What the engine does now, and what it has done."""
        speculator, snapshots = self.speculator, self.cache.snapshots
        return Statistics(
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            pages_used=self.cache.used,
            pages_total=self.cache.total,
            tokens=self.answering.tokens,
            prefix_hits=self.cache.hits,
            preemptions=self.scheduler.preemptions,
            snapshots=0 if snapshots is None else len(snapshots.nodes),
            snapshot_bytes=0 if snapshots is None else snapshots.bytes,
            proposed=0 if speculator is None else speculator.proposed,
            accepted=0 if speculator is None else speculator.accepted,
            speculation_off=0 if speculator is None else speculator.controller.switched_off,
            **self.counts,
        )
