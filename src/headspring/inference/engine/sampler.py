"""Hidden states to tokens, for the rows of a step: each request by its own settings and its own uniform numbers."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from headspring.artifacts import HeadspringError
from headspring.inference.generation import Request
from headspring.inference.sampling import RowParams, most_likely, sample


class Sampler:
    """Samples for requests of one model, whose tokenizer has `named` of its `vocab` ids."""

    def __init__(self, vocab: int, named: int, device: torch.device):
        self.vocab, self.device = vocab, device
        # A model may have more rows than its tokenizer has tokens; those ids have no text.
        self.nameless: Tensor | None = None
        if vocab > named:
            self.nameless = torch.arange(vocab, device=device)[None] >= named

    def sample(self, requests: Sequence[Request], logits: Tensor) -> list[Exception | None]:
        """Give each request its next token from its row of (R, V) float32; for each, what went wrong with it alone."""
        rows = RowParams.of([request.params for request in requests], self.vocab, self.device)
        uniforms = torch.stack([request.uniforms[len(request.token_ids)] for request in requests]).to(self.device)
        seen = self._mask([request.prompt + request.token_ids for request in requests]) if rows.any_penalty else None
        ids, log_probs = sample(logits, rows, uniforms, seen, self._banned(requests))
        self._record_top(requests, logits)
        failures: list[Exception | None] = []
        for request, token, log_prob in zip(requests, ids.tolist(), log_probs.tolist(), strict=True):
            broken = math.isnan(log_prob)
            message = "the model gave NaN logits; its weights or an intervention are broken"
            failures.append(HeadspringError(message) if broken else None)
            if not broken:
                request.accept(token, log_prob)
        return failures

    def _banned(self, requests: Sequence[Request]) -> Tensor | None:
        """(B or 1, V) bool: ids without text, and stop tokens that would come too early."""
        if all(request.may_stop for request in requests):
            return self.nameless
        early = self._mask([() if request.may_stop else request.stop_ids for request in requests])
        return early if self.nameless is None else early | self.nameless

    def _record_top(self, requests: Sequence[Request], logits: Tensor) -> None:
        count = max(request.params.logprobs or 0 for request in requests)
        ids, values = most_likely(logits, min(count, self.vocab))
        for request, row_ids, row_values in zip(requests, ids.tolist(), values.tolist(), strict=True):
            if (wanted := request.params.logprobs) is not None:
                request.top_logprobs.append(dict(zip(row_ids[:wanted], row_values[:wanted], strict=True)))

    def _mask(self, rows: Sequence[Iterable[int]]) -> Tensor:
        """(B, V) bool, True at each row's ids."""
        mask = torch.zeros(len(rows), self.vocab, dtype=torch.bool)
        for row, ids in enumerate(rows):
            mask[row, torch.tensor(list(ids), dtype=torch.int64)] = True
        return mask.to(self.device)
