"""Scans and chunks against the recurrences token by token, values and gradients, in float64."""

import pytest
import torch

from headspring.models import chunked, scan
from headspring.models.chunked import decayed, delta
from headspring.models.scan import BLOCK, linear_scan, selective_scan
from tests.models import recurrences

TIMES = (1, 5, BLOCK, 2 * BLOCK + 7)
ROWS, GROUPS, HEADS, N, P, E = 2, 2, 6, 4, 5, 7


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def boundaries(time: int, kind: str):
    """None; here and there; or at every token, as in padding."""
    torch.manual_seed(time)
    return {"none": None, "some": torch.rand(ROWS, time) < 0.1, "all": torch.ones(ROWS, time, dtype=torch.bool)}[kind]


def same(fast, slow, tensors, tolerance=1e-10):
    """Outputs and gradients of two functions of the same tensors; every output gets a gradient."""
    results = []
    for function in (fast, slow):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        loss = sum((output * torch.randn(output.shape)).sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, leaves)))
    for found, expected in zip(*results):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def selective_inputs(time: int):
    return [draw(ROWS, time, E), draw(ROWS, time, E).abs(), -draw(E, N).abs(), draw(ROWS, time, N), draw(ROWS, time, N),
            draw(ROWS, E, N)]  # fmt: skip


def matrix_inputs(time: int, groups: int):
    keys = torch.nn.functional.normalize(draw(ROWS, time, groups, N), dim=-1)
    return [
        draw(ROWS, time, groups, N),
        keys,
        draw(ROWS, time, HEADS, P),
        -draw(ROWS, time, HEADS).abs(),
        draw(ROWS, HEADS, N, P),
    ]


