"""From logits to the next token: the arithmetic. `SamplingParams` says what may be asked of it.

The order of operations is fixed, and it is that of Hugging Face `generate`, so that equal settings mean equal
distributions:

    logits → penalties → bias → what is allowed → ÷ temperature → top-k → top-p → min-p → softmax → one uniform number → token

Each filter looks at what the previous one left, renormalised. Every filter is a threshold ("keep what is at least as
likely as the last token inside"), so tokens that tie with that last one stay too, whatever the order of a sort, and one
sort serves them all.

Every row of a batch has its own settings and its own stream of uniform numbers, one a token, drawn from a generator
on the CPU. A request therefore gets the same tokens whatever else shares its batch, and on every device up to the
rounding of the logits. The token is the inverse of the cumulative distribution at that number; the usual trick
(argmax of p / Exp(1)) needs no cumulative sum but as many random numbers as the vocabulary has entries, for each row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headspring.inference.one_row import draw_one
from headspring.inference.sampling_params import ALL, SamplingParams
from headspring.models.scoring import log_probs_of_logits

__all__ = ["SamplingParams", "log_probs_of_logits"]  # found here too


@dataclass
class RowParams:
    """The settings of B rows as columns (B, 1), and which of them matter to any row."""

    params: Sequence[SamplingParams]
    temperature: Tensor  # float32; 1 where the row is greedy
    greedy: Tensor  # (B,) bool
    top_k: Tensor  # int64; the vocabulary's size where off
    top_p: Tensor  # float64
    min_p: Tensor  # float32
    any_greedy: bool
    any_drawn: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int, device: torch.device | str = "cpu") -> "RowParams":
        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        greedy = [row.temperature == 0 for row in params]
        drawn = [row for row in params if row.temperature > 0]
        return cls(
            params=params,
            temperature=column([max(row.temperature, 1e-30) if row.temperature else 1.0 for row in params]),
            greedy=torch.tensor(greedy, device=device),
            top_k=column([min(row.top_k or vocab, vocab) for row in params], torch.int64),
            top_p=column([row.top_p for row in params], torch.float64),
            min_p=column([row.min_p for row in params]),
            any_greedy=any(greedy),
            any_drawn=bool(drawn),
            any_top_k=any((row.top_k or vocab) < vocab for row in drawn),
            any_top_p=any(row.top_p < 1 for row in drawn),
            any_min_p=any(row.min_p > 0 for row in drawn),
        )


def pick(logits: Tensor, rows: RowParams, uniforms: Tensor) -> Tensor:
    """ids (B,) int64 for logits (B, V) float32, adjusted already, and uniforms (B,) float64 in [0, 1)."""
    if not rows.any_drawn:
        return best(logits)
    if logits.device.type == "cpu":
        return _pick_each(logits, rows, uniforms)
    # The best logit at 0: a tiny temperature then sends the others to −inf, and not the best to +inf.
    scaled = (logits - logits.amax(-1, keepdim=True)) / rows.temperature
    ids = draw(filtered(scaled, rows), uniforms)
    return torch.where(rows.greedy, best(logits), ids) if rows.any_greedy else ids


def _pick_each(logits: Tensor, rows: RowParams, uniforms: Tensor) -> Tensor:
    """The same, row by row."""
    ids = best(logits) if rows.any_greedy else torch.empty(len(logits), dtype=torch.int64)
    table, numbers = logits.numpy(), uniforms.tolist()
    for row, params in enumerate(rows.params):
        if params.temperature > 0:
            ids[row] = draw_one(table[row], params, numbers[row])
    return ids


def best(logits: Tensor) -> Tensor:
    """The first of the most likely tokens. On a CPU NumPy needs a twentieth of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most likely tokens of each row under the model itself, ids and log-probabilities (B, count)."""
    ids = logits.topk(count).indices
    return ids, log_distribution(logits).gather(-1, ids)


def log_distribution(logits: Tensor) -> Tensor:
    """The log-probability of every token, (R, V) float32."""
    return logits.log_softmax(-1)


class Distribution(Mapping[int, float]):
    """The log-probability of every id: a mapping as that of the most likely ones, held as one tensor (V,) float32."""

    def __init__(self, log_probs: Tensor):
        self.log_probs = log_probs

    def __getitem__(self, token: int) -> float:
        if not 0 <= token < len(self.log_probs):
            raise KeyError(token)
        return self.log_probs[token].item()

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.log_probs)))

    def __len__(self) -> int:
        return len(self.log_probs)


def tops_of(
    logits: Tensor, ids: Sequence[int], log_probs: Sequence[float], count: int | None
) -> Sequence[Mapping[int, float] | None]:
    """For each row of logits (R, V) float32, the `count` most likely ids with their log-probabilities, the most likely first;
    of `ids` they are those given. None in each place where `count` is None."""
    if count is None:
        return [None] * len(ids)
    if count == ALL:
        rows = log_distribution(logits).cpu()
        rows[torch.arange(len(ids)), torch.tensor(ids)] = torch.tensor(log_probs)
        return [Distribution(row.clone()) for row in rows]
    top_ids, values = most_likely(logits, min(count, logits.shape[-1]))
    tops = [dict(zip(*pair, strict=True)) for pair in zip(top_ids.tolist(), values.tolist(), strict=True)]
    for top, token, log_prob in zip(tops, ids, log_probs, strict=True):
        if token in top:
            top[token] = log_prob
    return tops


def filtered(logits: Tensor, rows: RowParams) -> Tensor:
    """Logits (B, V) with −inf where top-k, top-p or min-p removes a token."""
    if not (rows.any_top_k or rows.any_top_p or rows.any_min_p):
        return logits
    threshold = torch.full_like(rows.temperature, -torch.inf)
    if rows.any_top_k or rows.any_top_p:
        ordered = descending(logits)
        if rows.any_top_k:
            threshold = ordered.gather(-1, rows.top_k - 1)
        if rows.any_top_p:
            threshold = torch.maximum(threshold, nucleus(at_least(ordered, threshold), rows.top_p))
    if rows.any_min_p:
        threshold = torch.maximum(threshold, logits.amax(-1, keepdim=True) + rows.min_p.log())
    return at_least(logits, threshold)


def nucleus(ordered: Tensor, p: Tensor) -> Tensor:
    """The least likely logit inside, (B, 1): a token stays if the tokens before it, in order of probability, hold less than
    p. `ordered` (B, V), the largest first."""
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    last = ordered.gather(-1, (before < p).sum(-1, keepdim=True).clamp(min=1) - 1)
    # Rounding may put a mass of "all but nothing" at 1 too early: p = 1 is off, not nearly off.
    return last.masked_fill(p >= 1, -torch.inf)


def at_least(logits: Tensor, threshold: Tensor) -> Tensor:
    """Logits (B, V), −inf where they are below the threshold (B, 1)."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.where(logits.numpy() < threshold.numpy(), np.float32(-np.inf), logits.numpy()))
    return logits.masked_fill(logits < threshold, -torch.inf)


def descending(logits: Tensor) -> Tensor:
    """Each row sorted, the largest first. On a CPU NumPy's vectorised sort takes a fiftieth of torch's time: at
    (64, 4096) float32 half a millisecond, less than `topk` needs for 64 of them."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """ids (B,): the inverse of each row's cumulative distribution at its uniform number."""
    mass = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1]
    # u · total may round up to total, which no token's interval contains.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    # NaN lies beyond every interval; the clamp keeps it an id, whose log-probability is NaN too.
    return torch.searchsorted(mass, target[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
