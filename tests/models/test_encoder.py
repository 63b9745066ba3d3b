"""What an encoder refuses, its types of tokens, its parts' cost; the contract matrix has the identities."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headspring.artifacts import UserError
from headspring.models import Attention, Block, Decoder, Encoder, Full, Head, SwiGLU, repeat
from headspring.models.families import FAMILIES
from headspring.models.transform import Transform
from tests.models.conftest import randomise

BOTH_WAYS = Block(mixer=Attention(heads=4, mask=Full()), feedforward=SwiGLU(hidden=40))
ENCODERS = [name for name, tiny in FAMILIES.items() if isinstance(tiny(), Encoder)]


def encoder(**changes) -> Encoder:
    return Encoder(**{"vocab": 53, "width": 24, "layers": repeat(2, BOTH_WAYS), "context": 48, **changes})


def test_what_makes_no_encoder_is_refused():
    with pytest.raises(ValueError, match="layers.1: 'attention' reads from left to right"):
        encoder(layers=(BOTH_WAYS, Block(mixer=Attention(heads=4), feedforward=SwiGLU(hidden=40))))
    with pytest.raises(ValueError, match="no output matrix to untie"):
        encoder(head=None, tied=False)


def test_causal_follows_from_the_masks():
    assert not encoder().causal
    assert Decoder(vocab=53, width=24, layers=(Block(mixer=Attention(heads=4)),)).causal
    assert not Decoder(vocab=53, width=24, layers=(BOTH_WAYS,)).causal


def test_without_a_head_it_predicts_nothing():
    model = encoder(head=None).build()
    hidden = model(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(UserError, match="predicts no tokens"):
        model.logits(hidden)
    assert not [part for part in model.ledger().children if part.name == "head"]
    with pytest.raises(UserError, match="has no pooler"):
        model.pooled(hidden[:, 0])


@torch.no_grad()
def test_types_of_tokens():
    """Left out, all are of type 0; a model without types, and a state, refuse them."""
    model = randomise(FAMILIES["bert"]().build())
    tokens, types = torch.randint(0, 53, (2, 9)), torch.zeros(2, 9, dtype=torch.int64)
    assert torch.equal(model(tokens), model(tokens, types=types))
    types[:, 5:] = 1
    assert not torch.allclose(model(tokens), model(tokens, types=types))
    with pytest.raises(ValueError, match="knows no types"):
        encoder().build()(tokens, types=types)
    decoder = Decoder(vocab=53, width=24, layers=(Block(mixer=Attention(heads=4)),)).build()
    with pytest.raises(ValueError, match="types cannot be used with a state"):
        decoder(tokens, state=decoder.new_state(2, 9), types=types)


@torch.no_grad()
def test_the_head_is_transform_then_matrix_then_bias():
    model = randomise(encoder(head=Head(bias=True, transform=Transform(activation="gelu_tanh"))).build())
    hidden = torch.randn(2, 5, 24)
    part = model.transform
    y = torch.nn.functional.gelu(hidden @ part.dense.weight.T + part.dense.bias, approximate="tanh")
    y = torch.nn.functional.layer_norm(y, (24,), part.norm.weight, part.norm.bias)
    torch.testing.assert_close(model.logits(hidden), y @ model.embed.weight.T + model.head.bias)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_the_ledger_is_what_runs(name):
    """Parameters exactly; the FLOPs of all matrix products, those of attention counted here, which torch counts as 0."""
    model, time = FAMILIES[name]().build(), 16
    cost = model.ledger(time)
    assert cost.parameters == model.num_parameters() and cost.state_bytes == 0
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(1, time, dtype=torch.int64)))
    products = {"q", "k", "v", "out", "gate", "up", "dense", "head"}
    assert sum(leaf.flops for leaf in leaves(cost) if leaf.name in products) * time == products_alone(counter)
    patterns = [leaf for leaf in leaves(cost) if leaf.name == "pattern"]
    for block, pattern in zip(model.layers, patterns, strict=True):
        mixer = block.mixer.f
        distance = (torch.arange(time)[:, None] - torch.arange(time)).abs()
        window = mixer.value.mask.window
        seen = int((distance <= (time if window is None else window)).sum())
        assert pattern.flops * time == 4 * mixer.heads * mixer.channels * seen


def leaves(cost):
    return [cost] if not cost.children else [leaf for child in cost.children for leaf in leaves(child)]


def products_alone(counter) -> int:
    """What was counted, without attention's own operators, should this version of torch count them."""
    total = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in total.items() if "attention" not in str(operator) and "bmm" not in str(operator))
