"""Mixtures of experts against a loop over tokens, against `transformers`, and in what they cost and drop."""

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from headspring.artifacts import UserError
from headspring.models import Attention, Block, expert_matrices, kernels, moe
from headspring.models.grouped import collect, grouped_linear
from headspring.models.initialisation import FanIn
from headspring.models.moe import Clamp, MoE
from headspring.models.routing import SigmoidRouter, SoftmaxRouter, within_capacity
from tests.models.conftest import fill, small_decoder

WIDTH = 12
CASES = {
    "mixtral": MoE(experts=5, top=2, hidden=20),
    "qwen2": MoE(experts=6, top=3, hidden=10, router=SoftmaxRouter(renormalise=False), shared=14, shared_gate=True),
    "switch": MoE(experts=4, top=1, hidden=20, router=SoftmaxRouter(renormalise=False)),
    "deepseek": MoE(experts=8, top=3, hidden=10, router=SigmoidRouter(groups=4, top_groups=2, scale=2.5), shared=14),
    "gpt_oss": MoE(experts=4, top=2, hidden=20, router=SoftmaxRouter(bias=True), bias=True, clamp=Clamp(limit=1.0)),
    "all": MoE(experts=3, top=3, hidden=20),
}


def built(value: MoE, seed: int = 0) -> moe.MoEModule:
    layer = fill(value.build(WIDTH), seed)
    if layer.router.correction is not None:
        layer.router.correction.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(seed + 1))
    return layer


