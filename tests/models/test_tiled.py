"""Attention by tiles is attention, forward and backward, and keeps no pattern."""

from unittest.mock import patch

import pytest
import torch

from headspring.models import tiled
from headspring.models.attend import pattern
from headspring.models.context import Visibility


def inputs(time: int = 37, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, time, c, dtype=dtype, generator=generator).mul(3).requires_grad_() for c in (8, 8, 5)]


def plain(q, k, v, causal: bool, scale: float | None):
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v


def both(causal=True, scale=None, tile=8, time=37):
    q, k, v = inputs(time)
    weight = torch.randn(2, 3, time, 5, dtype=torch.float64)
    results = []
    for y in (tiled.tiled_attention(q, k, v, causal=causal, scale=scale, tile=tile), plain(q, k, v, causal, scale)):
        results.append([y, *torch.autograd.grad((y * weight).sum(), [q, k, v])])
    return zip(*results, strict=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tile", [1, 8, 64])
def test_tiled_is_plain(causal, tile):
    for found, expected in both(causal, tile=tile, scale=0.9 if tile == 8 else None):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_tiled_is_the_pattern_of_the_house():
    q, k, v = inputs(dtype=torch.float32)
    expected = pattern(q, k, Visibility(None, causal=True)) @ v
    torch.testing.assert_close(tiled.tiled_attention(q, k, v, tile=8), expected, rtol=1e-5, atol=1e-5)


def test_gradients_by_differences():
    q, k, v = (x.detach()[:1, :1, :5].requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda q, k, v: tiled.tiled_attention(q, k, v, tile=2), (q, k, v))


def test_large_scores_do_not_overflow():
    q, k, v = inputs(dtype=torch.float32)
    assert tiled.tiled_attention(1000 * q, k, v, tile=8).isfinite().all()


def test_a_tile_that_is_not_masked_is_noticed():
    def unmasked(q, k, rows, columns, causal, scale):
        return original(q, k, rows, columns, False, scale)

    original = tiled._scores
    with patch.object(tiled, "_scores", unmasked), pytest.raises(AssertionError):
        for found, expected in both():
            torch.testing.assert_close(found, expected)


def test_nothing_square_is_kept():
    kept = []
    q, k, v = inputs(time=256, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        tiled.tiled_attention(q, k, v, tile=32)
    assert sum(kept) == 2 * 3 * 256 * (8 + 8 + 5 + 5 + 1)
