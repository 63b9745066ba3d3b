"""Two processes, each with half of the heads and channels, compute what one does."""

from types import SimpleNamespace

import pytest
import torch

from headspring.artifacts import UserError
from headspring.inference import parallel
from headspring.models import MLP, Attention, Block, Decoder, repeat
from tests.two_processes import in_two_processes

from .tiny import tiny_model

WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from headspring.inference import parallel
from tests.inference.test_tensor_parallel import MODELS, answers
torch.set_num_threads(1)
mesh = parallel.join()
found = {}
for name, make in MODELS.items():
    found |= {f"right/{name}/{key}": value for key, value in answers(parallel.split(make(), mesh)).items()}
parallel._summed = lambda mesh, part, inputs, y: y  # the planted bug: nobody adds what the other process has
for name, make in MODELS.items():
    found |= {f"wrong/{name}/{key}": value for key, value in answers(parallel.split(make(), mesh)).items()}
save_file(found, Path(sys.argv[1]) / f"rank{mesh.get_rank()}.safetensors")
parallel.leave()
"""
BIASED = Block(mixer=Attention(heads=4, kv_heads=2, bias=True, out_bias=True), feedforward=MLP(hidden=64, bias=True))
MODELS = {"gated": lambda: tiny_model(120), "biased": lambda: tiny_model(120, layers=repeat(2, BIASED))}


@torch.inference_mode()
def answers(model) -> dict[str, torch.Tensor]:
    """Logits of a whole sequence, and ten tokens written greedily with a state."""
    tokens = torch.arange(40).view(2, 20) % 120
    state, chosen = model.new_state(2, 30), [tokens]
    for _ in range(10):
        chosen.append(model.logits(model(chosen[-1], state=state)[:, -1]).argmax(-1, keepdim=True))
    return {"logits": model.logits(model(tokens)), "tokens": torch.cat(chosen, dim=1)}


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("two"), WORKER, 100)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(name, of_two_processes):
    alone, (first, second) = answers(MODELS[name]()), of_two_processes
    torch.testing.assert_close(first[f"right/{name}/logits"], alone["logits"], rtol=1e-4, atol=1e-4)
    assert torch.equal(first[f"right/{name}/tokens"], alone["tokens"])
    for key in ("logits", "tokens"):
        assert torch.equal(first[f"right/{name}/{key}"], second[f"right/{name}/{key}"])
    assert (first[f"wrong/{name}/logits"] - alone["logits"]).abs().max() > 0.1


def test_what_does_not_divide_is_refused():
    three = SimpleNamespace(size=lambda: 3)
    with pytest.raises(UserError, match="2 kv_heads do not divide by 3 processes"):
        parallel.split(tiny_model(120), three)
    odd = Block(mixer=Attention(heads=6), feedforward=MLP(hidden=64))
    with pytest.raises(UserError, match="64 channels do not divide by 3 processes"):
        parallel.split(Decoder(vocab=120, width=48, layers=(odd,)).build(), three)


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        parallel.join()
