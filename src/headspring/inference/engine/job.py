"""A job: what a client asked for, its answers on their way, and its one end.

    waiting → running → finished                     every answer has its finish_reason, "stop" or "length"
       └─────────┴───→ cancelled · timeout · failed  the client left, the deadline passed, something broke in this job alone

A job that cannot be taken at all ("rejected") never becomes one: `Engine.submit` raises. Every other one ends exactly once, in
`Job.end`, and nothing but the engine calls that.
"""

from collections.abc import Callable, Sequence as Rows
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from headspring.inference.generation import Generation, Request
from headspring.inference.sampling import SamplingParams

Outcome = Literal["finished", "cancelled", "timeout", "failed"]


@dataclass(frozen=True, slots=True)
class Update:
    """What one step added to answer number `answer`.

    `finish_reason` is None until its last update, and then "stop" or "length", or the outcome of a job that ended otherwise.
    `top_logprobs` is None where none were asked for."""

    answer: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[Any] | None
    finish_reason: str | None


@dataclass(eq=False)
class Job:
    """`number` counts arrivals. `source` is what an encoder reads and `soft` what towers saw; `scope` is what a prefix must
    have in common, beside its tokens, to be shared: the client's key and the description of its edits."""

    number: int
    prompt: list[int]
    params: SamplingParams
    source: Rows[int] = ()
    soft: Any = None
    priority: int = 0
    deadline: float | None = None
    scope: tuple[str, str] = ("", "")
    edits: Any = None
    notify: Callable[[Update], None] | None = None
    requests: list[Request] = field(default_factory=list)
    outcome: Outcome | None = None
    error: Exception | None = None
    prompt_logprobs: list[Any] | None = None
    captures: dict[str, Tensor] = field(default_factory=dict)
    generations: list[Generation] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.outcome is not None

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are asked for."""
        return getattr(self.params, "prompt_logprobs", None) is not None

    @property
    def reads_prefix(self) -> bool:
        """Whether tokens that the cache knows need not be computed: nobody looks at what they make."""
        return not self.wants_prompt and not getattr(self.edits, "captures", False)

    def end(self, outcome: Outcome, error: Exception | None = None) -> None:
        """The one end of a job. Only the engine calls this, having freed what the job held."""
        assert self.outcome is None, f"job {self.number} ended as {self.outcome!r} and ends again as {outcome!r}"
        assert outcome != "finished" or self.generations
        self.outcome, self.error = outcome, error
