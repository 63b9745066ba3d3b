"""Rounding activations is a noise of its own, and two kernel sets draw it apart: how far they may be from each other.

Products of whole numbers are equal bit for bit in both sets. What differs by a bit is the bfloat16 between them (attention,
norms), and where a number then lies on the other side of a half it becomes another byte. From there on the two models carry two
draws of one noise, so that their distance is that of a model to its floats, and not smaller.
"""

import os
from unittest.mock import patch

import pytest
import torch

from headspring.inference.quantization.installing import install
from headspring.inference.quantization.quantize import quantize
from headspring.inference.quantization.scheme import Quantization
from headspring.models import Attention, Block, SwiGLU, kernels, repeat
from headspring.models.kernels import packed

from ..tiny import tiny_decoder

BOUND = 2.0  # of the distance to the floats: what two independent draws of one small noise come to


def model_with_outliers() -> torch.nn.Module:
    """A few channels of the stream are thirty times as large as the rest, as in trained models."""
    block = Block(mixer=Attention(heads=2, kv_heads=1), feedforward=SwiGLU(hidden=96))
    model = tiny_decoder(300, width=64, layers=repeat(3, block)).build(3).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.12, generator=generator)
        model.embed.weight[:, 5:7] *= 30
    return model


def log_probs(model, tokens: torch.Tensor, choice: str | None) -> torch.Tensor:
    environment = {} if choice is None else {"HEADSPRING_KERNELS": choice}
    with patch.dict(os.environ, environment), torch.inference_mode(), model.computing_in(torch.bfloat16):
        return model.logits(model(tokens)).double().log_softmax(-1)


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """KL, nats a token."""
    return float((first.exp() * (first - second)).sum(-1).mean())


def distances(method: str, group: int | None) -> tuple[float, float]:
    """From floats to whole numbers, and between two kernel sets on whole numbers."""
    model, tokens = model_with_outliers(), torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(1))
    floats = log_probs(model, tokens, None)
    install(model, quantize(model, Quantization(method=method, group=group)))
    native, plain = log_probs(model, tokens, None), log_probs(model, tokens, "plain")
    return divergence(floats, native), divergence(native, plain)


needs_two_sets = pytest.mark.skipif(
    not kernels.multiplies_natively(torch.zeros(1, dtype=torch.bfloat16)), reason="one kernel set on this machine"
)


@needs_two_sets
@pytest.mark.parametrize("group", [None, 32])
def test_two_kernel_sets_are_no_further_apart_than_two_draws_of_the_noise(group):
    noise, between = distances("int8", group)
    assert 0 < between < BOUND * noise


@needs_two_sets
def test_a_definition_with_another_scale_is_seen():
    """The control: scales that are 3 % too large in one of the two sets."""
    real = packed.quantize_rows

    def quantize_rows(x, group):
        whole, scales = real(x, group)
        return whole, scales * 1.03

    with patch.object(packed, "quantize_rows", quantize_rows):
        noise, between = distances("int8", 32)
    assert between > BOUND * noise
