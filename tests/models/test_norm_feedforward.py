"""Norms and feed-forward parts against `transformers` and against their definitions."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from headspring.models import MLP, Gated, LayerNorm, RMSNorm, SwiGLU
from headspring.models.feedforward import ACTIVATIONS

transformers = pytest.importorskip("transformers")
from transformers.activations import ACT2FN  # noqa: E402
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm  # noqa: E402

WIDTH = 37


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(value, reference, dtype: torch.dtype):
    """Our module and the reference with the same random gain, as far as they have one."""
    module = value.build(WIDTH)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(drawn(WIDTH, seed=7))
            reference.get_parameter(name).copy_(drawn(WIDTH, seed=7))
    return module.to(dtype), reference.to(dtype)


CASES = [
    (RMSNorm(epsilon=1e-3), lambda: LlamaRMSNorm(WIDTH, 1e-3)),
    (RMSNorm(epsilon=1e-3, plus_one=True), lambda: Gemma2RMSNorm(WIDTH, 1e-3)),
    (LayerNorm(gain=False, bias=False), lambda: OlmoLayerNorm(WIDTH)),
    (LayerNorm(epsilon=1e-3), lambda: torch.nn.LayerNorm(WIDTH, 1e-3)),
]
IDS = ["llama", "gemma", "olmo", "layer_norm"]


@pytest.mark.parametrize(("value", "reference"), CASES, ids=IDS)
@torch.no_grad()
def test_norms_are_those_of_transformers(value, reference):
    """The control: of all our norms, only the right one is the same."""
    x = 3.0 * drawn(5, WIDTH) + 1.0
    expected = pair(value, reference(), torch.float32)[1](x)
    same = [torch.allclose(pair(other, make(), torch.float32)[0](x), expected, atol=1e-5) for other, make in CASES]
    assert same == [other == value for other, _ in CASES]


@pytest.mark.parametrize(("value", "reference"), CASES, ids=IDS)
@torch.no_grad()
def test_in_bfloat16_one_rounding_apart(value, reference):
    """Llama rounds before it multiplies by the gain, we do after: never more than two units in the last place apart, and
    ours is no farther from the exact value."""
    module, theirs = pair(value, reference(), torch.bfloat16)
    x = drawn(200, WIDTH, dtype=torch.bfloat16)
    exact = module.float()(x.float())
    ours, others = module.bfloat16()(x).float(), theirs(x).float()
    unit = 2.0**-8 * exact.abs().clamp(min=2.0**-8)
    assert float(((ours - others).abs() / unit).max()) <= 4.0
    assert float((ours - exact).abs().mean()) <= 1.001 * float((others - exact).abs().mean())


def test_a_gain_stored_minus_one_starts_as_a_gain_of_one():
    x = drawn(4, WIDTH)
    for value in (RMSNorm(), RMSNorm(plus_one=True), RMSNorm(gain=False)):
        module = value.build(WIDTH)
        for name, rule in module.rules().items():
            rule.init(module.get_parameter(name).data, torch.Generator())
        assert torch.allclose(module(x), F.rms_norm(x, (WIDTH,), eps=1e-6), atol=1e-6)


def test_plus_one_has_the_gradient_of_its_gain():
    x, upstream, gradients = drawn(6, WIDTH), drawn(6, WIDTH, seed=1), []
    for value, stored in ((RMSNorm(), 1.0), (RMSNorm(plus_one=True), 0.0)):
        module = value.build(WIDTH)
        torch.nn.init.constant_(module.weight, stored + 0.25)
        module(x).backward(upstream)
        gradients.append(module.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_gain_that_is_not_there_cannot_be_stored_minus_one():
    with pytest.raises(ValidationError, match="gain is false"):
        RMSNorm(gain=False, plus_one=True)


# ---- feed-forward

THEIRS = {"relu": "relu", "relu2": "relu2", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu", "tanh": "tanh"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = torch.linspace(-6, 6, 101)
    assert torch.allclose(ACTIVATIONS[name](x), ACT2FN[THEIRS[name]](x), atol=1e-6)
    assert sum(torch.allclose(ACTIVATIONS[other](x), ACTIVATIONS[name](x), atol=1e-5) for other in ACTIVATIONS) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feedforward_parts_are_their_formula(activation, bias):
    x, act = drawn(2, 3, WIDTH), ACTIVATIONS[activation]
    for value in (Gated(hidden=50, activation=activation, bias=bias), MLP(hidden=50, activation=activation, bias=bias)):
        module = value.build(WIDTH)
        for seed, parameter in enumerate(module.parameters()):
            parameter.data.copy_(0.3 * drawn(*parameter.shape, seed=seed))
        up = F.linear(x, module.up.weight, module.up.bias)
        inner = act(F.linear(x, module.gate.weight, module.gate.bias)) * up if isinstance(value, Gated) else act(up)
        assert (module.out.bias is not None) == bias
        assert torch.allclose(module(x), F.linear(inner, module.out.weight, module.out.bias), atol=1e-5)


def test_swiglu_is_the_gated_part_with_silu():
    swiglu, gated = SwiGLU(hidden=50, bias=True).build(WIDTH), Gated(hidden=50, activation="silu", bias=True).build(WIDTH)
    for parameter in swiglu.parameters():
        parameter.data.normal_()
    gated.load_state_dict(swiglu.state_dict())
    x = drawn(3, WIDTH)
    assert torch.equal(swiglu(x), gated(x))
    gated.activation = "gelu"
    assert not torch.allclose(swiglu(x), gated(x), atol=1e-3)
