"""The trainer, the evaluator and a packed model multiply alike, bit for bit; a packed model is for serving only."""

from copy import deepcopy

import pytest
import torch

from headspring.artifacts.errors import UserError
from headspring.models import Attention, Block, Decoder, SwiGLU, kernels, repeat, save_model
from headspring.models.kernels import native, packed, packing
from headspring.models.scoring import cross_entropy_sum, log_probs

needs_products = pytest.mark.skipif(
    native.library() is None or not native.library().has_packed_products, reason="no native products with packed weights here"
)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_products
@pytest.mark.parametrize("sizes", [(768, 256), (70, 50), (96, 40)])
def test_trainer_and_engine_multiply_alike(sizes):
    outputs, inputs = sizes
    weights = [torch.nn.Parameter(numbers(outputs, inputs, seed=seed)) for seed in (1, 2)]
    bias = torch.nn.Parameter(numbers(2 * outputs))
    x = numbers(513, inputs, seed=3).bfloat16()
    trained = kernels.linear(x, weights, [bias])
    assert trained.requires_grad
    with torch.no_grad():
        evaluated = kernels.linear(x, weights, [bias])
        matrix = packed.pack_bf16(torch.cat(list(weights)))
        served = {rows: kernels.product(x[:rows], matrix, bias) for rows in (1, 7, 64, 513)}
    assert torch.equal(trained, evaluated)
    for rows, y in served.items():
        assert torch.equal(y, trained[:rows]), rows
        assert torch.equal(kernels.linear(x[:rows], weights, [bias]), trained[:rows]), rows


@needs_products
@pytest.mark.parametrize("inputs", [64, 50])
def test_gradients_are_those_of_the_definition(inputs):
    weights = [torch.nn.Parameter(numbers(outputs, inputs, seed=outputs)) for outputs in (64, 32)]
    x = numbers(3, 20, inputs, seed=3).bfloat16().requires_grad_()
    above = numbers(3, 20, 96, seed=4).bfloat16()
    grads = torch.autograd.grad(kernels.linear(x, weights), [x, *weights], above)
    wide = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, *weights)]
    expected = torch.autograd.grad(wide[0] @ torch.cat(wide[1:]).T, wide, above.double())
    for grad, other in zip(grads, expected):
        assert (grad.double() - other).norm() / other.norm() < 0.005
    assert grads[1].dtype == torch.float32


@needs_products
def test_frozen_weights_get_no_gradient():
    weight, x = numbers(64, 32), numbers(4, 32).bfloat16().requires_grad_()
    kernels.linear(x, [weight]).sum().backward()
    assert x.grad is not None and weight.grad is None


def build(**choices) -> torch.nn.Module:
    block = Block(
        mixer=Attention(heads=4, kv_heads=2, head_dim=32, bias=choices.pop("bias", False)), feedforward=SwiGLU(hidden=96)
    )
    model = Decoder(vocab=101, width=64, context=64, layers=repeat(2, block), **choices).build(seed=1)
    with torch.no_grad():  # matrices that start as nothing would hide half of the model
        for parameter in model.parameters():
            if parameter.dim() == 2 and not parameter.any():
                parameter.copy_(numbers(*parameter.shape, seed=parameter.numel()) * 0.1)
    model.compute_dtype = torch.bfloat16
    return model


TOKENS = torch.arange(40).reshape(2, 20) * 7 % 101


@needs_products
@pytest.mark.parametrize("choices", [{}, {"bias": True}, {"tied": False}], ids=str)
def test_a_packed_model_gives_the_same_bits(choices):
    model = build(**choices)
    trained = model(TOKENS)
    with torch.no_grad():
        logits, scores = model.logits(trained), log_probs(model, trained, TOKENS)
        packing.pack_model(model)
        assert model.layers[0].mixer.f.q.joined is not None, "q, k and v are one product"
        assert torch.equal(model(TOKENS), trained)
        assert torch.equal(model(TOKENS[:1, :3]), trained[:1, :3])
        assert torch.equal(model.logits(trained), logits) and torch.equal(log_probs(model, trained, TOKENS), scores)
        packing.unpack_model(model)
        assert model.layers[0].mixer.f.q.packed is None
        assert torch.equal(model(TOKENS), trained)


