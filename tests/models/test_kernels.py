"""The native operators are the plain ones, forward and backward."""

import pytest
import torch

from headspring.models import kernels, native
from headspring.models.position import RoPE

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: only the plain kernels exist")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def operators(time: int = 5, channels: int = 24):
    cos, sin = RoPE().angles(torch.arange(time)[None], channels)
    return {
        "rms_norm": (
            lambda x, w: kernels.rms_norm(x, w, 1e-6),
            lambda x, w: kernels.rms_norm_plain(x, w, 1e-6),
            lambda dtype: (torch.randn(2, time, 3, channels, dtype=dtype), torch.randn(channels)),
        ),
        "silu_multiply": (
            kernels.silu_multiply,
            kernels.silu_multiply_plain,
            lambda dtype: (8 * torch.randn(7, 33, dtype=dtype), torch.randn(7, 33, dtype=dtype)),
        ),
        "rotate": (
            lambda x: kernels.rotate(x, cos, sin),
            lambda x: kernels.rotate_plain(x, cos, sin),
            lambda dtype: (torch.randn(2, time, 3, channels, dtype=dtype),),
        ),
    }


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).abs().max() / b.abs().max())


def outputs_and_gradients(function, inputs) -> list[torch.Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(output.dtype))
    return [output, *(tensor.grad for tensor in inputs)]


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", operators())
def test_native_equals_plain(name, dtype):
    native_operator, plain_operator, make = operators()[name]
    torch.manual_seed(0)
    inputs = make(dtype)
    ours = outputs_and_gradients(native_operator, inputs)
    theirs = outputs_and_gradients(plain_operator, inputs)
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < TOLERANCE[dtype]


@needs_compiler
def test_the_comparison_sees_a_wrong_gradient():
    _, plain, make = operators()["silu_multiply"]
    inputs = make(torch.float32)
    right = outputs_and_gradients(plain, inputs)
    wrong = outputs_and_gradients(lambda gate, up: plain(gate, up.detach()) + 0 * up, inputs)
    assert relative_error(wrong[2], right[2]) > 0.1


@needs_compiler
def test_not_a_number_stays_visible():
    x = torch.ones(2, 8)
    x[1, 3] = float("nan")
    assert kernels.rms_norm(x, torch.ones(8), 1e-6)[1].isnan().all()
    assert kernels.silu_multiply(x, torch.ones(2, 8)).isnan().sum() == 1


@needs_compiler
def test_silu_is_exact_at_the_ends():
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    expected = kernels.silu_multiply_plain(gate, torch.ones(5))
    torch.testing.assert_close(kernels.silu_multiply(gate, torch.ones(5)), expected, atol=1e-30, rtol=1e-6)


def test_without_a_compiler_the_plain_kernels_run(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert kernels.numerics_id() == "plain"
    assert kernels.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist() == [[1.0] * 4]


def test_rotation_depends_on_distance_only():
    """q at m and k at n: the product is a function of m − n (arXiv 2104.09864, equation 11)."""
    cos, sin = RoPE(theta=100.0).angles(torch.arange(40)[None], 16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(m: int, n: int) -> torch.Tensor:
        place = lambda x, at: kernels.rotate(x, cos[:, at : at + 1], sin[:, at : at + 1])
        return (place(q, m) * place(k, n)).sum()

    torch.testing.assert_close(product(7, 3), product(37, 33), atol=1e-4, rtol=1e-4)
    assert abs(product(7, 3) - product(7, 5)) > 1e-3


@needs_compiler
@pytest.mark.parametrize("queries_at_once", [512, 16, 7])
def test_attention_has_the_gradients_of_the_plain_formula(monkeypatch, queries_at_once):
    from headspring.models.attend import attend_plain

    monkeypatch.setattr(kernels, "QUERIES_AT_ONCE", queries_at_once)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 40, 16, dtype=torch.bfloat16) for _ in range(3)]
    ours = outputs_and_gradients(kernels.causal_attention, inputs)
    exact = outputs_and_gradients(lambda q, k, v: attend_plain(q, k, v, None, True)[0], [x.float() for x in inputs])
    for a, b in zip(ours, exact):
        assert relative_error(a, b) < 2e-2
    unmasked = outputs_and_gradients(lambda q, k, v: attend_plain(q, k, v, None, False)[0], [x.float() for x in inputs])
    assert relative_error(ours[2], unmasked[2]) > 0.1  # the control


@needs_compiler
def test_attention_scores_the_same_with_and_without_gradients():
    q, k, v = (torch.randn(1, 2, 9, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        plain = kernels.causal_attention(q, k, v)
    assert torch.equal(kernels.causal_attention(q, k, v), plain)
