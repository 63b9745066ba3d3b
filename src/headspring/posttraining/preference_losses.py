"""Preference losses as pure functions of four log-probabilities a pair: the seam where other algorithms come in.

Notation of arXiv 2305.18290: w the chosen and l the rejected answer, a log-probability is the sum over an answer's
tokens, and d = (log π(w) − log π_ref(w)) − (log π(l) − log π_ref(l)).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

LossName = Literal["sigmoid"]
PairLoss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def sigmoid(chosen_ratio: torch.Tensor, rejected_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(β·d) for each pair, (P,): DPO, arXiv 2305.18290 equation 7.

    `chosen_ratio` is log π(w) − log π_ref(w), `rejected_ratio` likewise, (P,) float32."""
    return -logsigmoid(beta * (chosen_ratio - rejected_ratio))


LOSSES: dict[LossName, PairLoss] = {"sigmoid": sigmoid}
