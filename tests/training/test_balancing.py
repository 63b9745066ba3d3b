"""Balancing: formulas, tokens that count, accumulation, activation checkpointing, processes, and that it works."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, Batch
from headspring.models import Attention, Block, Decoder, MoE, SigmoidRouter, SoftmaxRouter, repeat
from headspring.models.moe import expert_layers, watch_routing
from headspring.models.routing import Routing
from headspring.training import loop
from headspring.training.balancing import Balanced, Balancing, balanced
from headspring.training.objective import NextToken, held_out_loss
from headspring.training.optimizers import AdamW, build_optimizers
from tests.contract.training_checks import StopAt, Stream, assert_same_gradients, config
from tests.models.conftest import randomise

STRONG = Balancing(balance=0.5, z_loss=0.1, correction_rate=0.1)


SOFTMAX = SoftmaxRouter()


def decoder(router=SOFTMAX, **changes) -> Decoder:
    experts = MoE(**({"experts": 5, "top": 2, "hidden": 16, "router": router} | changes))
    return Decoder(vocab=53, width=16, layers=repeat(2, Block(mixer=Attention(heads=2), feedforward=experts)), context=16)


def routing(chosen, probabilities) -> Routing:
    chosen, probabilities = torch.tensor(chosen), torch.tensor(probabilities)
    return Routing(probabilities.log(), probabilities, chosen, torch.ones(chosen.shape))


# ---- formulas


def test_the_balance_loss_is_one_where_experts_are_used_alike_and_their_number_where_one_is():
    even = routing([[[t % 4] for t in range(8)]], [[[0.25] * 4] * 8])
    one = routing([[[2]] * 8], [[[0.0, 0.0, 1.0, 0.0]] * 8])
    counted = torch.ones(1, 8, dtype=torch.bool)
    assert even.balance_loss(counted) == 8 * 1.0 and one.balance_loss(counted) == 8 * 4.0


def test_the_balance_loss_is_that_of_each_row_by_definition():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(2, 5, 4, generator=generator).softmax(-1)
    found = Routing(probabilities.log(), probabilities, probabilities.topk(2).indices, torch.ones(2, 5, 2))
    counted = torch.tensor([[True] * 5, [True, False, True, True, False]])
    expected = 0.0
    for row in range(2):
        tokens = [t for t in range(5) if counted[row, t]]
        for e in range(4):
            share = sum(int(e in found.chosen[row, t]) for t in tokens) / (2 * len(tokens))
            expected += len(tokens) * 4 * share * sum(float(probabilities[row, t, e]) for t in tokens) / len(tokens)
    torch.testing.assert_close(float(found.balance_loss(counted)), expected)


def test_the_other_measures_are_their_definitions():
    found = routing([[[0], [1]]], [[[0.5, 0.5], [0.9, 0.1]]])
    found = Routing(torch.tensor([[[1.0, 1.0], [2.0, 0.0]]]), found.probabilities, found.chosen, found.weights)
    first = torch.tensor([[True, False]])
    torch.testing.assert_close(found.z_loss(first), (1.0 + torch.tensor(2.0).log()) ** 2)
    torch.testing.assert_close(found.entropy(first), torch.tensor(2.0).log())
    assert found.load(first).tolist() == [1.0, 0.0] and found.dropped(first) == 0.0


def test_dropped_choices_are_counted():
    model = decoder(capacity=0.5).build().train()
    with watch_routing(model) as seen:
        model(torch.zeros(2, 8, dtype=torch.long))
    found = seen["layers.0.mlp"]
    share = float(found.dropped(torch.ones(2, 8, dtype=torch.bool))) / 16
    assert share == float((~found.kept).float().mean()) > 0.5  # equal tokens want the same two experts


# ---- in an objective


def batch(masked: bool = False) -> Batch:
    tokens = torch.randint(0, 53, (4, 13), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :7] = IGNORE
    return Batch(tokens[:, :-1], torch.full_like(targets, IGNORE) if masked else targets)


def test_a_model_without_experts_keeps_its_objective():
    plain = Decoder(vocab=53, width=16, layers=(Block(mixer=Attention(heads=2)),), context=16).build()
    objective = NextToken()
    assert balanced(plain, objective) == (objective, ())
    with pytest.raises(UserError, match="this model has none"):
        balanced(plain, objective, STRONG)


def test_a_batch_without_trained_tokens_has_no_loss():
    model = randomise(decoder().build())
    loss, metrics = Balanced(NextToken(), STRONG).loss(model, batch(masked=True))
    loss.backward()
    assert float(loss.detach()) == 0.0 and all(float(value) == 0.0 for value in metrics.values())
    assert all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters())


def test_tokens_without_a_loss_do_not_count():
    model, objective = randomise(decoder().build()), Balanced(NextToken(), STRONG)
    objective.loss(model, batch())
    assert all(float(load.sum()) == 2 * objective.count(batch()) for load in objective.take_load().values())
    assert objective.take_load() == {}


def test_held_out_loss_is_without_it():
    model = randomise(decoder().build())
    found = held_out_loss(model, Stream(53), 4, 2, torch.float32, True)
    _, metrics = Balanced(NextToken(), STRONG).loss(model, batch())
    assert set(metrics) == {"cross_entropy", "balance_loss", "router_z_loss", "router_entropy", "dropped_share"}
    assert found < 2 * float(metrics["cross_entropy"]) / NextToken().count(batch())


def gradients(model, objective=None, **changes) -> tuple[dict[str, torch.Tensor], Balanced]:
    settings, objective = config(batch_size=8, **changes), objective or Balanced(NextToken(), STRONG)
    optimizers = build_optimizers(model, settings.optimizer)
    run = loop.Run(model, objective, Stream(53), settings, optimizers, torch.device("cpu"), settings.steps)
    model.checkpoint_activations = settings.activation_checkpointing
    loop._forward_backward(run)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, objective


@pytest.mark.parametrize("changes", [{}, {"capacity": 0.7}], ids=["free", "capacity"])
def test_accumulation_is_one_batch(changes):
    model = randomise(decoder(**changes).build())
    whole, objective = gradients(model)
    load = objective.take_load()
    for size in (1, 3):
        pieces, objective = gradients(model, micro_batch_size=size)
        assert_same_gradients(pieces, whole)
        assert all(torch.equal(load[name], value) for name, value in objective.take_load().items())


def of_the_whole_batch(self, counted):
    """The usual definition: shares and probabilities of all rows together."""
    share = self.load(counted) / self.load(counted).sum()
    return self.logits.shape[-1] * (share * self.probabilities.mean((0, 1))).sum() * counted.sum()


def test_the_loss_of_a_whole_batch_would_not_be():
    model = randomise(decoder().build())
    with patch.object(Routing, "balance_loss", of_the_whole_batch), pytest.raises(AssertionError):
        assert_same_gradients(gradients(model, micro_batch_size=3)[0], gradients(model)[0])


def test_recomputed_activations_are_counted_once():
    model = randomise(decoder(SigmoidRouter()).build())
    whole, once = gradients(model)
    again, twice = gradients(model, activation_checkpointing=True)
    assert_same_gradients(again, whole)
    assert once.load and all(torch.equal(twice.load[name], load) for name, load in once.load.items())


def test_activations_are_in_fact_recomputed():
    model, calls = randomise(decoder().build()), []
    model.checkpoint_activations = True
    layer = expert_layers(model)["layers.1.mlp"]
    layer.on_routing = calls.append
    NextToken().loss(model, batch())[0].backward()
    assert len(calls) == 2


# ---- in a run


def trained(folder: Path, model, balancing: Balancing, steps: int, callbacks=(), **changes) -> dict:
    """The record of the last step."""
    objective, own = balanced(model, NextToken(), balancing)
    adam = AdamW(learning_rate=0.003, weight_decay=0.0)
    loop.train(model, objective, Stream(53), config(steps=steps, optimizer=adam, **changes), folder, [*own, *callbacks])
    return records(folder)[-1]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def use(folder: Path) -> torch.Tensor:
    """The share of each expert of the first layer over the last 20 steps."""
    return torch.tensor([record["experts"]["layers.0.mlp"]["share"] for record in records(folder)[-20:]]).mean(0)


def lopsided(router) -> torch.nn.Module:
    """A model whose routers send everything to the first two experts."""
    model = decoder(router, experts=6).build(seed=1)
    with torch.no_grad():
        model.embed.weight.add_(0.02)
        for layer in expert_layers(model).values():
            layer.router.weight[:2].add_(0.3)
    return model


@pytest.mark.parametrize("router", [SoftmaxRouter(), SigmoidRouter()], ids=["loss", "correction"])
def test_experts_that_nobody_chose_find_work(tmp_path, router):
    off = Balancing(balance=0.0, z_loss=0.0, correction_rate=0.0)
    on = Balancing(balance=0.3) if isinstance(router, SoftmaxRouter) else Balancing(balance=0.0, correction_rate=0.01)
    for name, balancing in (("off", off), ("on", on)):
        trained(tmp_path / name, lopsided(router), balancing, steps=100, batch_size=16)
    before, after = use(tmp_path / "off"), use(tmp_path / "on")
    assert before.max() > 0.4 and before.min() < 0.01
    assert after.max() < 0.3 and after.min() > 0.05


def test_a_correction_moves_against_the_load_of_the_step(tmp_path):
    model = lopsided(SigmoidRouter())
    balancing = Balancing(balance=0.0, correction_rate=0.25)
    record = trained(tmp_path, model, balancing, steps=1, batch_size=8, micro_batch_size=3)
    for name, layer in expert_layers(model).items():
        share = torch.tensor(record["experts"][name]["share"])
        assert torch.equal(layer.router.correction, 0.25 * torch.sign(share.mean() - share))


def test_a_stopped_run_goes_on_with_its_corrections(tmp_path):
    whole, parts = lopsided(SigmoidRouter()), lopsided(SigmoidRouter())
    trained(tmp_path / "whole", whole, STRONG, steps=6)
    with pytest.raises(loop.Interrupted):
        trained(tmp_path / "parts", parts, STRONG, steps=6, callbacks=[StopAt(3)])
    parts = decoder(SigmoidRouter(), experts=6).build(seed=2)
    trained(tmp_path / "parts", parts, STRONG, steps=6)
    state = parts.state_dict()
    assert any(name.endswith("correction") and value.any() for name, value in state.items())
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from headspring.training import distributed
from tests.training.test_balancing import STRONG, SigmoidRouter, lopsided, trained
torch.set_num_threads(1)
distributed.start(torch.device("cpu"))
model = lopsided(SigmoidRouter())
trained(Path(sys.argv[1]) / "run", model, STRONG, steps=2, batch_size=8)
save_file(model.state_dict(), Path(sys.argv[1]) / f"rank{distributed.rank()}.safetensors")
"""


@pytest.mark.slow
def test_one_process_is_two(tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, tmp_path / "worker.py", tmp_path], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = lopsided(SigmoidRouter())
    trained(tmp_path / "alone", alone, STRONG, steps=2, batch_size=8)
    for rank in (0, 1):
        for name, tensor in load_file(tmp_path / f"rank{rank}.safetensors").items():
            torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
