"""Every family of the field in whole numbers: it runs, near to what it was, and comes back from a folder bit for bit."""

import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference.quantization import targets
from headspring.inference.quantization.folder import load_quantized, save_quantized
from headspring.inference.quantization.installing import install, installed
from headspring.inference.quantization.quantize import quantize
from headspring.inference.quantization.scheme import Quantization
from headspring.models.families import FAMILIES

ROUTES = ("routed",)  # a token that goes to another expert changes much


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch):
    """The families are registered with matrices smaller than those that are worth it."""
    monkeypatch.setattr(targets, "SMALLEST", 2)


def read(model, tokens: torch.Tensor) -> torch.Tensor:
    """What the model says of tokens, with whatever else it reads at its default."""
    from headspring.models import EncoderDecoder

    if isinstance(model.config, EncoderDecoder):
        return model.logits(model(tokens, source=tokens))
    return model.logits(model(tokens))


def spread_out(model) -> None:
    """Output matrices start at 0, where every change would be a large one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2 and not bool(parameter.any()):
            parameter.data.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.no_grad()
def test_a_family_in_eight_bits(name, tmp_path):
    value = FAMILIES[name]()
    if value.counted:
        with pytest.raises(UserError, match="has no matrices that can be quantized"):
            targets.targets_of(value.build(0))
        return
    model = value.build(0).eval()
    spread_out(model)
    tokens = torch.randint(0, value.vocab, (2, 7), generator=torch.Generator().manual_seed(1))
    before = read(model, tokens)
    matrices = quantize(model, Quantization())
    install(model, matrices)
    after = read(model, tokens)
    assert set(installed(model)) == set(matrices) and not torch.equal(before, after)
    assert (after - before).norm() < (0.2 if name not in ROUTES else 0.6) * before.norm()
    save_quantized(model, tmp_path)
    assert torch.equal(read(load_quantized(tmp_path).eval(), tokens), after)
