"""A tiny model and a tiny pure stream, so that a run takes a fraction of a second."""

import numpy as np
import pytest
import torch

from headspring.data.batch import IGNORE, Sample, Visit
from headspring.training import loop
from headspring.training.config import TrainConfig
from headspring.training.objective import NextToken
from headspring.training.optimizers import build_optimizers
from tests.models.conftest import small_decoder

VOCAB, LENGTH = 61, 16


class Stream:
    """Sample i is a counting pattern that depends on i alone; a fifth of the targets carry no loss."""

    sequence_length = LENGTH

    def __init__(self, masked: bool = False):
        self.masked = masked

    def sample(self, index: int) -> Sample:
        generator = np.random.default_rng(index)
        start, stride = generator.integers(0, VOCAB), generator.integers(1, 4)
        tokens = (start + stride * np.arange(LENGTH + 1)) % VOCAB
        targets = tokens[1:].copy()
        targets[generator.random(LENGTH) < 0.2] = IGNORE
        if self.masked:
            targets[:] = IGNORE
        return Sample(tokens[:-1], targets, np.zeros(LENGTH, dtype=np.int32))

    def where(self, document_id: str) -> list[Visit]:
        return []


@pytest.fixture
def stream():
    return Stream()


@pytest.fixture
def build():
    return lambda: small_decoder().build(seed=1)


def config(**changes) -> TrainConfig:
    settings = {"steps": 12, "batch_size": 8, "precision": "fp32", "checkpoint_every": 5, "validate_every": 100}
    return TrainConfig(**(settings | changes))


def gradients(model, stream, objective=None, **changes) -> dict[str, torch.Tensor]:
    """The gradients of the first step, as the loop forms them in this process or group of processes."""
    settings = config(**changes)
    optimizers = build_optimizers(model, settings.optimizer)
    run = loop.Run(model, objective or NextToken(), stream, settings, optimizers, torch.device("cpu"), settings.steps)
    loop._forward_backward(run)
    return {name: p.grad.clone() for name, p in model.named_parameters()}
