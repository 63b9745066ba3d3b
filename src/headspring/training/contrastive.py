"""Contrastive training of embeddings: InfoNCE with the other pairs of the batch as wrong answers (arXiv 1807.03748).

    s_ij = q_i · p_j / temperature,   loss = −½ Σ_i [ log softmax_j(s_ij)_i + log softmax_i(s_ij)_i ]

q_i and p_j are normalised embeddings of the two sides of B pairs: each query has to find its passage among B, and each
passage its query. That is a cross-entropy whose vocabulary is the batch, so that it takes the one path of `scoring`: the
passages are the output matrix. A small temperature makes the nearest wrong answers weigh most.

What it gives up: the batch is part of the objective. Pieces of a batch (`micro_batch_size`, or several processes) have
fewer wrong answers each, an easier question, and are not the gradient of the whole: here alone, accumulation is no identity.
"""

from dataclasses import dataclass
from typing import Any

import torch

from headspring.data.text_pairs import PairBatch
from headspring.models.model import ModelModule
from headspring.models.pooling import Pooling, pool
from headspring.models.scoring import cross_entropy_sum


@dataclass(frozen=True)
class Candidates:
    """A head whose tokens are the passages (or the queries) of a batch, (B, D)."""

    output_weight: torch.Tensor
    output_bias: None = None
    softcap: None = None

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Contrast:
    """InfoNCE in both directions, in nats a pair; `right` is the share of queries that find their passage in the batch."""

    def __init__(self, pooling: Pooling, temperature: float):
        self.pooling = pooling.model_copy(update={"normalize": True})
        self.temperature = temperature

    def count(self, batch: PairBatch) -> int:
        return len(batch.queries)

    def loss(self, model: ModelModule, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        queries = pool(model, model(batch.queries, padding=batch.query_padding), batch.query_padding, self.pooling)
        passages = pool(model, model(batch.passages, padding=batch.passage_padding), batch.passage_padding, self.pooling)
        own = torch.arange(len(queries), device=queries.device)
        there = cross_entropy_sum(Candidates(passages), queries / self.temperature, own)
        back = cross_entropy_sum(Candidates(queries), passages / self.temperature, own)
        with torch.no_grad():
            right = ((queries @ passages.T).argmax(1) == own).sum().float()
        return (there + back) / 2, {"right": right}


def ranks(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
    """(n,) int64: how many of the n passages are as near to query i as its own or nearer, 1 being the best."""
    scores = queries @ passages.T
    return (scores >= scores.diagonal()[:, None]).sum(1)