def inputs(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


# ---- the reference: one token after another, in float64, as the papers say it


def chosen_and_weights(value: MoE, router, x: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """The experts of one token x (D,) and their weights, by sorting lists."""
    logits = router.weight.double() @ x + (0.0 if router.bias is None else router.bias.double())
    sigmoid = isinstance(value.router, SigmoidRouter)
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    wanted = (scores if router.correction is None else scores + router.correction.double()).tolist()
    candidates = list(range(value.experts))
    if sigmoid:
        size = value.experts // value.router.groups
        groups = [candidates[start : start + size] for start in range(0, value.experts, size)]
        groups.sort(key=lambda group: sum(sorted((wanted[e] for e in group), reverse=True)[:2]), reverse=True)
        candidates = [e for group in groups[: value.router.top_groups] for e in group]
    best = sorted(candidates, key=lambda e: wanted[e], reverse=True)[: value.top]
    weights = scores[best]
    if value.router.renormalise:
        weights = weights / weights.sum()
    return best, weights * getattr(value.router, "scale", 1.0)


def expert(value: MoE, layer: moe.MoEModule, e: int, x: torch.Tensor) -> torch.Tensor:
    weights = layer.experts
    gate, up = weights.gate[e].double() @ x, weights.up[e].double() @ x
    if value.bias:
        gate, up = gate + weights.gate_bias[e].double(), up + weights.up_bias[e].double()
    if value.clamp is None:
        act = gate * gate.sigmoid() * up
    else:
        gate, up = gate.clamp(max=value.clamp.limit), up.clamp(-value.clamp.limit, value.clamp.limit)
        act = gate * torch.sigmoid(value.clamp.alpha * gate) * (up + 1)
    y = weights.out[e].double() @ act
    return y + weights.out_bias[e].double() if value.bias else y


def by_token(value: MoE, layer: moe.MoEModule, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in x.double().flatten(0, 1):
        best, weights = chosen_and_weights(value, layer.router, row)
        y = sum(weight * expert(value, layer, e, row) for e, weight in zip(best, weights, strict=True))
        if value.shared is not None:
            shared = layer.shared
            gate, up = shared.gate.weight.double() @ row, shared.up.weight.double() @ row
            part = shared.out.weight.double() @ (gate * gate.sigmoid() * up)
            y = y + (part if layer.shared_gate is None else (layer.shared_gate.weight.double() @ row).sigmoid() * part)
        rows.append(y)
    return torch.stack(rows).view_as(x)


def gradients(layer, x, forward) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    (forward(x).double() * weights).sum().backward()
    return {"x": x.grad, **{name: parameter.grad.clone() for name, parameter in layer.named_parameters()}}


def assert_equals_the_reference(value: MoE) -> None:
    layer, x = built(value), inputs(2, 9)
    expected = by_token(value, layer, x).detach()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    expected_gradients = gradients(layer, x, lambda x: by_token(value, layer, x))
    for name, found in gradients(layer, x, layer).items():
        wanted = expected_gradients[name]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_loop_over_tokens(name):
    assert_equals_the_reference(CASES[name])


def unsorted(rows, weights, layout):
    return collect(rows, weights, replace(layout, row_of_pair=torch.arange(len(layout.row_of_pair))))


def experts_off_by_one(x, weights, biases, ends):
    return grouped_linear(x, [weight.roll(1, 0) for weight in weights], biases, ends)


@pytest.mark.parametrize(("name", "bug"), [("collect", unsorted), ("grouped_linear", experts_off_by_one)])
def test_the_reference_sees_a_bug(name, bug):
    with patch.object(moe, name, bug), pytest.raises(AssertionError):
        assert_equals_the_reference(CASES["mixtral"])


@torch.no_grad()
def test_bfloat16_is_near():
    layer, x = built(CASES["qwen2"]), inputs(2, 9)
    found, expected = layer(x.bfloat16()), layer(x.bfloat16().float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@torch.no_grad()
def test_a_decoding_step_touches_only_the_experts_it_chose():
    layer, x = built(CASES["mixtral"]), inputs(1, 1)
    chosen = layer.router.route(layer.router(x)).chosen.flatten().tolist()
    expected = layer(x)
    for parameter in layer.experts.parameters():
        for e in set(range(5)) - set(chosen):
            parameter[e] = float("nan")
    assert torch.equal(layer(x), expected)
    parameter[chosen[0]] = float("nan")
    assert layer(x).isnan().any()


# ---- bfloat16 through native products: one row, one result


BITWISE = pytest.mark.skipif(
    not kernels.multiplies_natively(torch.zeros(1, dtype=torch.bfloat16)), reason="no native products on this machine"
)


def rows_alone_and_together(layer: moe.MoEModule, x: torch.Tensor) -> bool:
    """Whether each row of x (1, T, D) has the same bits alone, beside others and where gradients are wanted."""
    with torch.no_grad():
        together, halves = layer(x), torch.cat([layer(x[:, :5]), layer(x[:, 5:])], dim=1)
        alone = torch.cat([layer(row) for row in x.split(1, dim=1)], dim=1)
    learning = layer(x.clone().requires_grad_()).detach()
    return all(torch.equal(together, other) for other in (halves, alone, learning))


@BITWISE
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_has_the_same_bits_in_every_batch(name, packed):
    layer, x = built(CASES[name]), inputs(1, 70).bfloat16()
    if packed:
        layer.experts.requires_grad_(False).pack()
    assert rows_alone_and_together(layer, x)


@BITWISE
def test_a_product_that_depends_on_the_rows_is_seen():
    real = expert_matrices.kernels.product

    def product(x, *rest, **options):
        y = real(x, *rest, **options)
        return y.mul_(1 + 2**-7) if len(x) > 20 else y

    with patch.object(expert_matrices.kernels, "product", product):
        assert not rows_alone_and_together(built(CASES["mixtral"]), inputs(1, 70).bfloat16())


@BITWISE
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek"])
def test_native_gradients_are_those_of_float32(name):
    value = CASES[name].model_copy(update={"hidden": 32})
    layer, x = built(value), inputs(2, 40).bfloat16()
    found, wanted = (gradients(layer, each, layer) for each in (x, x.float()))
    for key in found:
        difference = (found[key].float() - wanted[key]).norm() / wanted[key].norm()
        assert difference < 0.05, f"{key}: {difference}"  # a clamped number has no gradient, and some pass the clamp by a bit


@BITWISE
def test_packed_experts_follow_their_weights_and_learn():
    layer, x = built(CASES["mixtral"]), inputs(1, 9).bfloat16()
    with torch.no_grad():
        layer.experts.pack()
        before = layer(x)
        layer.experts.gate.mul_(2)
        layer.experts.pack()
        assert not torch.equal(layer(x), before)
    layer(x).sum().backward()
    assert layer.experts.packed_experts is None and layer.experts.gate.grad is not None
    layer.experts.pack("int8")
    with pytest.raises(UserError, match="cannot be trained"):
        layer(x)


# ---- transformers


def theirs(name: str):
    """Their block with random weights, and ours with the same."""
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

    common = {"hidden_size": WIDTH, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    qwen = common | {"num_experts": 5, "moe_intermediate_size": 20}
    if name == "mixtral":
        config = mixtral.MixtralConfig(**common, num_local_experts=5, intermediate_size=20)
        return mixtral.MixtralSparseMoeBlock(config), MoE(experts=5, top=2, hidden=20)
    if name.startswith("qwen3"):
        normed = name.endswith("normed")
        config = qwen3.Qwen3MoeConfig(**qwen, norm_topk_prob=normed)
        return qwen3.Qwen3MoeSparseMoeBlock(config), MoE(experts=5, top=2, hidden=20, router=SoftmaxRouter(renormalise=normed))
    if name == "qwen2":
        config = qwen2.Qwen2MoeConfig(**qwen, shared_expert_intermediate_size=14)
        value = MoE(experts=5, top=2, hidden=20, router=SoftmaxRouter(renormalise=False), shared=14, shared_gate=True)
        return qwen2.Qwen2MoeSparseMoeBlock(config), value
    if name == "deepseek":
        groups = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
        config = deepseek.DeepseekV3Config(
            **common | {"num_experts_per_tok": 3}, n_routed_experts=8, moe_intermediate_size=10, **groups
        )
        router = SigmoidRouter(groups=4, top_groups=2, scale=2.5)
        return deepseek.DeepseekV3MoE(config), MoE(experts=8, top=3, hidden=10, router=router, shared=20)
    config = gpt_oss.GptOssConfig(**common, num_local_experts=4, intermediate_size=20)
    return gpt_oss.GptOssMLP(config), MoE(
        experts=4, top=2, hidden=20, router=SoftmaxRouter(bias=True), bias=True, clamp=Clamp()
    )


def copied(block, value: MoE) -> moe.MoEModule:
    """Ours, with the weights of `block`."""
    weights, layer = {**dict(block.named_parameters()), **dict(block.named_buffers())}, value.build(WIDTH)
    router = next(part for part in ("gate", "router") if hasattr(block, part))
    found = {"router.weight": weights[f"{router}.weight"]}
    fused, out = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    if value.clamp is not None:
        fused, out = fused.mT, out.mT
        found |= {"experts.gate": fused[:, ::2], "experts.up": fused[:, 1::2], "router.bias": weights["router.bias"]}
        bias = weights["experts.gate_up_proj_bias"]
        found |= {"experts.gate_bias": bias[:, ::2], "experts.up_bias": bias[:, 1::2]}
        found["experts.out_bias"] = weights["experts.down_proj_bias"]
    else:
        found["experts.gate"], found["experts.up"] = fused.chunk(2, dim=1)
    found["experts.out"] = out
    if layer.router.correction is not None:
        found["router.correction"] = weights["gate.e_score_correction_bias"]
    for part in ("shared_expert", "shared_experts"):
        if hasattr(block, part):
            found |= {f"shared.{x}.weight": weights[f"{part}.{x}_proj.weight"] for x in ("gate", "up")}
            found["shared.out.weight"] = weights[f"{part}.down_proj.weight"]
    if layer.shared_gate is not None:
        found["shared_gate.weight"] = weights["shared_expert_gate.weight"]
    layer.load_state_dict(found)
    return layer


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "qwen3_normed", "qwen2", "deepseek", "gpt_oss"])
@torch.no_grad()
def test_equals_transformers(name):
    block, value = theirs(name)
    generator = torch.Generator().manual_seed(7)
    for tensor in itertools.chain(block.parameters(), block.buffers()):
        tensor.normal_(0.0, 0.4, generator=generator)
    x = 3 * inputs(3, 11)  # far enough out for the clamp to act
    expected = block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = copied(block, value)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# ---- capacity


def test_an_expert_takes_the_first_tokens_of_a_row_up_to_its_capacity():
    chosen = torch.tensor([[[0], [0], [1], [0], [0]], [[1], [1], [1], [1], [0]]])
    kept = within_capacity(chosen, experts=2, factor=0.8)  # ceil(0.8 · 5 · 1 / 2) = 2 tokens
    assert kept[..., 0].tolist() == [[True, True, True, False, False], [True, True, False, False, True]]


def test_what_is_dropped_passes_by_and_only_in_training():
    value = CASES["switch"].model_copy(update={"capacity": 0.5})
    layer, x = built(value), inputs(2, 8)
    free = built(CASES["switch"])
    kept = within_capacity(layer.router.route(layer.router(x)).chosen, 4, 0.5)[..., 0]
    assert 0 < int(kept.sum()) < kept.numel()
    learned = layer.train()(x)
    assert learned[~kept].count_nonzero() == 0
    torch.testing.assert_close(learned[kept], free(x)[kept])
    with torch.no_grad():  # a validation in the middle of training
        assert torch.equal(layer(x), free(x))
    assert torch.equal(layer.eval()(x), free(x))


def test_capacity_lets_neither_rows_nor_later_tokens_decide():
    value = CASES["mixtral"].model_copy(update={"capacity": 0.6})
    layer, x = built(value).train(), inputs(3, 10)
    together = layer(x)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], layer(x[row : row + 1]))
    other = torch.cat([x[:, :6], inputs(3, 4, seed=5)], dim=1)
    torch.testing.assert_close(layer(other)[:, :6], together[:, :6])


# ---- what it costs, and what cannot be


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_is_what_runs(name):
    layer, tokens = built(CASES[name]).eval(), 16
    cost = layer.cost("mlp")
    assert cost.parameters == sum(parameter.numel() for parameter in layer.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(inputs(1, tokens))
    activation = 5.0 * CASES[name].top * CASES[name].hidden + 5.0 * (CASES[name].shared or 0)
    assert counter.get_total_flops() / tokens == cost.flops - activation


def test_active_parameters_are_those_of_the_chosen_experts():
    one = 3 * WIDTH * 20
    cost = CASES["mixtral"].build(WIDTH).cost("mlp")
    assert cost.parameters - cost.active_parameters == 3 * one
    assert cost.active_parameters == 2 * one + 5 * WIDTH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": 6}, "top (6) is more than experts (5)"),
        ({"shared_gate": True}, "give its width as shared"),
        ({"router": SigmoidRouter(groups=2)}, "experts (5) must be a multiple of groups (2)"),
        ({"experts": 8, "top": 5, "router": SigmoidRouter(groups=4, top_groups=2)}, "cannot come from 2 of 4 groups of 2"),
        ({"experts": 4, "router": SigmoidRouter(groups=4, top_groups=2)}, "two best experts"),
        ({"router": {"kind": "softmx"}}, "the nearest are: softmax"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValidationError) as error:
        MoE(**({"experts": 5, "top": 2, "hidden": 20} | change))
    assert message in str(error.value)


def test_the_drawing_says_what_a_token_uses():
    model = small_decoder(layers=(Block(mixer=Attention(heads=2), feedforward=CASES["mixtral"]),)).build()
    assert f"a token uses {model.num_parameters() - 3 * 3 * 32 * 20:,} of the parameters" in repr(model)
    assert "2 of 5 experts of 20" in repr(model) and "a token uses" not in repr(small_decoder().build())


def test_experts_start_as_the_model_says():
    block = Block(mixer=Attention(heads=2), feedforward=MoE(experts=64, top=2, hidden=50))
    for init, spread in (({}, 0.0), ({"init": FanIn()}, (50 * 4) ** -0.5)):  # two layers have four branches
        layer = small_decoder(layers=(block, block), **init).build().layers[0].feedforward.f
        assert float(layer.experts.gate.detach().std()) == pytest.approx(32**-0.5, rel=0.02)
        assert float(layer.experts.out.detach().std()) == pytest.approx(spread, rel=0.02)
