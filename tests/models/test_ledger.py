"""The ledger of every registered family against what execution holds and computes.

Parameters are equal. State is equal in bytes, at two lengths, of a model that computes in bfloat16 (the ledger's convention).
FLOPs of matrix products are equal to those that torch counts, on the paths on which torch sees products: without native
operators, with attention patterns formed (torch counts a fused attention as nothing or in full) and recurrences token by
token. The patterns are then counted by the keys that have weight. What the ledger calls element-wise is no product and has
no counterpart in torch's counter.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headspring.models import Decoder, Encoder, kernels
from headspring.models.chosen import Chosen
from headspring.models.families import FAMILIES
from headspring.models.mla import MLAModule
from headspring.models.moe import MoEModule
from headspring.models.ngram import NGram
from headspring.models.part import Cost
from tests.contract.checks import random_tokens
from tests.models.conftest import randomise

TIME = 20  # every chunk of every family divides it
ELEMENTWISE = {
    *("position", "positions", "types", "act", "gates", "conv", "norm", "q_norm", "k_norm", "kv_norm", "pre", "positive"),
    *("decay", "divide", "multiply", "scan", "solve", "step", "pattern", "mixer.pre", "mixer.post", "mixer.out", "mlp.pre"),
    *("mlp.post", "mlp.out"),
}


def leaves(cost: Cost):
    if not cost.children:
        yield cost
    for child in cost.children:
        yield from leaves(child)


def plain_stacks():
    """Families whose whole forward pass is a stack of blocks, and whose keys do not depend on what the tokens are."""
    for name, tiny in FAMILIES.items():
        config = tiny()
        if type(config) not in (Decoder, Encoder) or getattr(config, "heads", None):
            continue
        if not any(isinstance(getattr(mixer, "mask", None), Chosen) for mixer in config.mixers()):
            yield name


def products(model) -> float:
    """FLOPs of the ledger's matrix products for TIME tokens, attention's left out."""
    total = sum(leaf.flops for leaf in leaves(model.ledger(TIME)) if leaf.name not in ELEMENTWISE)
    for module in model.modules():
        if isinstance(module, MoEModule):
            total -= 5.0 * module.value.top * module.value.hidden  # the gates of experts, which are element-wise
    return total * TIME


def executed(model) -> tuple[float, float]:
    """FLOPs of one row of TIME tokens: of all products but those of attention patterns, and of these by visible keys."""
    plain = sorted(name for name in model.sites.names if name.endswith((".pattern", ".gates")))
    names = [name for name in plain if name in model.sites.plain]
    tokens = random_tokens(model, 1, TIME)
    with FlopCounterMode(display=False) as counter, model.sites.capture(names) as seen:
        model.logits(model(tokens))
    formed, visible = 0.0, 0.0
    for name, pattern in seen.items():
        if name.endswith(".pattern"):
            mixer = model.layers[int(name.split(".")[1])].mixes
            keys = getattr(mixer, "channels", None) or mixer.value.head_dim + mixer.value.rotary_dim
            per_key = 2.0 * (keys + getattr(mixer, "value_dim", keys))
            formed += per_key * pattern.numel()
            visible += per_key * float((pattern > 0).sum())
    return counter.get_total_flops() - formed, visible


@pytest.fixture(autouse=True)
def _no_native_operators(monkeypatch):
    monkeypatch.setenv("HEADSPRING_KERNELS", "plain")
    for name in dir(kernels):
        clear = getattr(getattr(kernels, name), "cache_clear", None)
        if clear is not None:
            clear()
    yield
    monkeypatch.undo()
    for name in dir(kernels):
        clear = getattr(getattr(kernels, name), "cache_clear", None)
        if clear is not None:
            clear()


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters(name):
    model = FAMILIES[name]().build()
    counted = sum(table.probabilities.numel() + table.weights.numel() for table in getattr(model, "tables", ()))
    assert model.ledger().parameters == model.num_parameters() == sum(p.numel() for p in model.parameters()) + counted


@pytest.mark.parametrize("name", [name for name, tiny in FAMILIES.items() if type(tiny()) in (Decoder, NGram)])
def test_state(name):
    model = FAMILIES[name]().build()
    model.compute_dtype = torch.bfloat16
    for length in (TIME, 2 * TIME):
        ledger = model.ledger(length)
        assert ledger.state_bytes * length + ledger.fixed_state_bytes == model.new_state(1, length).bytes


@pytest.mark.parametrize("name", list(plain_stacks()))
def test_products(name, monkeypatch):
    monkeypatch.setattr(MLAModule, "absorbs", lambda self, queries, keys: False)  # the ledger's form is the expanded one
    model = randomise(FAMILIES[name]().build()).requires_grad_(False).eval()
    others, visible = executed(model)
    assert products(model) == pytest.approx(others)
    patterns = sum(leaf.flops for leaf in leaves(model.ledger(TIME)) if leaf.name == "pattern")
    assert patterns * TIME == pytest.approx(visible)


def test_a_product_that_is_forgotten_is_seen(monkeypatch):
    """The control: a ledger that says less than is computed."""
    model = randomise(FAMILIES["transformer"]().build()).requires_grad_(False)
    mixer = type(model.layers[0].mixes)
    whole = mixer.cost

    def short(self, name, length):
        cost = whole(self, name, length)
        return Cost.sum(name, tuple(child for child in cost.children if child.name != "v"))

    monkeypatch.setattr(mixer, "cost", short)
    assert products(model) != pytest.approx(executed(model)[0])
    assert model.ledger().parameters != model.num_parameters()
