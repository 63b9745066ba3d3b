"""Rounding and GPTQ of single matrices."""

import pytest
import torch

from headspring.inference.quantization.gptq import gptq_int4
from headspring.inference.quantization.rounding import best_grid, round_int4, round_int8


def weights(seed: int = 0, outputs: int = 24, inputs: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)


def loss(matrix, weight: torch.Tensor, hessian: torch.Tensor | None = None) -> float:
    error = matrix.dequantized() - weight
    return float((error if hessian is None else error @ hessian).mul(error).sum())


def inputs(seed: int = 1, count: int = 400, width: int = 64) -> torch.Tensor:
    """Correlated, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 24, generator=generator) @ torch.randn(24, width, generator=generator)


def test_int8_is_within_half_a_step():
    weight = weights()
    matrix = round_int8(weight)
    assert matrix.by_channel and matrix.values.abs().amax(1).eq(127).all()
    assert ((matrix.dequantized() - weight).abs() <= matrix.scales * 0.5001).all()


def test_int8_in_groups_keeps_small_weights_beside_large_ones():
    weight = weights()
    weight[:, 0] *= 50
    by_group, by_output = round_int8(weight, 16), round_int8(weight)
    assert (by_group.group, by_group.by_channel) == (16, False)
    assert torch.equal(by_group.scales, by_group.scales.half().float())
    errors = [(matrix.dequantized() - weight)[:, 16:].square().sum() for matrix in (by_group, by_output)]
    assert errors[0] < 0.01 * errors[1]
    steps = by_group.scales.repeat_interleave(16, dim=1)
    assert ((by_group.dequantized() - weight).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_no_scale_of_a_fine_grid_is_much_better(group, minimum):
    """The search against a dense one over scales that also moves the minimum."""
    weight = weights()
    matrix = round_int4(weight, group, minimum)
    assert (matrix.group, matrix.bits, matrix.minimums is None) == (group, 4, not minimum)
    rows = weight.reshape(-1, group)
    low, high = (0, 15) if minimum else (-8, 7)
    best = torch.full((len(rows),), torch.inf)
    reach = rows.amax(1, True) - rows.amin(1, True) if minimum else 2 * rows.abs().amax(1, True)
    for shrink in torch.linspace(0.5, 1.1, 31):
        for side in torch.linspace(0, 1, 9) if minimum else [0.0]:
            scale = reach * shrink / 15
            offset = rows.amin(1, True) + reach * (1 - shrink) * side if minimum else torch.zeros(1)
            for sign in (1,) if minimum else (1, -1):
                values = ((rows - offset) / (sign * scale)).round().clamp(low, high)
                best = torch.minimum(best, (values * sign * scale + offset - rows).square().sum(1))
    assert loss(matrix, weight) < (1.12 if minimum else 1.05) * best.sum()
    assert loss(matrix, weight) < 0.9 * loss(_largest_weight_first(weight, group), weight)


def _largest_weight_first(weight, group):
    """Plain rounding: the largest weight of a group sets its scale."""
    rows = weight.reshape(-1, group)
    scale = rows.abs().amax(1, True) / 7
    return type("Plain", (), {"dequantized": lambda self: ((rows / scale).round().clamp(-8, 7) * scale).view(weight.shape)})()


def test_scales_are_what_float16_can_say():
    matrix = round_int4(weights(), 32, True)
    for stored in (matrix.scales, matrix.minimums):
        assert torch.equal(stored, stored.half().float())


@pytest.mark.parametrize("method", [lambda w: round_int8(w), lambda w: round_int4(w, 32), lambda w: round_int4(w, 32, True)])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30])
def test_groups_of_one_number(method, value):
    """Nothing is divided by zero, and a constant is nearly kept."""
    weight = torch.full((4, 64), value)
    assert (method(weight).dequantized() - weight).abs().max() <= 0.02 * abs(value) + 1e-12


def test_importance_decides_which_weights_are_kept():
    rows = weights(outputs=8, inputs=32)
    importance = torch.cat([torch.full((4,), 100.0), torch.ones(28)])
    with_it, without = (best_grid(rows, False, chosen) for chosen in (importance, None))
    errors = [(grid.meaning(grid.nearest(rows)) - rows).square() for grid in (with_it, without)]
    assert (errors[0] * importance).sum() < (errors[1] * importance).sum()
    assert errors[0].sum() > errors[1].sum()


@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("group", [16, 64])
def test_gptq_keeps_the_outputs_better_than_rounding(group, minimum):
    weight, x = weights(), inputs()
    hessian = x.T @ x
    rounded, corrected = round_int4(weight, group, minimum), gptq_int4(weight, hessian, group, minimum)
    assert loss(corrected, weight, hessian) < 0.6 * loss(rounded, weight, hessian)
    assert loss(corrected, weight) > loss(rounded, weight)


def test_gptq_is_the_formula_of_the_paper():
    """One input after the other with the inverse of what is left of H, as equation 2 has it, on the same grids."""
    weight, x = weights(inputs=32), inputs(width=32)
    hessian = x.T @ x
    matrix = gptq_int4(weight, hessian, 32)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)).double()
    left, expected = weight.double().clone(), torch.empty(weight.shape)
    for i in range(32):
        scale = matrix.scales.double()
        values = (left[:, i : i + 1] / scale).round().clamp(-8, 7)
        expected[:, i] = values[:, 0]
        inverse = torch.linalg.inv(damped[i:, i:])
        error = left[:, i] - (values * scale)[:, 0]
        left[:, i:] -= torch.outer(error, inverse[0] / inverse[0, 0])
    assert (matrix.values != expected).float().mean() < 0.01  # ties may fall to the other side in float32


def test_gptq_without_any_text_is_rounding():
    weight = weights()
    assert torch.equal(gptq_int4(weight, torch.zeros(64, 64), 32).values, round_int4(weight, 32).values)
