"""The native operators are the plain ones, forward and backward."""

import pytest
import torch

from headspring.models import kernels
from headspring.models.kernels import native
from headspring.models.position import RoPE

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler: only the plain kernels exist")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def has_products() -> bool:
    found = native.library()
    return found is not None and found.has_products


needs_products = pytest.mark.skipif(not has_products(), reason="no bfloat16 products on this processor")


def every_unit(test):
    return needs_products(pytest.mark.parametrize("unit", ["native", "vector"], indirect=True)(test))


@pytest.fixture
def unit(request, monkeypatch):
    """Which instructions multiply: the processor's matrix unit where it has one, or its vectors."""
    monkeypatch.setenv("HEADSPRING_KERNELS", request.param)


def operators(time: int = 5, channels: int = 24):
    cos, sin = (table[0] for table in RoPE().angles(torch.arange(time)[None], channels))
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
        "silu_multiply_halves": (
            kernels.silu_multiply_halves,
            lambda both: kernels.silu_multiply_plain(*both.chunk(2, dim=-1)),
            lambda dtype: (8 * torch.randn(3, 7, 34, dtype=dtype),),
        ),
        "clamped_multiply_halves": (
            lambda both: kernels.clamped_multiply_halves(both, 1.7, 1.5),
            lambda both: kernels.clamped_multiply_plain(both, 1.7, 1.5),
            lambda dtype: (2 * torch.randn(3, 7, 34, dtype=dtype),),
        ),
        "add_rms_norm": (
            lambda x, y, w: joined(kernels.add_rms_norm(x, y, w, 1e-6)),
            lambda x, y, w: joined((x + y, kernels.rms_norm_plain(x + y, w, 1e-6))),
            lambda dtype: (torch.randn(2, 5, 40, dtype=dtype), torch.randn(2, 5, 40, dtype=dtype), torch.randn(40)),
        ),
        "add_rms_norm of one": (
            lambda x, w: joined(kernels.add_rms_norm(x, None, w, 1e-6)),
            lambda x, w: joined((x, kernels.rms_norm_plain(x, w, 1e-6))),
            lambda dtype: (torch.randn(2, 5, 40, dtype=dtype), torch.randn(40)),
        ),
        "place_heads": (
            lambda x, *gains: joined(kernels.place_heads(x, (4, 2), gains, (cos[None], sin[None]), 1e-6)),
            lambda x, *gains: joined(kernels.place_heads_plain(x, (4, 2), gains, (cos[None], sin[None]), 1e-6)),
            lambda dtype: (torch.randn(2, time, 8 * channels, dtype=dtype), torch.rand(channels), torch.rand(channels)),
        ),
        "place_heads as they are": (
            lambda x: joined(kernels.place_heads(x, (3, 3), None, None)),
            lambda x: joined(kernels.place_heads_plain(x, (3, 3), None, None, 0.0)),
            lambda dtype: (torch.randn(2, time, 9 * channels, dtype=dtype),),
        ),
        "linear": (
            lambda x, *w: kernels.linear(x, w),
            lambda x, *w: torch.nn.functional.linear(x, torch.cat(w).to(x.dtype)),
            lambda dtype: (torch.randn(3, 67, 64, dtype=dtype), torch.randn(32, 64), torch.randn(96, 64)),
        ),
        "rotate": (
            lambda x: kernels.rotate(x, cos[None], sin[None]),
            lambda x: kernels.rotate_plain(x, cos[None], sin[None]),
            lambda dtype: (torch.randn(2, time, 3, channels, dtype=dtype),),
        ),
    }


