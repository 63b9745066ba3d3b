"""The one decode loop, behind generate, stream and chat: a batch of requests, a model, a state.

Prompts of different lengths share a batch by padding on the left, so that the next token of every row lies in the same
column: one forward over the prompts (prefill), then one forward a token. A prompt that stands in several rows, because
several answers to it are wanted, is read once and its state copied to all of them. A row that has finished rides along
until a quarter of the batch is idle; then the others are copied together (`state.select`). Dropping each row at once would
copy the whole state for every answer that ends; never dropping would run at the length of the longest answer.

What this gives up is continuous batching, where a waiting prompt takes a finished row's place: that needs a state in
pages. Sorting prompts by length before they are cut into batches (`in_batches`) keeps the padding small.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from headspring.artifacts import HeadspringError
from headspring.inference.generation import Request
from headspring.inference.sampling import RowParams, most_likely, sample
from headspring.models.model import ModelModule
from headspring.tokenization.tokenizer import Tokenizer

IDLE_SHARE = 0.25  # of a batch's rows, at which finished ones are dropped


def in_batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Batches of requests of similar length, the longest first (what does not fit in memory shows at once)."""
    ordered = sorted(requests, key=lambda request: (len(request.asked), request.new_tokens), reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


@torch.inference_mode()
def decode(model: ModelModule, requests: Sequence[Request], tokenizer: Tokenizer) -> Iterator[int]:
    """Run a batch to its end, filling the requests in place; after each token yields how many have finished.

    Raises `HeadspringError` where the model gives NaN."""
    live = list(requests)
    while live:
        for unfinished in _decode_until_full(model, live, tokenizer):
            yield len(requests) - len(unfinished)
        live = unfinished


def _decode_until_full(model: ModelModule, live: list[Request], tokenizer: Tokenizer) -> Iterator[list[Request]]:
    """Decode until all have finished or the state's last column is taken; after each token yields the unfinished.

    Padding can fill the columns of a short row before its own context ends. The caller then starts it again, from its
    prompt and answer so far, with less padding: one more prefill, and no row's answer depends on its neighbours."""
    rows = _Rows(live, model, tokenizer)
    asked, copies = distinct([(request.source, request.prompt + request.token_ids) for request in live])
    prompts = [prompt for _, prompt in asked]
    tokens, padding = pad_left(prompts, tokenizer.pad_id or 0)
    state = model.new_state(len(prompts), tokens.shape[1] + max(request.remaining for request in live) - 1)
    padding = None if padding is None else padding.to(model.device)
    given = _given([source for source, _ in asked], tokenizer.pad_id or 0, model.device)
    hidden = model(tokens.to(model.device), state=state, padding=padding, **given)[:, -1]
    if len(prompts) < len(live):
        copies = copies.to(model.device)
        state.select(copies)
        hidden = hidden[copies]
    while True:
        ids = rows.step(model.logits(hidden))
        kept = [row for row, request in enumerate(rows.requests) if request.finish_reason is None]
        yield [rows.requests[row] for row in kept]
        if not kept or state.length == state.capacity:
            return
        if len(kept) <= (1 - IDLE_SHARE) * len(rows.requests):
            chosen = torch.tensor(kept, device=model.device)
            state.select(chosen)
            ids, rows = ids[chosen], _Rows([rows.requests[row] for row in kept], model, tokenizer)
        hidden = model(ids[:, None], state=state)[:, -1]


def _given(sources: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """What a model's forward takes beside the prompts; nothing where no encoder reads."""
    if not sources[0]:
        return {}
    source, padding = pad_left(sources, pad_id)
    given = {"source": source, "source_padding": padding}
    return {name: tensor.to(device) for name, tensor in given.items() if tensor is not None}


Asked = tuple[list[int], list[int]]  # source and prompt


def distinct(asked: Sequence[Asked]) -> tuple[list[Asked], Tensor]:
    """The different ones among B requests, in order of their first place, and which of them each is, (B,) int64."""
    numbers: dict[tuple[tuple[int, ...], ...], int] = {}
    which = [numbers.setdefault(tuple(map(tuple, one)), len(numbers)) for one in asked]
    return [(list(source), list(prompt)) for source, prompt in numbers], torch.tensor(which)


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Rows (B, T) int64 that end together, and how many pads each begins with, (B,); None where no row has any."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    return tokens, padding if bool(padding.any()) else None


class _Rows:
    """The rows of the running batch: whose they are, and what sampling needs to know about them as tensors."""

    def __init__(self, requests: list[Request], model: ModelModule, tokenizer: Tokenizer):
        self.requests, self.device, self.vocab = requests, model.device, model.config.vocab
        params = [request.params for request in requests]
        self.params = RowParams.of(params, self.vocab, self.device)
        self.step_number = len(requests[0].token_ids)  # the same for all that have not finished
        uniforms = torch.nn.utils.rnn.pad_sequence([request.uniforms for request in requests], batch_first=True)
        self.uniforms = uniforms.to(self.device)
        self.num_top = max(one.logprobs or 0 for one in params)
        self.min_tokens = max(one.min_tokens for one in params)
        self.seen: Tensor | None = None
        if self.params.any_penalty:
            self.seen = self._mask([request.prompt + request.token_ids for request in requests])
        # A model may have more rows than its tokenizer has tokens; those ids have no text.
        self.nameless: Tensor | None = None
        if self.vocab > tokenizer.vocab_size:
            self.nameless = torch.arange(self.vocab, device=self.device)[None] >= tokenizer.vocab_size

    def step(self, logits: Tensor) -> Tensor:
        """Sample a token for every row from (B, V) float32 and hand it to the unfinished requests. Returns (B,) ids."""
        uniforms = self.uniforms[:, self.step_number]
        ids, log_probs = sample(logits, self.params, uniforms, self.seen, self._banned())
        self.step_number += 1
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if self.num_top:
            self._record_top(logits)
        for request, token, log_prob in zip(self.requests, ids.tolist(), log_probs.tolist(), strict=True):
            if request.finish_reason is None:
                if math.isnan(log_prob):
                    raise HeadspringError("the model gave NaN logits; its weights or an intervention are broken")
                request.accept(token, log_prob)
        return ids

    def _banned(self) -> Tensor | None:
        """(B or 1, V) bool: ids without text, and stop tokens that would come too early."""
        if self.step_number >= self.min_tokens:
            return self.nameless
        early = self._mask([() if request.may_stop else request.stop_ids for request in self.requests])
        return early if self.nameless is None else early | self.nameless

    def _record_top(self, logits: Tensor) -> None:
        ids, values = most_likely(logits, min(self.num_top, self.vocab))
        for request, row_ids, row_values in zip(self.requests, ids.tolist(), values.tolist(), strict=True):
            if request.params.logprobs is not None and request.finish_reason is None:
                count = request.params.logprobs
                request.top_logprobs.append(dict(zip(row_ids[:count], row_values[:count], strict=True)))

    def _mask(self, rows: Sequence[Iterable[int]]) -> Tensor:
        """(B, V) bool, True at each row's ids."""
        mask = torch.zeros(len(rows), self.vocab, dtype=torch.bool)
        for row, ids in enumerate(rows):
            mask[row, torch.tensor(list(ids), dtype=torch.int64)] = True
        return mask.to(self.device)
