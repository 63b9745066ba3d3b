"""Recurrent mixers: equal to torch's modules, fused or readable; gradients that vanish and explode; editable gates."""

import pytest
import torch

from headspring.models.block import Block, Branch
from headspring.models.context import Context
from headspring.models.decoder import Decoder
from headspring.models.recurrent import GRU, LSTM, RNN
from tests.models.conftest import randomise

KINDS = {"rnn": (RNN, torch.nn.RNN), "lstm": (LSTM, torch.nn.LSTM), "gru": (GRU, torch.nn.GRU)}


def context(time: int, segments=None, padding=None) -> Context:
    return Context.of(time, 0, segments, padding, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchs_module(kind):
    ours, theirs = KINDS[kind][0](hidden=7).build(5), KINDS[kind][1](5, 7, batch_first=True)
    ours.out = torch.nn.Identity()
    randomise(ours)
    names = {
        "weight_ih_l0": "input.weight",
        "weight_hh_l0": "memory.weight",
        "bias_ih_l0": "input.bias",
        "bias_hh_l0": "memory.bias",
    }
    theirs.load_state_dict({name: ours.state_dict()[own] for name, own in names.items()})
    x = torch.randn(3, 11, 5)
    torch.testing.assert_close(ours(x, context(11)), theirs(x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("truncate", [None, 4])
def test_the_fused_recurrence_is_the_readable_one(kind, truncate):
    """Values, gradients and the memory left behind, with documents that start inside a row and rows that start late."""
    mixer = randomise(KINDS[kind][0](hidden=6, truncate=truncate).build(5))
    segments = torch.tensor([[0] * 3 + [1] * 8, [0] * 11, [0] * 10 + [1]])
    for masks in ({}, {"segments": segments}, {"padding": torch.tensor([0, 4, 10])}):
        shared = context(11, **masks)
        memory = [torch.randn(3, 6) for _ in mixer.value.memories]
        found = {}
        for name in ("_readable", "_fused"):
            x = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
            mixer.zero_grad()
            h, last = getattr(mixer, name)(x, shared, memory)
            (h * torch.arange(1.0, 12.0)[:, None]).sum().backward()
            found[name] = [
                h.detach(),
                *(one.detach() for one in last),
                x.grad,
                *(p.grad for p in mixer.parameters() if p.grad is not None),
            ]
        for a, b in zip(*found.values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def gradient_by_token(mixer, time: int) -> torch.Tensor:
    """(T,): how much each input moves the last output, without the saturation of tanh (inputs and memory stay near 0)."""
    x = (1e-4 * torch.randn(1, time, mixer.hidden)).requires_grad_()
    mixer(x, context(time))[0, -1].square().sum().sqrt().backward()
    return x.grad[0].norm(dim=-1)


@pytest.mark.parametrize(("singular_value", "low", "high"), [(0.8, 0.0, 0.05), (1.0, 0.5, 2.0), (1.2, 20.0, 1e9)])
def test_gradients_vanish_and_explode_with_the_singular_values(singular_value, low, high):
    """Through k steps of h ← tanh(W x + U h) near 0 a gradient grows like σᵏ (Pascanu et al., arXiv 1211.5063, section 2.1)."""
    mixer = RNN(singular_value=singular_value).build(16)
    for name, rule in {f"{p}.{n}": r for p, m in mixer.named_children() for n, r in m.rules().items()}.items():
        rule.init(mixer.get_parameter(name).data, torch.Generator().manual_seed(0))
    sizes = gradient_by_token(mixer, 21)
    assert low < float(sizes[0] / sizes[-1]) < high
    assert float(sizes[0] / sizes[-1]) == pytest.approx(singular_value**20, rel=0.5)


def test_truncation_cuts_gradients_and_not_memory():
    whole, cut = (randomise(GRU(truncate=n).build(8)) for n in (None, 5))
    x = torch.randn(1, 12, 8)
    torch.testing.assert_close(whole(x, context(12)), cut(x, context(12)))
    for mixer, reaches in ((whole, True), (cut, False)):
        leaf = x.clone().requires_grad_()
        mixer(leaf, context(12))[0, -1].sum().backward()
        assert bool(leaf.grad[0, :10].any()) == reaches and leaf.grad[0, 10:].any()


def test_an_edited_gate_is_the_gate():
    """An LSTM whose input gates are held shut remembers nothing; whose forget gates are held open forgets nothing."""
    model = randomise(Decoder(vocab=11, width=8, layers=(Block(mixer=Branch(f=LSTM(), residual=False)),), context=16).build())
    tokens = torch.randint(0, 11, (2, 9))

    def shut(gates):
        return torch.cat([torch.zeros_like(gates[:, :, :1]), gates[:, :, 1:]], dim=2)

    with model.sites.edit({"layers.0.mixer.gates": shut}), model.sites.capture(["layers.0.mixer.h"]) as seen:
        model(tokens)
    assert not seen["layers.0.mixer.h"].any()
    with model.sites.capture(["layers.0.mixer.gates"]) as seen:
        model(tokens)
    assert seen["layers.0.mixer.gates"].shape == (2, 9, 4, 8)


def test_clipping_bounds_what_explodes():
    mixer = RNN(singular_value=1.5).build(16)
    torch.nn.init.orthogonal_(mixer.memory.weight, 1.5)
    torch.nn.init.normal_(mixer.input.weight, std=0.1)
    torch.nn.init.zeros_(mixer.input.bias), torch.nn.init.zeros_(mixer.memory.bias)
    x = 1e-4 * torch.randn(1, 40, 16)
    (1e3 * mixer(x, context(40))[0, -1]).sum().backward()
    before = torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
    after = torch.nn.utils.get_total_norm([p.grad for p in mixer.parameters()])
    assert before > 1e2 and after <= 1.0 + 1e-4
