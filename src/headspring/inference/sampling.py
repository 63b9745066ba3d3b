"""From logits to the next token: what a request may ask for, and the arithmetic that obeys it.

The order of operations is fixed, and it is that of Hugging Face `generate`, so that equal settings mean equal
distributions:

    logits → repetition penalty → ÷ temperature → top-k → top-p → min-p → softmax → one uniform number → token

Each filter looks at what the previous one left, renormalised. Every filter is a threshold ("keep what is at least as
likely as the last token inside"), so tokens that tie with that last one stay too, whatever the order of a sort.

Every row of a batch has its own settings and its own stream of uniform numbers, one a token, drawn from a generator
on the CPU. A request therefore gets the same tokens whatever else shares its batch, and on every device up to the
rounding of the logits. The token is the inverse of the cumulative distribution at that number; the usual trick
(argmax of p / Exp(1)) needs no cumulative sum but as many random numbers as the vocabulary has entries, for each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from headspring.artifacts import UserError, Value


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
    seed: int | None = Field(None, ge=0, lt=2**63, description="None takes a new one each time")
    n: int = Field(1, ge=1, description="answers for each prompt")
    stop: tuple[str, ...] = Field((), description="the text ends before the first of these strings")
    stop_token_ids: tuple[int, ...] = Field((), description="beside the tokenizer's own end tokens")
    ignore_eos: bool = Field(False, description="go on after the tokenizer's own end tokens")
    logprobs: int | None = Field(None, ge=0, description="also return this many most likely tokens at each step")

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

    @classmethod
    def of(cls, **options: Any) -> "SamplingParams":
        """The params for these options; one clear `UserError` for an unknown or impossible one."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise UserError(_explain(error.errors()[0], list(cls.model_fields))) from None


def _explain(error: Any, names: list[str]) -> str:
    name = str(error["loc"][0]) if error["loc"] else "options"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        return f"unknown sampling option {name}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}={error['input']!r}: {message[0].lower()}{message[1:]}"


@dataclass
class RowParams:
    """The settings of B rows as columns (B, 1), and which of them matter to any row."""

    temperature: Tensor  # float32; 1 where the row is greedy
    greedy: Tensor  # (B,) bool
    top_k: Tensor  # int64; the vocabulary's size where off
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    penalty: Tensor  # float32
    any_greedy: bool
    any_drawn: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int, device: torch.device | str = "cpu") -> "RowParams":
        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        greedy = [row.temperature == 0 for row in params]
        drawn = [row for row in params if row.temperature > 0]
        return cls(
            temperature=column([max(row.temperature, 1e-30) if row.temperature else 1.0 for row in params]),
            greedy=torch.tensor(greedy, device=device),
            top_k=column([min(row.top_k or vocab, vocab) for row in params], torch.int64),
            top_p=column([row.top_p for row in params]),
            min_p=column([row.min_p for row in params]),
            penalty=column([row.repetition_penalty for row in params]),
            any_greedy=any(greedy),
            any_drawn=bool(drawn),
            any_top_k=any((row.top_k or vocab) < vocab for row in drawn),
            any_top_p=any(row.top_p < 1 for row in drawn),
            any_min_p=any(row.min_p > 0 for row in drawn),
            any_penalty=any(row.repetition_penalty != 1 for row in params),
        )


def sample(
    logits: Tensor, rows: RowParams, uniforms: Tensor, seen: Tensor | None = None, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token for every row.

    logits (B, V) float32; uniforms (B,) float64 in [0, 1), one fresh number a row; seen (B, V) bool, the tokens of the
    row's prompt and answer so far, needed where `rows.any_penalty`; banned (B, V) bool, tokens that must not come.
    Returns ids (B,) int64 and their log-probabilities (B,) float32 under the model itself, before all of that."""
    adjusted = logits
    if rows.any_penalty:
        assert seen is not None, "a repetition penalty needs to know what was seen"
        adjusted = penalize(logits, seen, rows.penalty)
    if banned is not None:
        adjusted = adjusted.masked_fill(banned, -torch.inf)
    if not rows.any_drawn:
        ids = adjusted.argmax(-1)
    else:
        # The best logit at 0: a tiny temperature then sends the others to −inf, and not the best to +inf.
        scaled = (adjusted - adjusted.amax(-1, keepdim=True)) / rows.temperature
        ids = draw(filtered(scaled, rows), uniforms)
        if rows.any_greedy:
            ids = torch.where(rows.greedy, adjusted.argmax(-1), ids)
    return ids, logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most likely tokens of each row under the model itself, ids and log-probabilities (B, count)."""
    values, ids = logits.topk(count)
    return ids, values - logits.logsumexp(-1, keepdim=True)


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """CTRL's penalty: a seen token's logit is divided by it where positive, multiplied where negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Tensor, rows: RowParams) -> Tensor:
    """Logits (B, V) with −inf where top-k, top-p or min-p removes a token."""
    if rows.any_top_k:
        logits = keep_top_k(logits, rows.top_k)
    if rows.any_top_p:
        logits = keep_top_p(logits, rows.top_p)
    if rows.any_min_p:
        logits = keep_min_p(logits, rows.min_p)
    return logits


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """The k most likely tokens of each row."""
    last = descending(logits).gather(-1, k - 1)
    return logits.masked_fill(logits < last, -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """The nucleus: a token stays if the tokens before it, in order of probability, hold less than p."""
    best = descending(logits)
    probs = (best - best.logsumexp(-1, keepdim=True)).exp()
    before = probs.cumsum(-1) - probs
    last = best.gather(-1, (before < p).sum(-1, keepdim=True).clamp(min=1) - 1)
    # Rounding may put a mass of "all but nothing" at 1 too early: p = 1 is off, not nearly off.
    return logits.masked_fill((logits < last) & (p < 1), -torch.inf)


def descending(logits: Tensor) -> Tensor:
    """Each row sorted, the largest first. On a CPU NumPy's vectorised sort takes a fiftieth of torch's time: at
    (64, 4096) float32 half a millisecond, less than `topk` needs for 64 of them."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Tokens at least min_p times as likely as the most likely one."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + min_p.log(), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """ids (B,): the inverse of each row's cumulative distribution at its uniform number."""
    mass = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1]
    # u · total may round up to total, which no token's interval contains.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    # NaN lies beyond every interval; the clamp keeps it an id, whose log-probability is NaN too.
    return torch.searchsorted(mass, target[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