def joined(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Several outputs as one, so that each gets a gradient of its own."""
    return torch.cat([output.flatten() for output in outputs])


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
@every_unit
@pytest.mark.parametrize("rows", [1, 300])
def test_weight_gradients_keep_float32_sums(unit, rows):
    """Against a product in float64; the control is the same product rounded to bfloat16, as torch gives it."""
    torch.manual_seed(0)
    gradient, x = torch.randn(rows, 96).bfloat16(), torch.randn(rows, 160).bfloat16()
    exact = gradient.double().T @ x.double()
    ours = kernels.weight_gradient(gradient[:, 32:], x)
    assert relative_error(ours, exact[32:]) < 1e-6
    twice = kernels.weight_gradient(gradient[:, 32:], x, ours)
    assert twice is ours and relative_error(twice, 2 * exact[32:]) < 1e-6
    assert relative_error(gradient.T @ x, exact) > 1e-4 or rows == 1


@needs_compiler
def test_the_comparison_sees_a_wrong_gradient():
    _, plain, make = operators()["silu_multiply"]
    inputs = make(torch.float32)
    right = outputs_and_gradients(plain, inputs)
    wrong = outputs_and_gradients(lambda gate, up: plain(gate, up.detach()) + 0 * up, inputs)
    assert relative_error(wrong[2], right[2]) > 0.1


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("place", [3, 16])  # within sixteen numbers, and among those that are left
def test_not_a_number_stays_visible(dtype, place):
    x = torch.ones(2, 17, dtype=dtype)
    x[1, place] = float("nan")
    assert kernels.rms_norm(x, torch.ones(17), 1e-6)[1].isnan().all()
    assert kernels.silu_multiply(x, torch.ones_like(x)).isnan().sum() == 1
    assert kernels.built().cross_entropy(x.clone(), torch.zeros(2, dtype=torch.int64), 1.0).isnan().tolist() == [False, True]


@needs_compiler
@pytest.mark.parametrize("vocab", [5, 16, 100])
def test_losses_have_the_same_bits_in_both_precisions(vocab):
    """Of the same logits; against float64, and the control is another target's loss."""
    torch.manual_seed(0)
    logits, targets = (8 * torch.randn(7, vocab)).bfloat16(), torch.randint(vocab - 1, (7,))
    narrow, wide = (kernels.built().cross_entropy(x, targets, 1.0) for x in (logits.clone(), logits.float()))
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert torch.equal(narrow, wide)
    torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(kernels.built().cross_entropy(logits.clone(), targets + 1, 1.0), narrow)


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


ATTENTION_SHAPES = [  # batch, heads, key-value heads, time, channels
    (2, 3, 3, 40, 32),
    (2, 4, 2, 131, 64),
    (1, 4, 1, 200, 96),
    (2, 2, 2, 1, 64),
]


def attention_problem(batch: int, heads: int, kv_heads: int, time: int, channels: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, count, time, channels).bfloat16() for count in (heads, kv_heads, kv_heads)]


def document_starts(batch: int, time: int) -> torch.Tensor:
    """For every token where its document begins; several documents a row."""
    begins = torch.rand(batch, time, generator=torch.Generator().manual_seed(1)) < 0.04
    return torch.where(begins, torch.arange(time), 0).cummax(1).values


@needs_compiler
@every_unit
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_and_its_gradients_are_those_of_the_plain_formula(unit, shape, packed):
    inputs = attention_problem(*shape)
    first = document_starts(shape[0], shape[3]) if packed else None
    ours = outputs_and_gradients(lambda q, k, v: kernels.causal_attention(q, k, v, first), inputs)
    exact = [x.float() for x in inputs]
    theirs = outputs_and_gradients(lambda q, k, v: kernels.causal_attention_plain(q, k, v, first), exact)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=2e-2 * float(b.detach().abs().max()) + 1e-6)


@needs_products
def test_the_comparison_sees_another_mask():
    """The control: a document that begins one token later changes output and gradients by more than rounding does."""
    inputs = attention_problem(1, 2, 2, 70, 32)
    first = torch.zeros(1, 70, dtype=torch.int64)
    first[:, 40:] = 40
    later = first.clone()
    later[:, 40] = 0
    right = outputs_and_gradients(lambda q, k, v: kernels.causal_attention(q, k, v, first), inputs)
    wrong = outputs_and_gradients(lambda q, k, v: kernels.causal_attention(q, k, v, later), inputs)
    assert all(relative_error(a, b) > 5e-2 for a, b in zip(wrong, right))


@needs_products
def test_attention_is_the_same_with_and_without_gradients():
    q, k, v = (x.requires_grad_() for x in attention_problem(1, 2, 2, 9, 32))
    with torch.no_grad():
        plain = kernels.causal_attention(q, k, v)
    assert torch.equal(kernels.causal_attention(q, k, v), plain)


@needs_products
def test_attention_reads_views_of_one_product():
    """Queries, keys and values are slices of one tensor in the model; heads and time are swapped views."""
    mixed = torch.randn(2, 33, 3, 4, 32).bfloat16()
    q, k, v = (x.transpose(1, 2) for x in mixed.unbind(2))
    assert torch.equal(kernels.causal_attention(q, k, v), kernels.causal_attention(q.clone(), k.clone(), v.clone()))


@needs_products
def test_not_a_number_in_a_value_stays_visible():
    q, k, v = attention_problem(1, 1, 1, 40, 32)
    v[0, 0, 20, 3] = float("nan")
    y = kernels.causal_attention(q, k, v)
    assert y[0, 0, 20:, 3].isnan().all() and not y[0, 0, :, :3].isnan().any()
