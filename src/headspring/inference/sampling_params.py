"""What a request may ask of its tokens: how they are chosen, when they end, and what is told about them.

Every field is obeyed, alone and together with every other one, or refused when the value is made: in one line, before anything
has run. `docs/sampling.md` shows the order in which they act.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from headspring.artifacts import UserError, Value
from headspring.inference.structured import Structured

ALL = -1  # as a number of log-probabilities: those of the whole vocabulary


class SamplingParams(Value):
    """How one request wants its tokens chosen, and when to stop. Invalid values raise `UserError` through `of`.

    The defaults are the model's own distribution, unchanged."""

    max_tokens: int = Field(256, ge=1)
    min_tokens: int = Field(0, ge=0, description="no stop token and no stop string counts before this many tokens")
    temperature: float = Field(1.0, ge=0, description="0 is greedy: the most likely token, the first one of a tie")
    top_k: int | None = Field(None, ge=1, description="keep the k most likely tokens (arXiv 1805.04833)")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the fewest tokens with this much mass (arXiv 1904.09751)")
    min_p: float = Field(0.0, ge=0, le=1, description="keep tokens with p ≥ min_p · max p (arXiv 2407.01082)")
    repetition_penalty: float = Field(1.0, gt=0, description="of tokens seen so far (arXiv 1909.05858, section 4.1)")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="taken from the logits of tokens that the answer has")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="the same, times how often the answer has them")
    logit_bias: dict[int, float] = Field({}, description="added to the logits of these ids")
    seed: int | None = Field(None, ge=0, lt=2**63, description="None takes a new one each time")
    n: int = Field(1, ge=1, description="answers for each prompt")
    best_of: int | None = Field(None, ge=1, description="make so many, give the n with the best mean log-probability")
    beam_width: int | None = Field(None, ge=1, description="search for likely answers with so many at a time; draw nothing")
    length_penalty: float = Field(1.0, description="beams are ranked by Σ log p / length ** this")
    early_stopping: bool | Literal["never"] = Field(
        False, description="a search ends when the worst of beam_width finished answers is out of reach: True, at once; "
        "False, by the present length; 'never', by the best possible one"
    )  # fmt: skip
    stop: tuple[str, ...] = Field((), description="the text ends before the first of these strings")
    stop_token_ids: tuple[int, ...] = Field((), description="beside the tokenizer's own end tokens")
    ignore_eos: bool = Field(False, description="go on after the tokenizer's own end tokens")
    logprobs: int | None = Field(None, ge=ALL, description="also return this many most likely tokens at each step; -1: all")
    prompt_logprobs: int | None = Field(None, ge=ALL, description="the same for each token of the prompt; 0: only itself")
    structured: Structured | None = Field(None, description="what the text must match")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("a stop string cannot be empty")
        return stop

    @field_validator("logprobs", "prompt_logprobs", mode="before")
    @classmethod
    def _by_name(cls, count: Any) -> Any:
        return ALL if count == "all" else count

    @model_validator(mode="after")
    def _fits_together(self) -> "SamplingParams":
        for wrong, why in (*self._never(), *(self._with_beams() if self.beam_width is not None else self._without_beams())):
            if wrong:
                raise ValueError(why)
        return self

    def _never(self) -> tuple[tuple[bool, str], ...]:
        return (
            (self.structured is not None and self.ignore_eos, "structured text ends by an end token; leave ignore_eos out"),
            (self.structured is not None and self.min_tokens > 0, "structured text has its own length; leave min_tokens out"),
        )

    def _without_beams(self) -> tuple[tuple[bool, str], ...]:
        best_of = self.best_of or self.n
        return (
            (best_of < self.n, f"n={self.n} answers cannot be chosen out of best_of={best_of}"),
            (best_of > self.n and self.temperature == 0, "temperature=0 makes best_of equal answers; leave best_of out"),
            (self.length_penalty != 1, "length_penalty ranks the answers of a beam search; give beam_width"),
            (self.early_stopping is not False, "early_stopping ends a beam search; give beam_width"),
        )

    def _with_beams(self) -> tuple[tuple[bool, str], ...]:
        filters = self.top_k is not None or self.top_p < 1 or self.min_p > 0
        return (
            (self.n > self.beam_width, f"n={self.n} answers cannot come out of beam_width={self.beam_width}"),  # type: ignore
            (self.best_of is not None, "beam search keeps the best already; leave best_of out"),
            (self.temperature not in (0, 1), "beam search draws nothing; leave temperature out"),
            (filters, "beam search draws nothing; leave top_k, top_p and min_p out"),
            (self.seed is not None, "beam search draws nothing; leave seed out"),
            (bool(self.stop), "a beam ends by tokens only; use stop_token_ids in the place of stop"),
        )

    @property
    def answers(self) -> int:
        """How many answers run side by side for the `n` that are given back."""
        return self.beam_width or self.best_of or self.n

    @property
    def penalizes(self) -> bool:
        """Whether what was written before changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @classmethod
    def of(cls, **options: Any) -> "SamplingParams":
        """The params for these options; one clear `UserError` for an unknown or impossible one."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise UserError(explain(error.errors()[0], list(cls.model_fields))) from None


def explain(error: Mapping[str, Any], names: list[str]) -> str:
    """One line for the first thing that pydantic found wrong with an option."""
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not error["loc"]:
        return message
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        return f"unknown sampling option {name}; {hint}"
    shown = repr(error["input"])
    return f"{name}={shown if len(shown) < 80 else shown[:77] + '...'}: {message}"
