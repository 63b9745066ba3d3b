"""The value tree, the ledger, the sites and the folder of a decoder."""

import json

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from headspring.artifacts import CorruptArtifact, UserError
from headspring.models import (
    MLP,
    Attention,
    Block,
    Branch,
    Decoder,
    LayerNorm,
    NoPE,
    RMSNorm,
    load_model,
    repeat,
    save_model,
)
from headspring.models.families import FAMILIES
from headspring.models.part import Linear
from headspring.models.scoring import cross_entropy_sum
from tests.models.conftest import randomise, small_decoder

SANDWICH = Block(
    mixer=Branch(f=Attention(heads=2, head_dim=8, position=NoPE(), qk_norm=None, bias=True), post=LayerNorm()),
    feedforward=Branch(f=MLP(hidden=40, activation="gelu", bias=True), pre=None, out=RMSNorm()),
)


POSITIONS = ["gpt2", "bloom", "t5_bias", "stretched_rope", "vaswani_decoder", "opt", "deepnorm", "mup"]


@pytest.mark.parametrize("layers", [repeat(2, SANDWICH), (SANDWICH, *repeat(1, SANDWICH))], ids=["equal", "tuple"])
def test_a_value_round_trips_through_json(layers):
    config = small_decoder(layers=layers)
    assert Decoder.model_validate_json(config.model_dump_json()) == config


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (small_decoder().build(seed) for seed in (3, 3, 4))
    assert torch.equal(first.embed.weight, second.embed.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_a_parameter_without_a_rule_is_refused(monkeypatch):
    monkeypatch.setattr(Linear, "rules", lambda self: {})
    with pytest.raises(ValueError, match="without a rule"):
        small_decoder().build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "greater than 0"),
        ({"layers": ()}, "at least 1"),
        ({"widht": 3}, "Extra inputs"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        small_decoder(**change)


def test_heads_must_be_a_multiple_of_key_value_heads():
    with pytest.raises(ValidationError, match="multiple of kv_heads"):
        Attention(heads=4, kv_heads=3)


@pytest.mark.parametrize(
    "config",
    [
        small_decoder(),
        small_decoder(layers=repeat(2, SANDWICH)),
        small_decoder(tied=False),
        *(FAMILIES[name]() for name in POSITIONS),
    ],
    ids=["gqa", "sandwich", "untied", *POSITIONS],
)
def test_the_ledger_counts_what_execution_counts(config):
    """Parameters exactly; matrix FLOPs as torch counts them. torch counts attention in full, the ledger its causal half,
    and torch does not count element-wise work, which the ledger does."""
    model, time = randomise(config.build()).requires_grad_(False), 16
    ledger = model.ledger(time)
    assert ledger.parameters == model.num_parameters() == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(1, time, dtype=torch.long)))
    names = {"q", "k", "v", "out", "gate", "up", "head", "widen", "narrow"}
    assert _sum(ledger, names) * time == counter.get_total_flops() - _attention_flops(counter)
    state = model.new_state(1, time)
    held = ledger.state_bytes * time + ledger.fixed_state_bytes
    assert held == state.bytes / 2  # the state of a float32 model has four bytes an element


def _sum(cost, names) -> float:
    if cost.name in names:
        return cost.flops
    return sum(_sum(child, names) for child in cost.children)


def _attention_flops(counter) -> int:
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "scaled_dot_product" in str(op))


def test_drawing_shows_every_part(model):
    text = repr(model)
    assert "2 × the same" in text and "4 heads of 8, 2 key–value" in text and f"{model.num_parameters():,}" in text


def test_sites_do_not_change_what_is_computed_and_the_stream_is_the_sum_of_its_parts(model):
    tokens = torch.randint(0, 61, (2, 9))
    plain = model(tokens)
    with model.sites.capture(model.sites.names) as seen:
        torch.testing.assert_close(model(tokens), plain)
    assert set(seen) == set(model.sites.names)
    for i in range(2):
        middle = seen[f"layers.{i}.residual.pre"] + seen[f"layers.{i}.mixer.out"]
        torch.testing.assert_close(seen[f"layers.{i}.residual.mid"], middle)
        torch.testing.assert_close(seen[f"layers.{i}.residual.post"], middle + seen[f"layers.{i}.mlp.out"])
    torch.testing.assert_close(seen["layers.1.mixer.pattern"].sum(-1), torch.ones(2, 4, 9))
    assert torch.equal(model(tokens), plain)  # and nothing is left behind


def test_edits_by_name_and_alias(model):
    tokens = torch.randint(0, 61, (1, 6))
    with model.sites.capture(["final"]) as seen, model.sites.edit({"layers.1.attention.out": torch.zeros_like}):
        edited = model(tokens)
    assert torch.equal(seen["final"], edited)
    assert not torch.equal(edited, model(tokens))
    with pytest.raises(UserError, match="did you mean 'layers.1.mixer.out'"):
        model.sites.resolve("layers.1.mixer.oout")


def test_folder_round_trip_is_bitwise_and_damage_is_named(model, tmp_path):
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no Headspring model"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"vocab": 1 << 40}, r"embed\.weight is \[61, 32\] in the file and \[1099511627776, 32\] in the model"),
        ({"vocab": 1 << 62}, "no model has these sizes"),
        ({"norm": None}, r"norm\.weight is \[32\] in the file and missing in the model"),
    ],
    ids=str,
)
def test_a_config_cannot_ask_for_more_memory_than_the_file_has(model, change, why, tmp_path):
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptArtifact, match=why):
        load_model(tmp_path)


def test_activation_checkpointing_changes_memory_not_gradients(model):
    tokens = torch.randint(0, 61, (2, 9))
    gradients = []
    for checkpointing in (False, True):
        model.checkpoint_activations = checkpointing
        model.zero_grad()
        cross_entropy_sum(model, model(tokens), tokens).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
