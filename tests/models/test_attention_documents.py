"""A document gets the same bits alone, packed between others, and behind pads."""

import pytest
import torch

from headspring.models import kernels
from headspring.models.context import Context
from headspring.models.mask import Causal

pytestmark = pytest.mark.skipif(
    not kernels.use_products(torch.empty(0, dtype=torch.bfloat16), 32), reason="no native products here"
)  # torch's own kernel promises no bits
LENGTHS = (37, 1, 1, 100, 64, 3, 50)
HEADS, KV_HEADS, CHANNELS = 6, 2, 64


def projected(time):
    torch.manual_seed(0)
    shapes = ((1, heads, time, CHANNELS) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [torch.randn(shape).to(torch.bfloat16) for shape in shapes]


def alone(q, k, v, start, end, window):
    own = Context.of(end - start, 0, None, None, q.device).visibility(Causal(window=window))
    return kernels.causal_attention(*(x[:, :, start:end] for x in (q, k, v)), own.first, own.origin)


def same(q, k, v, visible, spans, window) -> bool:
    whole = kernels.causal_attention(q, k, v, visible.first, visible.origin)
    return all(torch.equal(whole[:, :, a:b], alone(q, k, v, a, b, window)) for a, b in spans)


@pytest.mark.parametrize("window", [None, 40])
def test_packed_documents_are_separate_ones(window):
    q, k, v = projected(sum(LENGTHS))
    segments = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    spans = [(end - length, end) for end, length in zip(ends, LENGTHS)]
    visible = Context.of(sum(LENGTHS), 0, segments, None, q.device).visibility(Causal(window=window))
    assert same(q, k, v, visible, spans, window)
    if window is None:  # with few keys the order of a sum hardly ever shows in bfloat16
        unaligned = type(visible)(None, True, visible.first)  # the planted bug: blocks are counted from the row's beginning
        assert not same(q, k, v, unaligned, spans, window)


@pytest.mark.parametrize("padding", [0, 1, 13, 32, 45])
def test_padded_rows_are_unpadded_ones(padding):
    q, k, v = projected(150)
    visible = Context.of(150, 0, None, torch.tensor([padding]), q.device).visibility(Causal())
    assert same(q, k, v, visible, [(padding, 150)], None)
    assert kernels.causal_attention(q, k, v, visible.first, visible.origin).isfinite().all()


def test_gradients_do_not_depend_on_where_blocks_begin():
    q, k, v = (x.requires_grad_() for x in projected(sum(LENGTHS)))
    segments = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    visible = Context.of(sum(LENGTHS), 0, segments, None, q.device).visibility(Causal())
    found = []
    for origin in (visible.origin, None):
        y = kernels.causal_attention(q, k, v, visible.first, origin)
        found.append(torch.autograd.grad(y.float().square().sum(), (q, k, v)))
    for ours, others in zip(*found):
        torch.testing.assert_close(ours.float(), others.float(), rtol=0.02, atol=0.02)
