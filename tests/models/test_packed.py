"""Packed matrices: what goes in comes out, products equal their definition, and a row never depends on its company."""

import pytest
import torch

from headspring.artifacts.errors import UserError
from headspring.models import kernels
from headspring.models.kernels import native, packed
from headspring.models.kernels.packed import PackedMatrix

needs_products = pytest.mark.skipif(
    native.library() is None or not native.library().has_packed_products, reason="no native products with packed weights here"
)
SHAPES = ((32, 64), (70, 256), (33, 192))  # outputs, inputs


def integers(low: int, high: int, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grouped(shape: tuple[int, int], group: int, bits: int, *, minimum: bool) -> tuple:
    """Values, scales and minimums such as `pack_groups` takes."""
    low, high = ((0, 15) if minimum else (-8, 7)) if bits == 4 else (-127, 127)
    scales = numbers(shape[0], shape[1] // group).abs() * 0.02
    return integers(low, high, shape), scales, numbers(*scales.shape, seed=2) * 0.1 if minimum else None


def every_kind(shape: tuple[int, int]) -> dict[str, PackedMatrix]:
    made = {"bf16": packed.pack_bf16(numbers(*shape)), "int8": packed.round_to_int8(numbers(*shape))}
    for group in packed.GROUP_SIZES:
        for bits in (4, 8):
            for minimum in (False, True) if shape[1] % group == 0 else ():
                values, scales, minimums = grouped(shape, group, bits, minimum=minimum)
                made[f"{bits} bits by {group}, minimum {minimum}"] = packed.pack_groups(values, scales, minimums, bits)
    return made


HAS_PRODUCTS = native.library() is not None and native.library().has_packed_products


@pytest.fixture(params=["native", "vector", "plain"] if HAS_PRODUCTS else ["plain"])
def kernel_set(request, monkeypatch):
    monkeypatch.setenv("HEADSPRING_KERNELS", request.param)
    return request.param


# ---- the layout


@pytest.mark.parametrize("shape", [*SHAPES, (5, 48), (31, 16)])
def test_what_is_packed_comes_out_again(shape, kernel_set):
    weight = numbers(*shape)
    assert torch.equal(packed.pack_bf16(weight).dequantized(), weight.bfloat16().float())
    whole, scales = integers(-127, 127, shape), numbers(shape[0]).abs()
    assert torch.equal(packed.pack_int8(whole, scales).dequantized(), whole.float() * scales[:, None])
    for group in (size for size in packed.GROUP_SIZES if shape[1] % size == 0):
        for bits in (4, 8):
            for minimum in (False, True):
                values, scales, minimums = grouped(shape, group, bits, minimum=minimum)
                wide = values.float().unflatten(1, (-1, group)) * scales[..., None]
                wide = wide if minimums is None else wide + minimums[..., None]
                matrix = packed.pack_groups(values, scales, minimums, bits)
                assert torch.equal(matrix.dequantized(), wide.flatten(1))
                found = matrix.unpacked
                assert torch.equal(found[0], values) and torch.equal(found[1], scales)
                assert found[2] is None if minimums is None else torch.equal(found[2], minimums)


def test_four_bits_take_half_a_byte():
    values, scales, _ = grouped((64, 128), 32, 4, minimum=False)
    assert packed.pack_groups(values, scales).bytes == 64 * 128 // 2 + scales.nbytes
    assert packed.pack_bf16(numbers(64, 128)).bytes == 64 * 128 * 2


@pytest.mark.parametrize("sizes", [(32, 64), (33, 7, 40)])
def test_matrices_are_joined_in_order(sizes):
    parts = [every_kind((size, 128)) for size in sizes]
    for kind in parts[0]:
        matrices = [part[kind] for part in parts]
        joined = packed.join(matrices)
        assert torch.equal(joined.dequantized(), torch.cat([matrix.dequantized() for matrix in matrices])), kind


def test_a_part_of_a_joined_matrix_is_the_same_memory():
    for kind, whole in every_kind((96, 128)).items():
        part = whole.part(32, 96)
        assert torch.equal(part.dequantized(), whole.dequantized()[32:]), kind
        assert part.values.untyped_storage().data_ptr() == whole.values.untyped_storage().data_ptr()


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match="-8 … 7 or 0 … 15, not -8 … 9"):
        packed.pack_groups(torch.tensor([[-8, 9] * 16], dtype=torch.int8), torch.ones(1, 1))
    with pytest.raises(UserError, match="groups of 48 inputs"):
        packed.pack_groups(integers(0, 3, (4, 96)), torch.ones(4, 2))
    with pytest.raises(UserError, match="int8"):
        packed.pack_int8(torch.ones(4, 4), torch.ones(4))
    with pytest.raises(UserError, match="cannot be joined"):
        packed.join([packed.pack_bf16(numbers(4, 32)), packed.round_to_int8(numbers(4, 32))])


# ---- products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_integer_products_equal_their_definition_bit_for_bit(shape, dtype, kernel_set):
    x = numbers(37, shape[1], seed=3).to(dtype)
    for kind, matrix in every_kind(shape).items():
        y, defined = kernels.product(x, matrix), packed.product_plain(x, matrix)
        assert torch.equal(y, defined) or kind == "bf16", kind
        wide = x.double() @ matrix.dequantized().double().T
        error = ((y.double() - wide).norm() / wide.norm()).item()
        assert error < (0.004 if kind == "bf16" else 0.012), (kind, error)


def row_by_row(multiply, x: torch.Tensor) -> bool:
    """Whether rows come out the same alone, in company of any size, and elsewhere in the batch."""
    whole = multiply(x)
    pieces = all(torch.equal(multiply(x[:count]), whole[:count]) for count in (1, 2, 3, 5, 7, 16, 17, 33, 64))
    return pieces and torch.equal(multiply(x[40:41]), whole[40:41]) and torch.equal(multiply(x.flip(0)).flip(0), whole)


@needs_products
@pytest.mark.parametrize("shape", [(70, 128), (96, 576), (33, 50)])
@pytest.mark.parametrize("set_name", ["native", "vector"])
def test_a_row_does_not_depend_on_its_company(shape, set_name, monkeypatch):
    monkeypatch.setenv("HEADSPRING_KERNELS", set_name)
    x = numbers(130, shape[1], seed=4).bfloat16()
    for kind, matrix in every_kind(shape).items():
        assert row_by_row(lambda rows, matrix=matrix: kernels.product(rows, matrix), x), kind


def test_the_check_on_company_sees_another_order_of_sums():
    weight = numbers(64, 512)

    def split(x: torch.Tensor) -> torch.Tensor:
        """Few rows in two halves, as a library would do that shares the inputs out to threads."""
        w = weight.double()
        halves = x.double()[:, :256] @ w[:, :256].T, x.double()[:, 256:] @ w[:, 256:].T
        return halves[0].float() + halves[1].float() if len(x) < 8 else (halves[0] + halves[1]).float()

    assert not row_by_row(split, numbers(130, 512, seed=4))


@needs_products
@pytest.mark.parametrize("rows", [1, 7, 64, 513])
def test_threads_change_nothing(rows):
    threads = torch.get_num_threads()
    x = numbers(rows, 576, seed=5).bfloat16()
    try:
        for kind, matrix in every_kind((160, 576)).items():
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(kernels.product(x, matrix))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), kind
    finally:
        torch.set_num_threads(threads)


