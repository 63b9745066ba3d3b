"""`compare` finds the place and names the mistake, for each of the usual ones, planted."""

import pytest
import torch

from headspring.models import MLP, Attention, Block, Branch, Causal, Decoder, Embed, Head, RMSNorm, RoPE, SwiGLU, repeat
from headspring.models.comparison import compare, observe
from tests.models.conftest import randomise

TOKENS = torch.randint(0, 53, (2, 20), generator=torch.Generator().manual_seed(3))


def decoder(attention=None, feedforward=None, norm=None, **changes) -> Decoder:
    settings = {"heads": 4, "kv_heads": 2, "qk_norm": None, "bias": True, "mask": Causal(window=7)}
    norm = norm or RMSNorm(epsilon=1e-6)
    first = Block(mixer=Branch(f=Attention(**settings), pre=norm), feedforward=Branch(f=SwiGLU(hidden=40), pre=norm))
    mixer = Branch(f=Attention(**(settings | (attention or {}))), pre=norm)
    second = Block(mixer=mixer, feedforward=Branch(f=feedforward or MLP(hidden=40, activation="gelu", bias=True), pre=norm))
    return Decoder(**({"vocab": 53, "width": 24, "layers": (first, second), "norm": norm, "context": 64} | changes))


def built(value: Decoder, tensors=None):
    model = randomise(value.build())
    if tensors is not None:
        model.load_state_dict(tensors)
    return model.eval()


def judged(here, there):
    return compare(here, observe(there, TOKENS), TOKENS, there)


def test_a_model_equals_itself_and_every_place_is_compared():
    found = judged(built(decoder()), built(decoder()))
    assert found.place is None and found.error == 0.0 and found.equal > 40


SETTINGS = {
    "epsilon": (decoder(norm=RMSNorm(epsilon=1e-2)), "layers.0.mixer.pre", "epsilon is 0.01, and 1e-06 here"),
    "plus_one": (decoder(norm=RMSNorm(plus_one=True)), "layers.0.mixer.pre", "plus_one is True, and False here"),
    "window_less": (decoder(attention={"mask": Causal(window=6)}), "layers.1.mixer.pattern", "window is 6, and 7 here"),
    "window_more": (decoder(attention={"mask": Causal(window=8)}), "layers.1.mixer.pattern", "window is 8, and 7 here"),
    "scale": (decoder(attention={"scale": 1.0}), "layers.1.mixer.pattern", "scale is 1, and 0.408248 here"),
    "softcap": (decoder(attention={"softcap": 1.0}), "layers.1.mixer.pattern", "softcap is 1, and none here"),
    "theta": (decoder(attention={"position": RoPE(theta=5e5)}), "layers.1.mixer.q", "theta is 500000, and 10000 here"),
    "embedding_scale": (decoder(embed=Embed(scale=24**0.5)), "embed", "embed.scale is 4.89898, and none here"),
    "activation": (
        decoder(feedforward=MLP(hidden=40, activation="gelu_tanh", bias=True)),
        "layers.1.mlp.act",
        "activation is gelu_tanh, and gelu here",
    ),
    "logit_softcap": (decoder(head=Head(softcap=3.0)), "logits", "head.softcap is 3, and none here"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SETTINGS)
def test_a_setting_is_named_with_both_values(fault):
    value, place, cause = SETTINGS[fault]
    here = built(decoder())
    there = built(value, here.state_dict())
    found = judged(here, there)
    assert found.place == place and any(cause in text for text in found.causes), found


@pytest.mark.parametrize("fault", ["plus_one", "window_less", "window_more", "scale", "theta", "embedding_scale", "activation"])
def test_a_setting_is_found_without_the_other_config(fault):
    """Where only activations are known (a reference of another library), the usual values are tried."""
    value, place, cause = SETTINGS[fault]
    here = built(decoder())
    there = built(value, here.state_dict())
    found = compare(here, observe(there, TOKENS), TOKENS)
    wanted = cause.partition(", and ")[0].rpartition(" is ")
    assert found.place == place and any(f"{wanted[0]} seems to be {wanted[2]}" in text for text in found.causes), found


def planted(change):
    here = built(decoder())
    tensors = {name: tensor.clone() for name, tensor in here.state_dict().items()}
    change(tensors)
    return here, built(here.config, tensors)


LAYER = "layers.1.mixer.f."


def pairing(tensors):
    for x, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            rows = tensors[f"{LAYER}{x}.{kind}"]
            tensors[f"{LAYER}{x}.{kind}"] = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def fused_order(tensors):
    for kind in ("weight", "bias"):
        fused = torch.cat([tensors[f"{LAYER}{x}.{kind}"] for x in "kqv"])
        for x, rows in zip("qkv", fused.split([24, 12, 12])):
            tensors[f"{LAYER}{x}.{kind}"] = rows


def fused_groups(tensors):
    for kind in ("weight", "bias"):
        groups = [tensors[f"{LAYER}{x}.{kind}"].unflatten(0, (2, -1)) for x in "qkv"]
        for x, rows in zip("qkv", torch.cat(groups, dim=1).flatten(0, 1).split([24, 12, 12])):
            tensors[f"{LAYER}{x}.{kind}"] = rows


TENSORS = {
    "pairing": (pairing, "layers.1.mixer.f.q", "rotary pairs of q and k are neighbours"),
    "order": (fused_order, "layers.1.mixer.f.q", "the fused matrix is cut as [k, q, v]"),
    "groups": (fused_groups, "layers.1.mixer.f.q", "the fused matrix is cut as [q, k, v], in 2 groups"),
    "bias": (lambda t: t[LAYER + "k.bias"].zero_(), "layers.1.mixer.f.k", "k.bias is missing"),
    "transposed": (lambda t: t[LAYER + "out.weight"].t_(), "layers.1.mixer.f.out", "out.weight is transposed"),
    "minus_one": (lambda t: t["layers.1.feedforward.pre.weight"].sub_(1), "layers.1.feedforward.pre", "stored minus one"),
}


@pytest.mark.parametrize("fault", TENSORS)
@torch.no_grad()
def test_a_tensor_laid_otherwise_is_named(fault):
    change, place, cause = TENSORS[fault]
    found = judged(*planted(change))
    assert found.place == place and any(cause in text for text in found.causes), found


@torch.no_grad()
def test_what_no_hypothesis_explains_is_said_to_be_so():
    """The control: noise in a matrix has a place and no cause."""
    found = judged(*planted(lambda tensors: tensors[LAYER + "v.weight"].add_(torch.randn(12, 24))))
    assert found.place == "layers.1.mixer.f.v" and found.causes == () and found.tried > 10


def test_layers_that_are_missing_or_wider():
    small = built(decoder())
    other = built(decoder(layers=repeat(3, decoder().layers[0])))
    assert judged(small, other).place is not None
    wide = built(decoder(width=32, layers=repeat(2, decoder().layers[0])))
    found = judged(small, wide)
    assert found.error == float("inf") and found.place == "embed"
