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

from headspring.models import Decoder, Encoder, EncoderDecoder, kernels
from headspring.models.chosen import Chosen
from headspring.models.families import FAMILIES
from headspring.models.heads import HeadedModule
from headspring.models.mla import MLAModule
from headspring.models.moe import MoEModule
from headspring.models.ngram import NGram
from headspring.models.part import Cost
from headspring.models.scoring import cross_entropy_sum
from tests.contract.checks import random_tokens
from tests.models.conftest import randomise
from tests.models.kept import kept_bytes

TIME = 20  # every chunk of every family divides it
ELEMENTWISE = {
    *("position", "positions", "types", "act", "gates", "conv", "norm", "q_norm", "k_norm", "kv_norm", "pre", "positive"),
    *("decay", "divide", "multiply", "scan", "solve", "step", "pattern", "mixer.pre", "mixer.post", "mixer.out", "mlp.pre"),
    *("mlp.post", "mlp.out", "cross.pre", "cross.post", "cross.out"),
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
        stacks = [config.encoder, config.decoder] if isinstance(config, EncoderDecoder) else [config]
        if not all(isinstance(stack, Decoder | Encoder) for stack in stacks):
            continue
        if not any(isinstance(getattr(mixer, "mask", None), Chosen) for stack in stacks for mixer in stack.mixers()):
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
    mixers = {prefix: mixer for prefix, mixer, _ in model.owners()}
    tokens = random_tokens(model, 1, TIME)
    sides = {"source": random_tokens(model, 1, TIME, seed=1)} if model.config.reads_source else {}
    with FlopCounterMode(display=False) as counter, model.sites.capture(names) as seen:
        model.logits(model(tokens, **sides))
    formed, visible = 0.0, 0.0
    for name, pattern in seen.items():
        if name.endswith(".pattern"):
            mixer = mixers[name.removesuffix(".pattern")]
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


def test_products_of_heads():
    """Those of the body, and of each step, which has a token fewer for each that it looks further."""
    model = randomise(FAMILIES["headed"]().build()).requires_grad_(False).eval()
    tokens, body, head = random_tokens(model, 1, TIME), model.body, model.heads["ahead"]
    assert products(body) == pytest.approx(executed(body)[0])
    hidden, counted = body(tokens), 0.0
    with FlopCounterMode(display=False) as counter:
        model.heads["value"](hidden)
        for further in head.foresee(body, hidden, tokens):
            body.logits(further)
    for number, step in enumerate(head.steps, 1):
        cost = step.cost("step", TIME - number)
        plain = sum(leaf.flops for leaf in leaves(cost) if leaf.name not in {*ELEMENTWISE, "out", "of_hidden", "of_token"})
        outs = sum(leaf.flops for leaf in leaves(cost) if leaf.name == "out" and "→" in leaf.shape)  # and not the norm of it
        counted += (plain + outs + 2.0 * model.output_weight.numel()) * (TIME - number)
    counted += 2.0 * model.config.width * TIME
    attention = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    assert counter.get_total_flops() - attention == pytest.approx(counted)
    shared = next(part for part in model.ledger(TIME).children if part.name == "heads.ahead.logits")
    assert shared.flops == 2.0 * len(head.steps) * model.output_weight.numel()


@pytest.mark.parametrize("name", list(FAMILIES["multimodal"]().towers))
def test_products_of_towers(name):
    """Per soft token; the pieces of an item all see each other."""
    value = FAMILIES["multimodal"]().towers[name]
    model = randomise(FAMILIES["multimodal"]().build()).requires_grad_(False)
    tower = model.towers[name]
    raw = torch.rand(1, value.channels, value.height, value.columns) if name == "image" else torch.rand(1, value.samples)
    sites = [site for site in tower.sites.names if site.endswith(".pattern")]
    with FlopCounterMode(display=False) as front:
        value.pieces(raw)  # a sound's bands; no part of the ledger
    with FlopCounterMode(display=False) as counter, tower.sites.capture(sites) as seen:
        tower(raw, torch.float32)
    formed = sum(4.0 * tower.blocks[int(site.split(".")[1])].mixes.channels * p.numel() for site, p in seen.items())
    cost, pieces = tower.cost(name), value.num_pieces
    assert cost.parameters == sum(p.numel() for p in tower.parameters())
    plain = sum(leaf.flops for leaf in leaves(cost) if leaf.name not in ELEMENTWISE)
    assert plain * pieces == pytest.approx(counter.get_total_flops() - front.get_total_flops() - formed)
    assert sum(leaf.flops for leaf in leaves(cost) if leaf.name == "pattern") * pieces == pytest.approx(formed)


def test_the_state_of_an_encoder_decoder_holds_the_source():
    """Its keys and values in every layer, and what the encoder wrote, once."""
    model = FAMILIES["encoder_decoder"]().build()
    model.compute_dtype = torch.bfloat16
    state, source = model.new_state(1, TIME), random_tokens(model, 1, TIME, seed=1)
    model(random_tokens(model, 1, TIME), state=state, source=source)
    ledger = model.ledger(TIME)
    assert ledger.state_bytes * TIME + ledger.fixed_state_bytes == state.bytes


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


# ---- what a backward pass keeps


def asked(model, length: int):
    """What training does with `rows` rows: the loss of the next token, and of every head."""

    def work(rows: int):
        tokens = random_tokens(model, rows, length)
        sides = {"source": random_tokens(model, rows, length, seed=1)} if model.config.reads_source else {}
        hidden = model(tokens, **sides)
        found = [cross_entropy_sum(model, hidden, tokens)]
        if isinstance(model, HeadedModule):
            found.append(model.heads["value"](hidden))
            for number, further in enumerate(model.heads["ahead"].foresee(model.body, hidden, tokens), 1):
                found.append(cross_entropy_sum(model, further, tokens[:, number:]))
        return found

    return work


def counted(model, length: int) -> float:
    """Activation bytes of the ledger for a row of `length` tokens. What looks k further has k tokens fewer to look at."""
    total = model.ledger(length).activation_bytes * length
    for number, step in enumerate(model.heads["ahead"].steps, 1) if isinstance(model, HeadedModule) else ():
        total -= number * (step.cost("step", length).activation_bytes + 2.0 * model.config.width)
    return total


@pytest.mark.parametrize("name", [name for name, tiny in FAMILIES.items() if not tiny().counted])
def test_activations(name):
    model = randomise(FAMILIES[name]().build()).train(name != "switch")  # which drops tokens in training
    assert counted(model, TIME) == pytest.approx(kept_bytes(model, asked(model, TIME)), rel=0.05)


@pytest.mark.parametrize("name", ["transformer", "t5", "mixtral", "deepseek", "lstm", "mamba2", "gated_delta"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_ledger_that_is_a_tenth_off_is_seen(name, factor):
    """The control."""
    model = randomise(FAMILIES[name]().build()).train()
    found = factor * kept_bytes(model, asked(model, TIME))
    assert model.ledger(TIME).activation_bytes * TIME != pytest.approx(found, rel=0.05)


def test_the_pattern_of_a_bias_that_learns_is_kept_and_grows_with_the_square():
    model = randomise(FAMILIES["t5_bias"]().build()).train()
    short, long = (model.ledger(length).activation_bytes for length in (TIME, 2 * TIME))
    heads = sum(block.mixes.heads for block in model.blocks())
    assert long - short == pytest.approx(4.0 * heads * TIME)
    assert long * 2 * TIME == pytest.approx(kept_bytes(model, asked(model, 2 * TIME)), rel=0.05)