def test_a_bias_is_added_after_the_rounding(kernel_set):
    x, bias = numbers(9, 128, seed=6).bfloat16(), numbers(70, seed=7)
    for matrix in every_kind((70, 128)).values():
        assert torch.equal(kernels.product(x, matrix, bias), kernels.product(x, matrix) + bias.bfloat16())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_stays_alone(poison, kernel_set):
    x = numbers(40, 128, seed=8).bfloat16()
    sick = x.clone()
    sick[3, 17] = poison
    for kind, matrix in every_kind((70, 128)).items():
        well, found = kernels.product(x, matrix), kernels.product(sick, matrix)
        keep = torch.arange(40) != 3
        assert torch.equal(well[keep], found[keep]), kind
        assert poison == float("inf") or found[3].isnan().all(), kind


def test_rows_of_zeros_and_no_rows_at_all(kernel_set):
    for kind, matrix in every_kind((70, 128)).items():
        assert torch.equal(kernels.product(torch.zeros(3, 128).bfloat16(), matrix), torch.zeros(3, 70).bfloat16()), kind
        assert kernels.product(torch.zeros(0, 128).bfloat16(), matrix).shape == (0, 70)


def test_rows_may_lie_apart(kernel_set):
    x = numbers(20, 256, seed=9).bfloat16()
    for kind, matrix in every_kind((70, 128)).items():
        assert torch.equal(kernels.product(x[:, 64:192], matrix), kernels.product(x[:, 64:192].contiguous(), matrix)), kind


def test_a_product_refuses_gradients():
    with pytest.raises(UserError, match="no gradients"):
        kernels.product(torch.ones(1, 32, requires_grad=True), packed.pack_bf16(numbers(4, 32)))
