"""How weights start: each `Init` gives the spreads it states, and μP keeps its promise about width."""

import math

import pytest
import torch

from headspring.data.batch import Batch
from headspring.models import (
    GPT2,
    MLP,
    Attention,
    Block,
    Decoder,
    DeepNorm,
    Encoder,
    FanIn,
    Full,
    MuP,
    ZeroOutput,
    deepnorm,
    mup,
    repeat,
)
from headspring.training.objective import NextToken
from headspring.training.optimizers import AdamW, Muon, build_optimizers

WIDTH, DEPTH = 128, 4


def decoder(width: int = WIDTH, **changes) -> Decoder:
    block = Block(mixer=Attention(heads=4, qk_norm=None), feedforward=MLP(hidden=4 * width, activation="relu"))
    return Decoder(**({"vocab": 97, "width": width, "layers": repeat(DEPTH, block), "context": 32} | changes))


def spreads(config: Decoder) -> dict[str, float]:
    """Parameter → its standard deviation times the root of what it reads, in the last layer; the embedding's as it is."""
    model = config.build()
    names = {"q": "mixer.f.q", "v": "mixer.f.v", "out": "mixer.f.out", "up": "feedforward.f.up", "down": "feedforward.f.out"}
    weights = {short: model.get_parameter(f"layers.{DEPTH - 1}.{name}.weight") for short, name in names.items()}
    found = {short: float(weight.detach().std()) * weight.shape[1] ** 0.5 for short, weight in weights.items()}
    return found | {"embed": float(model.embed.weight.detach().std())}


def xavier(rows_by_columns: float) -> float:
    """√(2 / (m + n)) · √n for an (m, n) matrix of m / n."""
    return math.sqrt(2 / (1 + rows_by_columns))


BETA = (4 * 2 * DEPTH) ** -0.25
TABLE = [
    (ZeroOutput(), {"q": 1.0, "v": 1.0, "out": 0.0, "up": 1.0, "down": 0.0, "embed": 0.02}),
    (FanIn(), {"q": 1.0, "v": 1.0, "out": 8**-0.5, "up": 1.0, "down": 8**-0.5, "embed": 0.02}),
    (MuP(base_width=WIDTH), {"q": 1.0, "v": 1.0, "out": 8**-0.5, "up": 1.0, "down": 8**-0.5, "embed": 0.02}),
    (GPT2(std=0.03), {"q": 0.03 * 128**0.5, "v": 0.03 * 128**0.5, "out": 0.03 * 16**0.5, "up": 0.03 * 128**0.5,
                      "down": 0.03 * 64**0.5, "embed": 0.03}),
    (DeepNorm(), {"q": 1.0, "v": BETA, "out": BETA, "up": BETA * xavier(4), "down": BETA * xavier(0.25), "embed": 0.02}),
]  # fmt: skip


@pytest.mark.parametrize(("init", "expected"), TABLE, ids=lambda x: getattr(x, "kind", ""))
def test_spreads_are_the_stated_ones(init, expected):
    layers = deepnorm(decoder().layers) if init.kind == "deepnorm" else decoder().layers
    assert spreads(decoder(init=init, layers=layers)) == pytest.approx(expected, rel=0.03)


def test_what_starts_in_its_own_way_keeps_it():
    model = decoder(init=GPT2(), layers=repeat(1, Block(mixer=Attention(bias=True), feedforward=None))).build()
    assert model.layers[0].mixer.f.q.bias.count_nonzero() == 0 and (model.norm.weight == 1).all()


def test_deepnorm_multiplies_the_stream():
    model = decoder(layers=deepnorm(decoder().layers), init=DeepNorm(), norm=None).build()
    branch = model.layers[0].feedforward
    assert branch.skip == pytest.approx(8**0.25) and branch.pre is None
    x, y = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    assert torch.allclose(branch.combine(x, y), torch.nn.functional.layer_norm(8**0.25 * x + y, (WIDTH,)), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"init": DeepNorm()}, r"skip: 1\.6818"), ({"init": MuP(base_width=64)}, "needs head.scale; see mup")],
)
def test_a_start_for_another_model_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decoder(**changes)


# ---- width (the coordinate test of arXiv 2203.03466, appendix D.1)


def moved(config: Decoder, steps: int = 4, rate: float = 3e-3) -> dict[str, float]:
    """Mean size of what `steps` steps of Adam change in activations and logits."""
    model, objective = config.build(seed=1), NextToken()
    tokens = torch.randint(0, 97, (8, 17), generator=torch.Generator().manual_seed(0))
    batch, sites = Batch(tokens[:, :-1], tokens[:, 1:]), ["layers.1.mixer.out", f"layers.{DEPTH - 1}.residual.post"]
    (adam,) = build_optimizers(model, AdamW(learning_rate=rate, weight_decay=0.0))

    @torch.no_grad()
    def activations() -> dict[str, torch.Tensor]:
        with model.sites.capture(sites) as seen:
            logits = model.logits(model(batch.inputs))
        return seen | {"logits": logits}

    before = activations()
    for _ in range(steps):
        loss, _ = objective.loss(model, batch)
        (loss / objective.count(batch)).backward()
        adam.step()
        adam.zero_grad()
    return {name: float((after - before[name]).abs().mean()) for name, after in activations().items()}


def test_activations_move_alike_at_every_width_under_mup_and_grow_without():
    """Sixteen times wider: under μP everything moves by less than 1.5 times as much (or as little; measured 1.34 at most),
    and in the standard parametrisation by more than 4 times (measured 6.3 to 9.2)."""
    narrow = moved(decoder(32, init=FanIn()))
    assert narrow == pytest.approx(moved(mup(decoder(32), base_width=32, base_head_dim=8)))  # at the base width, the same
    wide, standard = moved(mup(decoder(512), base_width=32, base_head_dim=8)), moved(decoder(512, init=FanIn()))
    for name, size in narrow.items():
        assert 1 / 1.5 < wide[name] / size < 1.5, name
        assert standard[name] / size > 4, name


def test_rates_follow_the_width():
    model = mup(decoder(256), base_width=64, base_head_dim=16).build()
    assert model.layers[0].mixer.f.value.scale == pytest.approx(16**0.5 / 64) and model.config.head.scale == 0.25
    (adam,) = build_optimizers(model, AdamW(learning_rate=0.01, weight_decay=0.1))
    by_rate = {group["lr"]: group for group in adam.param_groups if group["weight_decay"]}
    assert set(by_rate) == {0.01, 0.0025}
    assert by_rate[0.0025]["weight_decay"] == pytest.approx(0.4)  # rate · decay is that of the base width
    assert {id(p) for p in by_rate[0.01]["params"]} == {id(model.embed.weight)}
    _, muon = build_optimizers(model, Muon(learning_rate=0.02))
    assert {group["lr"] for group in muon.param_groups} == {0.02}


def test_a_model_without_logits_can_be_mup():
    layers = repeat(1, Block(mixer=Attention(heads=4, mask=Full()), feedforward=MLP(hidden=64)))
    model = mup(Encoder(vocab=97, width=64, layers=layers, head=None), base_width=32)
    assert model.head is None and Encoder.model_validate_json(model.model_dump_json()) == model
    rules = model.build().rules_by_name
    assert rules["layers.0.mixer.f.q.weight"].rate == 0.5 and rules["embed.weight"].rate == 1.0
