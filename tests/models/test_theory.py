"""Theorems of the textbooks about attention and positions, on our own modules; each beside a case where it does not hold."""

import pytest
import torch

from headspring.models import ALiBi, Attention, Causal, Full, NoPE, RoPE, Sinusoidal, T5Bias
from headspring.models.attend import pattern
from headspring.models.context import Context, Visibility

TIME, WIDTH = 11, 24


def attended(x: torch.Tensor, **settings) -> torch.Tensor:
    """x (B, T, D) through a randomised attention, in float64."""
    module, generator = Attention(heads=4, qk_norm=None, **settings).build(WIDTH).double(), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)
    context = Context.of(x.shape[1], 0, None, None, x.device)
    module.prepare(context)
    return module(x, context)


@pytest.mark.parametrize(
    ("settings", "equivariant"),
    [
        ({"position": NoPE(), "mask": Full()}, True),
        ({"position": NoPE(), "mask": Causal()}, False),
        ({"position": RoPE(), "mask": Full()}, False),
        ({"position": ALiBi(), "mask": Full()}, False),
        ({"position": T5Bias(buckets=8), "mask": Full()}, False),
    ],
    ids=["nothing", "mask", "rope", "alibi", "t5"],
)
@torch.no_grad()
def test_attention_without_order_is_permutation_equivariant(settings, equivariant):
    """attend(P x) = P attend(x) where there is neither a mask nor a position; with either it is not."""
    x = torch.randn(2, TIME, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(TIME, generator=torch.Generator().manual_seed(1))
    worst = float((attended(x[:, order], **settings) - attended(x, **settings)[:, order]).abs().max())
    assert worst < 1e-10 if equivariant else worst > 1e-3


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
@pytest.mark.parametrize("offset", [1, 7, 100])
def test_a_sinusoidal_offset_is_one_linear_map(layout, offset):
    """There is a matrix M_k with PE(p + k) = M_k PE(p) for every p: found on some positions, it holds on others. A random
    encoding of the same size has none."""
    positions, later = torch.arange(200), torch.arange(1000, 1400)
    # Frequencies apart from each other: with theta = 10,000 the slow pairs hardly turn, and M_k cannot be solved for.
    encode = Sinusoidal(theta=20.0, layout=layout).encode

    def error_of_map(table) -> float:
        found = torch.linalg.lstsq(table(positions), table(positions + offset)).solution
        return float((table(later) @ found - table(later + offset)).abs().max())

    random = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert error_of_map(lambda p: encode(p, WIDTH)) < 1e-10
    assert error_of_map(lambda p: random[p]) > 0.1


def test_the_map_of_an_offset_is_a_rotation_of_each_pair():
    """The matrix itself, at the theta of the paper: [[cos kθ, sin kθ], [−sin kθ, cos kθ]] on every (sin, cos) pair."""
    value, offset, positions = Sinusoidal(), 13, torch.arange(500)
    angle = offset * value.frequencies(WIDTH)
    rotations = torch.stack([torch.stack([angle.cos(), angle.sin()], -1), torch.stack([-angle.sin(), angle.cos()], -1)], -2)
    pairs = value.encode(positions, WIDTH).unflatten(-1, (-1, 2))
    turned = torch.einsum("iab,pib->pia", rotations, pairs).flatten(-2)
    assert torch.allclose(turned, value.encode(positions + offset, WIDTH), atol=1e-10)
    assert not torch.allclose(turned, value.encode(positions + offset + 1, WIDTH), atol=1e-2)


def test_rotary_products_depend_on_the_distance_alone():
    """⟨R_m q, R_n k⟩ = ⟨R_{m+s} q, R_{n+s} k⟩ for every shift s; rotating the query alone breaks it."""
    module, generator = RoPE().build(1, 16, causal=True), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator).expand(1, 90, 1, 16) for _ in "qk")
    context = Context.of(90, 0, None, None, q.device)
    module.prepare(context)
    rotated_q, rotated_k = module.place(q, context)[0, :, 0], module.place(k, context)[0, :, 0]
    for distance in (0, 3, 40):
        for other, constant in ((rotated_k, True), (k[0, :, 0], False)):
            products = (rotated_q[distance:] * other[: 90 - distance]).sum(-1)
            assert (float(products.std()) < 1e-5) == constant


@pytest.mark.parametrize("channels", [16, 64, 256, 1024])
def test_softmax_saturates_without_the_root(channels):
    """Products of unit-variance queries and keys have variance d, and 1 after division by √d (arXiv 1706.03762, footnote 4).

    Undivided, the softmax nears a one-hot vector and the trace of its Jacobian, Σ p (1 − p), falls as 1 / √d: no gradient
    is left for wide heads. Divided, neither depends on d.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, 4, 64, channels, generator=generator) for _ in "qk")
    assert float((q @ k.mT).var()) == pytest.approx(channels, rel=0.1)

    def largest_and_slope(scale: float) -> tuple[float, float]:
        made = pattern(q, k, Visibility(None, causal=False), scale=scale)
        return float(made.amax(-1).mean()), float((made * (1 - made)).sum(-1).mean())

    largest, slope = largest_and_slope(channels**-0.5)
    assert largest == pytest.approx(0.107, abs=0.005) and slope == pytest.approx(0.961, abs=0.005)
    largest, slope = largest_and_slope(1.0)
    assert largest > 1 - 1.8 * channels**-0.5 and slope * channels**0.5 == pytest.approx(2.3, abs=0.15)
