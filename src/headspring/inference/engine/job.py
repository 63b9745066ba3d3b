"""A job: what a client asked for, its answers on their way, and its one end.

    waiting → running → finished                     every answer has its finish_reason, "stop" or "length"
       └─────────┴───→ cancelled · timeout · failed  the client left, the deadline passed, something broke in this job alone

A job that cannot be taken at all ("rejected") never becomes one: `Engine.submit` raises. Every other one ends exactly once, in
`Job.end`, and nothing but the engine calls that.
"""

from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from headspring.inference.generation import Generation, Request
from headspring.inference.inspection import Probe, Seen
from headspring.inference.sampling_params import SamplingParams
from headspring.models.lora import Adapter
from headspring.models.soft_tokens import SoftTokens

if TYPE_CHECKING:
    from headspring.inference.engine.beams import Search
    from headspring.inference.engine.sequence import Sequence

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
    top_logprobs: list[Mapping[int, float]] | None
    finish_reason: str | None


@dataclass(eq=False)
class Job:
    """`number` counts arrivals. `source` is what an encoder reads and `soft` what towers saw. A prefix is shared by jobs of
    equal `contents` (where towers saw something, what stands at each token of the prompt) and equal `scope`: the client's key,
    the description of its edits, the key of its `adapter`, and the source.

    Once it has `finished` as "finished": `generations`; `seen`, what each answer's inspection saw, by its number; and, where
    asked for, `prompt_logprobs` (natural, of every token of the prompt but the first) and `prompt_tops`. Once it has failed:
    `error`."""

    number: int
    prompt: list[int]
    params: SamplingParams
    source: Rows[int] = ()
    soft: SoftTokens | None = None
    contents: Rows[Hashable] = ()
    columns: Rows[int] = ()  # which of the soft vectors stands at each token of the prompt; -1 where the token itself does
    priority: int = 0
    scope: Hashable = ("", "", "", ())
    adapter: Adapter | None = None
    probe: Probe | None = None
    notify: Callable[[Update], None] | None = None
    requests: list[Request] = field(default_factory=list)  # one an answer
    outcome: Outcome | None = None
    error: Exception | None = None
    generations: list[Generation] = field(default_factory=list)
    search: "Search | None" = None
    sequences: list["Sequence"] = field(default_factory=list)  # under way
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_tops: list[Mapping[int, float] | None] = field(default_factory=list)
    seen: dict[int, Seen] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.outcome is not None

    @property
    def chooses(self) -> bool:
        """Whether it tells its answers when all are there and the best are known."""
        return self.params.answers > self.params.n or self.params.beam_width is not None

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are asked for."""
        return self.params.prompt_logprobs is not None

    @property
    def reads_prefix(self) -> bool:
        """Whether tokens that the cache knows need not be computed: nobody looks at what they make."""
        return not self.wants_prompt and not (self.probe is not None and self.probe.looks)

    def end(self, outcome: Outcome, error: Exception | None = None) -> None:
        """The one end of a job. Only the engine calls this, having freed what the job held."""
        assert self.outcome is None, f"job {self.number} ended as {self.outcome!r} and ends again as {outcome!r}"
        assert outcome != "finished" or self.generations
        self.outcome, self.error = outcome, error