@pytest.mark.parametrize("time", TIMES)
def test_linear_scan(time):
    decay = torch.rand(ROWS, time, E, dtype=torch.float64)
    decay[:, time // 2] = 0
    same(linear_scan, recurrences.linear, [decay, draw(ROWS, time, E), draw(ROWS, E)])
    shared = torch.rand(ROWS, time, 1, 1, dtype=torch.float64)
    same(linear_scan, recurrences.linear, [shared, draw(ROWS, time, N, P), draw(ROWS, N, P)])


@pytest.mark.parametrize("kind", ["none", "some", "all"])
@pytest.mark.parametrize("time", TIMES)
def test_selective_scan(time, kind):
    starts = boundaries(time, kind)
    same(
        lambda *inputs: selective_scan(*inputs, starts),
        lambda *inputs: recurrences.selective(*inputs, starts),
        selective_inputs(time),
    )


@pytest.mark.parametrize("kind", ["none", "some", "all"])
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_decayed(time, kind, chunk):
    starts = boundaries(time, kind)
    same(
        lambda *inputs: decayed(*inputs, starts, chunk),
        lambda *inputs: recurrences.matrix(*inputs, starts),
        matrix_inputs(time, GROUPS),
    )
    q, k, v, _, initial = matrix_inputs(time, HEADS)
    same(
        lambda q, k, v, initial: decayed(q, k, v, None, initial, starts, chunk),
        lambda q, k, v, initial: recurrences.matrix(q, k, v, None, initial, starts),
        [q, k, v, initial],
    )


@pytest.mark.parametrize("kind", ["none", "some", "all"])
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_delta(time, kind, chunk):
    starts, beta = boundaries(time, kind), torch.rand(ROWS, time, HEADS, dtype=torch.float64)
    same(
        lambda *inputs: delta(*inputs[:4], inputs[5], inputs[4], starts, chunk),
        lambda *inputs: recurrences.matrix(*inputs[:5], starts, inputs[5]),
        [*matrix_inputs(time, HEADS), beta],
    )


def late(function):
    """The decay of the token before: the most common mistake in a scan."""
    return lambda decay, *rest: function(decay.roll(1, dims=1), *rest)


def test_the_comparison_sees_a_decay_that_is_one_token_late(monkeypatch):
    inputs = [torch.rand(ROWS, 9, E, dtype=torch.float64), draw(ROWS, 9, E), draw(ROWS, E)]
    with pytest.raises(AssertionError):
        same(late(linear_scan), recurrences.linear, inputs)
    original = scan._states
    monkeypatch.setattr(scan, "_states", lambda x, step, *rest: original(x, step.roll(1, dims=1), *rest))
    with pytest.raises(AssertionError):
        same(selective_scan, recurrences.selective, selective_inputs(9))


@pytest.mark.parametrize("part", ["pairs", "from_start", "to_end", "whole"])
def test_the_comparison_sees_a_wrong_decay_in_chunks(part, monkeypatch):
    original = chunked.Chunks.of

    def wrong(*arguments):
        parts = original(*arguments)
        object.__setattr__(parts, part, getattr(parts, part) * 1.001)
        return parts

    monkeypatch.setattr(chunked.Chunks, "of", staticmethod(wrong))
    inputs, beta = matrix_inputs(40, HEADS), torch.rand(ROWS, 40, HEADS, dtype=torch.float64)
    with pytest.raises(AssertionError):
        same(lambda *i: decayed(*i, None, 16), recurrences.matrix, inputs)
    with pytest.raises(AssertionError):
        same(
            lambda *i: delta(*i[:4], i[5], i[4], None, 16),
            lambda *i: recurrences.matrix(*i[:5], None, i[5]),
            [*inputs, beta],
        )


def test_decays_too_small_for_a_number_are_no_trouble():
    """exp(−200) is 0 in float32, and a quotient of two such numbers is not a number."""
    q, k, v, _, initial = (tensor.float() for tensor in matrix_inputs(50, HEADS))
    log_decay = torch.full((ROWS, 50, HEADS), -200.0, requires_grad=True)
    y, memory = decayed(q, k, v, log_decay, initial)
    expected, _ = recurrences.matrix(q, k, v, log_decay, initial)
    torch.testing.assert_close(y, expected)
    (gradient,) = torch.autograd.grad(y.sum() + memory.sum(), log_decay)
    assert gradient.isfinite().all()


def test_scans_compile_into_one_graph():
    def whole(*inputs):
        y, h = selective_scan(*inputs)
        return linear_scan(torch.sigmoid(y), y, h[..., 0])

    inputs = [tensor.float() for tensor in selective_inputs(40)]
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    leaves = [tensor.clone().requires_grad_() for tensor in inputs], [tensor.clone().requires_grad_() for tensor in inputs]
    (compiled(*leaves[0]).sum()).backward()
    (whole(*leaves[1]).sum()).backward()
    for ours, plain in zip(*leaves):
        torch.testing.assert_close(ours.grad, plain.grad)


def test_the_operators_keep_the_promises_of_custom_operators():
    inputs = selective_inputs(9)
    torch.library.opcheck(torch.ops.headspring.selective_scan, (*(x.requires_grad_() for x in inputs), boundaries(9, "some")))
    scanned = [torch.rand(ROWS, 9, E), torch.randn(ROWS, 9, E), torch.randn(ROWS, E)]
    torch.library.opcheck(torch.ops.headspring.linear_scan, tuple(x.requires_grad_() for x in scanned))


def selections(y: torch.Tensor) -> int:
    """Nodes of a graph whose gradient is as large as what they select from."""
    seen, open_ = set(), [y.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_ += [parent for parent, _ in node.next_functions]
    return sum(node.name() == "SelectBackward0" for node in seen)


def test_the_gradient_of_many_chunks_is_not_quadratic():
    """A chunk taken by its number would cost the gradient of all chunks, for every chunk."""
    found = []
    for chunks in (2, 6):
        k = torch.nn.functional.normalize(torch.randn(1, 4 * chunks, 2, 3, requires_grad=True), dim=-1)
        gate = torch.rand(1, 4 * chunks, 2, requires_grad=True)
        y, _ = delta(k, k, k, -gate, gate, torch.zeros(1, 2, 3, 3), chunk=4)
        found.append(selections(y))
    assert found[0] == found[1] < 6
    assert selections(torch.stack([k[:, i] for i in range(6)])) == 6
