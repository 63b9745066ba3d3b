"""Adapters whose every number is random: PEFT begins with B = 0, which would hide everything."""

import pytest
import torch

from headspring.models.kernels import multiplies_natively
from headspring.models.lora import Adapter, LoRA, adaptable


def random_adapter(model, rank: int = 4, seed: int = 0, targets=None, std: float = 0.2, **options) -> Adapter:
    """For all matrices of `model` that can be adapted, or those whose last name is one of `targets`."""
    targets = targets or tuple({name.rpartition(".")[2] for name in adaptable(model)})
    adapter = LoRA(rank=rank, alpha=2 * rank, targets=targets, **options).build(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, part in sorted(adapter.parts.items()):
            part.down.normal_(0, std, generator=generator)
            part.up.normal_(0, std, generator=generator)
    return adapter


def narrow(model):
    """In bfloat16 where products are native: with heads of 32 channels a row is then the same bits in any company. Elsewhere in
    float32, where it is so to rounding."""
    if multiplies_natively(torch.empty(0, dtype=torch.bfloat16)):
        model = model.to(torch.bfloat16)
        model.compute_dtype = torch.bfloat16
    return model


def alike(model, found, expected) -> bool:
    """Whether lists of (token ids, log-probabilities) are equal: bit for bit where `narrow` says so."""
    if model.compute_dtype == torch.bfloat16:
        return found == expected
    return all(a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-4) for a, b in zip(found, expected, strict=True))
