"""Multi-head latent attention against a naive one and `transformers`; both of its forms; what it keeps and costs."""

from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headspring.models import MLA, Block, Decoder, RoPE, YaRN, repeat
from headspring.models.context import Context
from headspring.models.mla import MLAModule
from tests.models.conftest import fill

WIDTH = 12
YARN = YaRN(factor=8.0, original_context=8, mscale=0.8, mscale_all_dim=1.3)
WIDE = MLA(heads=3, head_dim=10, rotary_dim=4, value_dim=6, latent=14, query_latent=9, bias=True)
NARROW = MLA(heads=4, head_dim=6, rotary_dim=2, latent=5, position=RoPE(theta=100.0, scaling=YARN))


def built(value: MLA) -> MLAModule:
    return fill(value.build(WIDTH))


def run(layer: MLAModule, x: torch.Tensor, past: int = 0, state=None) -> torch.Tensor:
    context = Context.of(x.shape[1], past, None, None, x.device)
    layer.prepare(context)
    return layer(x, context, state)


def inputs(rows: int, time: int) -> torch.Tensor:
    return torch.randn(rows, time, WIDTH, generator=torch.Generator().manual_seed(3))


def naive(layer: MLAModule, x: torch.Tensor) -> torch.Tensor:
    """One head and one query after another, from the definition."""
    value, (rows, time, _) = layer.value, x.shape
    still, turned = value.head_dim, value.rotary_dim
    queries = layer.q(x) if value.query_latent is None else layer.q_up(layer.q_norm(layer.q_down(x)))
    queries = queries.view(rows, time, value.heads, still + turned)
    latent, shared = layer.kv_norm(layer.kv_down(x)), layer.k_rotary(x)
    cos, sin = value.position.angles(torch.arange(time)[None], turned)

    def rotate(vector, t):
        a, b = vector[..., : turned // 2], vector[..., turned // 2 :]
        return torch.cat([a * cos[0, t] - b * sin[0, t], b * cos[0, t] + a * sin[0, t]], dim=-1)

    scale = (still + turned) ** -0.5
    if value.position.scaling is not None:
        scale *= (0.1 * 1.3 * torch.tensor(8.0).log().item() + 1) ** 2
    heads = torch.zeros(rows, time, value.heads, layer.value_dim)
    for h in range(value.heads):
        up = layer.k_up.weight[h * still : (h + 1) * still]
        down = layer.v_up.weight[h * layer.value_dim : (h + 1) * layer.value_dim]
        for t in range(time):
            scores = []
            for s in range(t + 1):
                content = (queries[:, t, h, :still] * (latent[:, s] @ up.T)).sum(-1)
                place = (rotate(queries[:, t, h, still:], t) * rotate(shared[:, s], s)).sum(-1)
                scores.append(scale * (content + place))
            pattern = torch.stack(scores, dim=-1).softmax(-1)
            heads[:, t, h] = (pattern[..., None] * (latent[:, : t + 1] @ down.T)).sum(1)
    return layer.out(heads.flatten(2))


@pytest.mark.parametrize("value", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("absorbs", [True, False])
@torch.no_grad()
def test_both_forms_are_the_definition(value, absorbs):
    layer, x = built(value), inputs(2, 9)
    expected = naive(layer, x)
    with patch.object(MLAModule, "absorbs", lambda self, queries, keys: absorbs):
        found = run(layer, x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        with patch.object(MLA, "score_scale", 0.3), pytest.raises(AssertionError):  # the planted bug
            torch.testing.assert_close(run(layer, x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_both_forms_have_the_same_gradients():
    found = []
    for absorbs in (True, False):
        layer = built(WIDE)
        with patch.object(MLAModule, "absorbs", lambda self, queries, keys, form=absorbs: form):
            run(layer, inputs(2, 9)).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("value", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (3, 9), (40, 40)])
@torch.no_grad()
def test_the_form_with_fewer_operations_is_taken(value, queries, keys):
    layer, flops = built(value), {}
    x = inputs(1, keys)
    for absorbs in (True, False):
        state = layer.new_state(1, keys, torch.float32, x.device)
        with patch.object(MLAModule, "absorbs", lambda self, queries, keys, form=absorbs: form):
            if keys > queries:
                run(layer, x[:, :-queries], 0, state)
            with FlopCounterMode(display=False) as counter:
                run(layer, x[:, -queries:], keys - queries, state)
        flops[absorbs] = counter.get_total_flops()
    assert layer.absorbs(queries, keys) == (flops[True] < flops[False])


def test_decoding_absorbs_and_training_does_not():
    deepseek = MLA(heads=128, head_dim=128, rotary_dim=64, latent=512, query_latent=1536)
    with torch.device("meta"):
        layer = deepseek.build(7168)
    assert layer.absorbs(1, 1000) and not layer.absorbs(1000, 1000)


def test_a_token_keeps_its_latent_and_its_rotary_key_and_no_more():
    block = Block(mixer=WIDE)
    model = Decoder(vocab=11, width=WIDTH, layers=repeat(2, block), context=16).build()
    state = model.new_state(3, 16)
    assert state.bytes == 2 * 3 * 16 * (14 + 4) * 4
    assert model.ledger(16).state_bytes * 3 * 16 == state.bytes / 2  # the ledger counts two bytes an element


@torch.no_grad()
def test_the_ledger_is_what_runs():
    layer, x = built(WIDE), inputs(1, 16)
    parts = {child.name: child for child in layer.cost("mixer", 16).children}
    with FlopCounterMode(display=False) as counter:
        run(layer, x)
    linear = sum(parts[name].flops for name in ("q_down", "q_up", "kv_down", "k_rotary", "k_up", "v_up", "out"))
    matrices = {"aten.mm", "aten.addmm"}
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in matrices)
    assert counted == linear * 16
    assert parts["pattern"].flops == 2 * 3 * (10 + 4 + 6) * 8.5  # a query sees 8.5 of 16 keys on average
    assert layer.cost("mixer", 16).parameters == sum(parameter.numel() for parameter in layer.parameters())
    # What runs works out hidden scores too, 16 keys for every query.
    assert counter.get_total_flops() - counted == parts["pattern"].flops / 8.5 * 16 * 16


@pytest.mark.parametrize("query_latent", [None, 9])
@torch.no_grad()
def test_equals_transformers(query_latent):
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    rope = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 8}
    rope |= {"mscale": 0.8, "mscale_all_dim": 1.3, "beta_fast": 32.0, "beta_slow": 1.0}
    config = theirs.DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=query_latent, kv_lora_rank=14,
        qk_rope_head_dim=4, qk_nope_head_dim=10, v_head_dim=6, rope_parameters=rope, attention_bias=True,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    module = fill(theirs.DeepseekV3Attention(config, layer_idx=0))
    position = RoPE(theta=100.0, scaling=YARN)
    value = MLA(
        heads=3, head_dim=10, rotary_dim=4, value_dim=6, latent=14, query_latent=query_latent, bias=True, position=position
    )  # fmt: skip
    layer, weights = value.build(WIDTH), dict(module.named_parameters())

    def halves(rows):  # neighbouring pairs → pairs of halves, in the last four rows of each head
        return torch.cat([rows[..., :-4, :], rows[..., -4::2, :], rows[..., -3::2, :]], dim=-2)

    down, bias = weights["kv_a_proj_with_mqa.weight"], weights["kv_a_proj_with_mqa.bias"]
    up = weights["kv_b_proj.weight"].view(3, 16, 14)
    found = {"kv_norm.weight": weights["kv_a_layernorm.weight"], "out.weight": weights["o_proj.weight"]}
    found |= {"kv_down.weight": down[:14], "k_rotary.weight": halves(down[14:]), "kv_down.bias": bias[:14]}
    found |= {"k_rotary.bias": halves(bias[14:, None])[:, 0], "out.bias": weights["o_proj.bias"]}
    found |= {"k_up.weight": up[:, :10].flatten(0, 1), "v_up.weight": up[:, 10:].flatten(0, 1)}
    query = weights["q_proj.weight" if query_latent is None else "q_b_proj.weight"]
    found["q.weight" if query_latent is None else "q_up.weight"] = halves(query.unflatten(0, (3, 14))).flatten(0, 1)
    if query_latent is not None:
        found |= {f"q_down.{part}": weights[f"q_a_proj.{part}"] for part in ("weight", "bias")}
        found["q_norm.weight"] = weights["q_a_layernorm.weight"]
    layer.load_state_dict(found)
    x = inputs(2, 20)
    rotary = theirs.DeepseekV3RotaryEmbedding(config)
    mask = torch.full((20, 20), float("-inf")).triu(1)[None, None]
    expected = module(x, rotary(x, torch.arange(20)[None]), mask)[0]
    torch.testing.assert_close(run(layer, x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
