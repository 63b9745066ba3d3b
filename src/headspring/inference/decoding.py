"""The one decode loop, behind generate, stream and chat: a batch of requests, a model, a state.

Prompts of different lengths share a batch by padding on the left, so that the next token of every row lies in the same
column: one forward over the prompts (prefill), then one forward a token. A row that has finished rides along until a
quarter of the batch is idle; then the others are copied together (`state.select`). Dropping each row at once would copy
the whole state for every answer that ends; never dropping would run at the length of the longest answer.

What this gives up is continuous batching, where a waiting prompt takes a finished row's place: that needs a state in
pages. Sorting prompts by length before they are cut into batches (`in_batches`) keeps the padding small.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headspring.artifacts import HeadspringError
from headspring.inference.generation import Request
from headspring.inference.sampling import RowParams, sample

IDLE_SHARE = 0.25  # of a batch's rows, at which finished ones are dropped


def in_batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Batches of requests of similar length, the longest first (what does not fit in memory shows at once)."""
    ordered = sorted(requests, key=lambda request: (len(request.prompt), request.new_tokens), reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


@torch.inference_mode()
def decode(model: Any, requests: Sequence[Request], pad_id: int) -> Iterator[int]:
    """Run a batch to its end, filling the requests in place; after each step yields how many have finished.

    `model` is a module of the models room. Raises `HeadspringError` where it gives NaN."""
    device = next(model.parameters()).device
    rows = _Rows(list(requests), device)
    tokens, padding = pad_left([request.prompt for request in requests], pad_id)
    state = model.new_state(len(requests), tokens.shape[1] + max(request.new_tokens for request in requests) - 1)
    hidden = model(tokens.to(device), state=state, padding=None if padding is None else padding.to(device))[:, -1]
    step = 0
    while True:
        ids = rows.step(model.logits(hidden), step)
        kept = [row for row, request in enumerate(rows.requests) if request.finish_reason is None]
        yield len(requests) - len(kept)
        if not kept:
            return
        if len(kept) <= (1 - IDLE_SHARE) * len(rows.requests):
            chosen = torch.tensor(kept, device=device)
            state.select(chosen)
            ids, rows = ids[chosen], _Rows([rows.requests[row] for row in kept], device)
        hidden = model(ids[:, None], state=state)[:, -1]
        step += 1


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Rows (B, T) int64 that end together, and how many pads each begins with, (B,); None where no row has any."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    return tokens, padding if bool(padding.any()) else None


class _Rows:
    """The rows of the running batch: whose they are, and what sampling needs to know about them as tensors."""

    def __init__(self, requests: list[Request], device: torch.device):
        self.requests = requests
        steps = max(request.new_tokens for request in requests)
        uniforms = [torch.nn.functional.pad(r.uniforms, (0, steps - len(r.uniforms))) for r in requests]
        self.uniforms = torch.stack(uniforms).to(device)  # (B, steps) float64
        self.min_tokens = max(request.params.min_tokens for request in requests)
        self.num_top = max(request.params.logprobs or 0 for request in requests)
        self.params: RowParams | None = None
        self.seen: Tensor | None = None

    def step(self, logits: Tensor, step: int) -> Tensor:
        """Sample a token for every row from (B, V) float32 and hand it to the unfinished requests. Returns (B,) ids."""
        if self.params is None:
            self.params = RowParams.of([request.params for request in self.requests], logits.shape[-1], logits.device)
            if self.params.any_penalty:
                self.seen = _mask([request.prompt + request.token_ids for request in self.requests], logits)
        banned = None
        if step < self.min_tokens:
            banned = _mask([[] if request.may_stop else request.stop_ids for request in self.requests], logits)
        ids, log_probs = sample(logits, self.params, self.uniforms[:, step], self.seen, banned)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if self.num_top:
            self._record_top(logits)
        for request, token, log_prob in zip(self.requests, ids.tolist(), log_probs.tolist(), strict=True):
            if request.finish_reason is None:
                if log_prob != log_prob:
                    raise HeadspringError("the model gave NaN logits; its weights or an intervention are broken")
                request.accept(token, log_prob)
        return ids

    def _record_top(self, logits: Tensor) -> None:
        values, ids = (logits - logits.logsumexp(-1, keepdim=True)).topk(min(self.num_top, logits.shape[-1]))
        for request, row_ids, row_values in zip(self.requests, ids.tolist(), values.tolist(), strict=True):
            if request.params.logprobs is not None and request.finish_reason is None:
                count = request.params.logprobs
                request.top_logprobs.append(dict(zip(row_ids[:count], row_values[:count], strict=True)))


def _mask(rows: Sequence[Any], like: Tensor) -> Tensor:
    """(B, V) bool, True at each row's ids."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for row, ids in enumerate(rows):
        mask[row, torch.tensor(list(ids), dtype=torch.int64)] = True
    return mask.to(like.device)
