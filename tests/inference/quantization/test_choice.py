"""Products are tested before they are trusted, and timed where there is a choice."""

import pytest
import torch

from headspring.inference.quantization import choice
from headspring.inference.quantization.installing import install
from headspring.inference.quantization.quantize import quantize
from headspring.inference.quantization.rounding import round_int4, round_int8
from headspring.inference.quantization.scheme import Quantization
from headspring.models import kernels
from headspring.models.kernels.packed import PackedMatrix, pack_bf16, pack_groups, pack_int8

from ..tiny import tiny_model


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(choice.native, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(kernels, "rejected_kinds", set())
    monkeypatch.setattr(choice, "SWEEP", 1 << 12)
    return tmp_path


def matrices() -> list[PackedMatrix]:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    eight, four = round_int8(weight), round_int4(weight, 32, True)
    small = pack_groups(four.values, four.scales, four.minimums, 4)
    return [pack_bf16(weight), pack_int8(eight.values, eight.scales[:, 0]), small]


def test_the_products_of_this_machine_pass():
    assert choice.check_products(matrices()) == {} and not kernels.rejected_kinds


def wrong(bug):
    """`kernels.product` with a bug in it."""
    right = kernels.product

    def product(x, packed, bias=None):
        y = right(x, packed, bias)
        if bug == "values":
            y[:, -1] += 0.5
        elif len(x) > 8:
            y[0, 0] *= 1.01
        return y

    return product


@pytest.mark.parametrize(("bug", "why"), [("values", "differ from their definition"), ("batch", "")])
def test_a_product_with_a_bug_is_rejected(monkeypatch, bug, why, own_cache):
    monkeypatch.setattr(kernels, "multiplies_natively", lambda x, kind="bf16": kind not in kernels.rejected_kinds)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "product", wrong(bug))
        with pytest.warns(UserWarning, match="slower plain ones are used"):
            failures = choice.check_products(matrices()[1:2])
    assert set(failures) == {"int8"} and why in failures["int8"]
    assert not kernels.multiplies_natively(torch.empty(0, dtype=torch.bfloat16), "int8")
    assert kernels.multiplies_natively(torch.empty(0, dtype=torch.bfloat16), "bf16")
    x = torch.randn(3, 96)
    assert torch.equal(kernels.product(x, matrices()[1]), choice.product_plain(x, matrices()[1]))


def test_an_engine_tests_its_bfloat16_products_too(monkeypatch):
    """A model that no quantizer has seen: its products are packed, and tested, where an engine takes it."""
    monkeypatch.setattr(kernels, "multiplies_natively", lambda x, kind="bf16": kind not in kernels.rejected_kinds)
    monkeypatch.setattr(kernels, "product", wrong("batch"))
    model = tiny_model(64)
    model.compute_dtype = torch.bfloat16
    with pytest.warns(UserWarning, match="other bits in another batch"):
        assert set(choice.prepare_for_serving(model)) == {"bf16"}
    assert kernels.rejected_kinds == {"bf16"}


def test_rows_that_depend_on_their_batch_are_seen(monkeypatch):
    """A bfloat16 product may round otherwise than its definition, but not otherwise in another batch."""
    monkeypatch.setattr(kernels, "product", wrong("batch"))
    assert choice.fault(matrices()[0]) == "give a row other bits in another batch"


def test_the_slower_one_is_not_chosen_and_the_verdict_is_kept(monkeypatch, own_cache):
    import time

    fast, slow = matrices()[1], matrices()[0]
    right = kernels.product

    def product(x, packed, bias=None):
        if packed is slow:
            time.sleep(0.01)
        return right(x, packed, bias)

    monkeypatch.setattr(kernels, "product", product)
    assert choice.fastest({"slow": [slow], "fast": [fast]}, [fast]) == "fast"
    assert (own_cache / choice.FILE).is_file()

    def never(x, packed, bias=None):
        raise AssertionError("measured again")

    monkeypatch.setattr(kernels, "product", never)
    assert choice.fastest({"slow": [slow], "fast": [fast]}, [fast]) == "fast"
    with pytest.raises(AssertionError, match="measured again"):
        choice.fastest({"slow": [slow], "fast": [fast]}, [slow])  # of another form


def test_a_damaged_or_read_only_cache_does_no_harm(own_cache):
    (own_cache / choice.FILE).write_text("{")
    assert choice.remembered("x", [1], lambda: 7) == 7 and choice.remembered("x", [1], lambda: 8) == 7
    (own_cache / choice.FILE).write_text("[]")
    assert choice.remembered("x", [1], lambda: 9) == 9


def test_the_matrices_of_a_model_are_all_there_once():
    model = tiny_model(300)
    install(model, quantize(model, Quantization()))
    shapes = [matrix.shape for matrix in choice.matrices_of(model)]
    inside = 2 * 32 * 32 + 3 * 32 * 64  # of a layer; its keys and values have 16 outputs, and stay
    assert sum(outputs * inputs for outputs, inputs in shapes) == 300 * 32 + 2 * inside