def test_int8_is_near():
    model = build()
    with torch.no_grad():
        before = model.logits(model(TOKENS))
        packing.pack_model(model, "int8")
        after = model.logits(model(TOKENS))
    assert not torch.equal(before, after)
    assert (before - after).norm() / before.norm() < 0.06


@needs_products
def test_the_evaluator_scores_as_the_trainer():
    model = build()
    hidden = model(TOKENS)
    loss = cross_entropy_sum(model, hidden, TOKENS)
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(model, hidden, TOKENS), loss.detach())
        packing.pack_model(model)
        assert torch.equal(cross_entropy_sum(model, hidden, TOKENS), loss.detach())


def test_a_packed_model_drops_its_matrices_where_it_learns():
    model = build()
    expected = model(TOKENS)
    packing.pack_model(model)
    assert torch.equal(model(TOKENS), expected)
    assert all(part.packed is None for part in packing.packable(model).values())
    cross_entropy_sum(model, model(TOKENS), TOKENS).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_quantized_model_is_not_trained():
    model = build()
    packing.pack_model(model, "int8")
    with pytest.raises(UserError, match="load it again"):
        model(TOKENS)
    with torch.no_grad():
        hidden = model(TOKENS)
    with pytest.raises(UserError, match="load it again"):
        cross_entropy_sum(model, hidden, TOKENS)


@needs_products
def test_weights_that_changed_are_packed_anew():
    model = build()
    packing.pack_for_serving(model)
    with torch.no_grad():
        before = model(TOKENS)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        packing.pack_for_serving(model)
        after = model(TOKENS)
        packing.unpack_model(model)
        assert torch.equal(model(TOKENS), after) and not torch.equal(before, after)


def test_released_weights_are_gone_and_the_model_says_so(tmp_path):
    model = build()
    with torch.no_grad():
        kept = model(TOKENS)
        packing.pack_model(model, release=True)
        weight = model.layers[0].feedforward.f.out.weight
        assert weight.shape == (64, 96) and weight.untyped_storage().nbytes() == 4
        assert (model(TOKENS) - kept).norm() / kept.norm() < 0.02
    assert model.num_parameters() == build().num_parameters()
    with pytest.raises(UserError, match="released"):
        save_model(model, tmp_path)
    with pytest.raises(UserError, match="released"):
        packing.unpack_model(model)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="bf16 or int8, not 'groups'"):
        packing.pack_model(build(), "groups")


def memories(model) -> set[int]:
    """The blocks of memory that products read."""
    parts = [part.joined or part.packed for part in packing.packable(model).values()]
    return {matrix.values.untyped_storage().data_ptr() for matrix in (*parts, model.packed_head)}


@needs_products
def test_matrices_lie_side_by_side_and_what_changed_is_packed_again(monkeypatch):
    model = build()
    monkeypatch.setattr(packing, "WORTHWHILE", 1)  # byte
    with torch.no_grad():
        before = model(TOKENS)
        packing.pack_for_serving(model)
        assert len(memories(model)) == 1
        assert torch.equal(model(TOKENS), before)
        held = model.packed_head
        packing.pack_for_serving(model)
        assert model.packed_head is held, "nothing has changed: nothing is moved"
        model.layers[1].mixer.f.k.weight.mul_(1.5)
        packing.pack_for_serving(model)
        packed_again, parts = model(TOKENS), model.layers[1].mixer.f
        assert len(memories(model)) == 1
        assert torch.equal(parts.q.joined.dequantized()[128:192], parts.k.weight.bfloat16().float())
        packing.unpack_model(model)
        assert torch.equal(model(TOKENS), packed_again)


def test_a_packed_model_is_copied(monkeypatch):
    model = build()
    monkeypatch.setattr(packing, "WORTHWHILE", 1)  # byte
    with torch.no_grad():
        packing.pack_model(model, "int8")
        before = model(TOKENS)
        copy = deepcopy(model)
        for part in packing.packable(model).values():
            part.packed.values.zero_()
        assert torch.equal(copy(TOKENS), before)
