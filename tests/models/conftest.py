"""Small decoders with random weights everywhere: default initialisations hide missing parts."""

import numpy as np
import pytest
import torch

from headspring.models import Attention, Block, Decoder, SwiGLU, repeat


def small_decoder(**changes) -> Decoder:
    attention = Attention(heads=4, kv_heads=2)
    settings = {
        "vocab": 61,
        "width": 32,
        "layers": repeat(2, Block(mixer=attention, feedforward=SwiGLU(hidden=48))),
        "context": 32,
    }
    return Decoder(**(settings | changes))


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    if getattr(getattr(model, "config", None), "counted", False):
        draw = np.random.default_rng(seed)
        model.count([np.array([model.config.bos, *draw.integers(1, model.config.vocab, 30)]) for _ in range(200)])
    return fill(model, seed)


def fill(part: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random parameters for a part that is no whole model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(part.named_parameters()):
            parameter.normal_(0.3, 0.3, generator=generator) if parameter.dim() == 1 else parameter.normal_(
                0.0, 0.3, generator=generator
            )
    return part


@pytest.fixture
def model():
    return randomise(small_decoder().build())
