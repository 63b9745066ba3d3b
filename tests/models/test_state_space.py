"""Mixers with recurrences against their papers, token by token; what they hold and cost; what is refused."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import elu, gelu, silu, softmax, softplus
from torch.utils.flop_counter import FlopCounterMode
from transformers import RecurrentGemmaConfig
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from headspring.models import EluPlusOne, Favor, GatedDelta, GatedLinear, LinearAttention, Mamba, Mamba2
from headspring.models.chunked import delta
from headspring.models.context import Context
from headspring.models.convolution import CausalConvolution
from headspring.models.families import FAMILIES
from headspring.models.kernels import installed
from headspring.models.linear_attention import FavorModule, orthogonal_directions, running_max
from tests.models import parity, recurrences

WIDTH, ROWS, TIME = 12, 2, 21
SEGMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 15, [0] * 21])


def context(time: int, segments: torch.Tensor | None = None) -> Context:
    return Context.of(time, 0, segments, None, torch.device("cpu"))


@pytest.fixture(params=[None, SEGMENTS], ids=["whole", "packed"])
def setting(request):
    torch.manual_seed(0)
    made = context(TIME, request.param)
    starts = torch.zeros(ROWS, TIME, dtype=torch.bool) if made.starts is None else made.starts
    return torch.randn(ROWS, TIME, WIDTH), made, starts


def randomise(module):
    parity.randomise(module, seed=0)
    return module


def close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


# ---- each mixer as its paper writes it


@torch.no_grad()
def test_convolution(setting):
    x, made, starts = setting
    convolution = randomise(CausalConvolution(WIDTH, 4))
    close(convolution(x, made)[0], recurrences.convolution(x, convolution.weight, convolution.bias, starts))


@torch.no_grad()
def test_mamba(setting):
    x, made, starts = setting
    m = randomise(Mamba(state=3, rank=2).build(WIDTH))
    inner, z = m.in_proj(x).chunk(2, dim=-1)
    inner = silu(recurrences.convolution(inner, m.conv.weight, m.conv.bias, starts))
    rank, b, c = m.x_proj(inner).split([2, 3, 3], dim=-1)
    step = softplus(rank @ m.dt_proj.weight.T + m.dt_proj.bias)
    y, _ = recurrences.selective(inner, step, -m.A_log.exp(), b, c, torch.zeros(ROWS, 24, 3), starts)
    close(m(x, made), m.out((y + m.D * inner) * silu(z)))


@torch.no_grad()
def test_mamba2(setting):
    x, made, starts = setting
    m = randomise(Mamba2(state=3, head_dim=6, groups=2, chunk=8).build(WIDTH))
    z, mixed, step = m.in_proj(x).split([24, 24 + 12, 4], dim=-1)
    mixed = silu(recurrences.convolution(mixed, m.conv.weight, m.conv.bias, starts))
    inner, b, c = mixed.split([24, 6, 6], dim=-1)
    inner, b, c = inner.unflatten(-1, (4, 6)), b.unflatten(-1, (2, 3)), c.unflatten(-1, (2, 3))
    step = softplus(step + m.dt_bias)
    written, fade = step[..., None] * inner, step * -m.A_log.exp()
    y, _ = recurrences.matrix(c, b, written, fade, torch.zeros(ROWS, 4, 3, 6), starts)
    y = ((y + m.D[:, None] * inner).flatten(-2) * silu(z)).unflatten(-1, (2, 12))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(m(x, made), m.out(y.flatten(-2) * m.norm.weight))


@torch.no_grad()
def test_linear_attention_is_a_normalised_sum_over_the_past(setting):
    """In float64, and as the quadratic form that has no state at all."""
    x, made, starts = setting
    m = randomise(LinearAttention(heads=3, chunk=8).build(WIDTH)).double()
    x = x.double()
    q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (m.q, m.k, m.v))
    scores = (elu(q) + 1) @ (elu(k) + 1).mT * same_document(starts)
    y = scores @ v / scores.sum(-1, keepdim=True)
    close(m(x, made), m.out(y.transpose(1, 2).flatten(-2)), 1e-10)


def same_document(starts):
    document = starts.cumsum(1)
    return (torch.ones(TIME, TIME).tril() * (document[:, :, None] == document[:, None, :])).unsqueeze(1)


@torch.no_grad()
def test_favor_is_the_formula_without_any_peak(setting):
    x, made, starts = setting
    m = randomise(LinearAttention(heads=3, features=Favor(count=7, seed=5), chunk=8).build(WIDTH)).double()
    x = x.double()
    q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (m.q, m.k, m.v))
    omega = orthogonal_directions(7, 4, 5).double()
    phi = lambda s: torch.exp(s @ omega.T / 4**0.25 - s.square().sum(-1, keepdim=True) / 2 / 2) / math.sqrt(7)
    scores = phi(q) @ phi(k).mT * same_document(starts)
    y = scores @ v / scores.sum(-1, keepdim=True)
    close(m(x, made), m.out(y.transpose(1, 2).flatten(-2)), 1e-10)


@torch.no_grad()
def test_gated_delta(setting):
    x, made, starts = setting
    m = randomise(GatedDelta(heads=3, head_dim=4, value_dim=5, chunk=8).build(WIDTH))
    mixed = torch.cat([m.q(x), m.k(x), m.v(x)], dim=-1)
    mixed = silu(recurrences.convolution(mixed, m.conv.weight, 0.0, starts))
    q, k, v = (part.unflatten(-1, (3, -1)) for part in mixed.split([12, 12, 15], dim=-1))
    q, k = (s / (s.square().sum(-1, keepdim=True) + 1e-6).sqrt() for s in (q, k))
    fade, beta = -m.A_log.exp() * softplus(m.a(x) + m.dt_bias), torch.sigmoid(m.b(x))
    y, _ = recurrences.matrix(q / 2, k, v, fade, torch.zeros(ROWS, 3, 4, 5), starts, beta)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight * silu(m.gate(x).unflatten(-1, (3, 5)))
    close(m(x, made), m.out(y.flatten(-2)))


@torch.no_grad()
def test_gated_linear(setting):
    x, made, starts = setting
    m = randomise(GatedLinear(hidden=15, blocks=3).build(WIDTH))
    inner = recurrences.convolution(m.x_proj(x), m.conv.weight, m.conv.bias, starts)
    whole = lambda gate: torch.sigmoid(inner @ torch.block_diag(*gate.weight) + gate.bias.flatten())
    a = torch.exp(-8 * whole(m.recurrence_gate) * softplus(m.forgetting))
    first = starts.clone()
    first[:, 0] = True
    size = torch.where(first[..., None], 1.0, (1 - a.square()).sqrt())
    h = recurrences.linear(a * ~first[..., None], size * whole(m.input_gate) * inner, torch.zeros(ROWS, 15))
    close(m(x, made), m.out(gelu(m.gate(x), approximate="tanh") * h))


# ---- as others compute it


@torch.no_grad()
def test_gated_linear_is_the_block_of_recurrent_gemma():
    sizes = {"hidden_size": WIDTH, "lru_width": 15, "num_attention_heads": 3, "conv1d_width": 4}
    config = RecurrentGemmaConfig(**sizes, hidden_activation="gelu_pytorch_tanh")
    theirs = randomise(RecurrentGemmaRecurrentBlock(config, 0))
    ours = GatedLinear(hidden=15, blocks=3).build(WIDTH)
    names = {
        "gate": "linear_y", "x_proj": "linear_x", "out": "linear_out", "conv": "conv_1d",
        "input_gate.weight": "rg_lru.input_gate_weight", "input_gate.bias": "rg_lru.input_gate_bias",
        "recurrence_gate.weight": "rg_lru.recurrent_gate_weight", "recurrence_gate.bias": "rg_lru.recurrent_gate_bias",
        "forgetting": "rg_lru.recurrent_param",
    }  # fmt: skip
    stored = theirs.state_dict()
    ours.load_state_dict({
        name: stored[names[name] if name in names else f"{names[name.split('.')[0]]}.{name.split('.')[1]}"]
        for name in ours.state_dict()
    })  # fmt: skip
    x, positions = torch.randn(ROWS, TIME, WIDTH), torch.arange(TIME).expand(ROWS, TIME)
    expected, _ = theirs(x, positions, None, use_cache=False)
    close(ours(x, context(TIME)), expected)


@torch.no_grad()
def test_delta_is_the_rule_of_qwen3_next():
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 70, 3, 4),
        torch.nn.functional.normalize(torch.randn(2, 70, 3, 4), dim=-1),
        torch.randn(2, 70, 3, 5),
    )
    fade, beta, initial = -torch.rand(2, 70, 3), torch.rand(2, 70, 3), torch.randn(2, 3, 4, 5)
    expected, last = torch_recurrent_gated_delta_rule(q, k, v, fade, beta, initial, True)
    y, memory = delta(q / 2, k, v, fade, beta, initial)
    close(y, expected)
    close(memory, last)


# ---- what the names promise


def test_a_key_that_is_written_twice_holds_the_last_value():
    """The delta rule, without decay and with β = 1; a plain sum, as linear attention keeps, holds both."""
    key = torch.tensor([0.6, 0.8]).expand(1, 2, 1, 2)
    values = torch.tensor([[1.0, 2.0], [5.0, -3.0]])[None, :, None]
    still, whole, empty = torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.zeros(1, 1, 2, 2)
    held, _ = delta(key, key, values, still, whole, empty)
    torch.testing.assert_close(held[0, 1, 0], values[0, 1, 0])
    added, _ = recurrences.matrix(key, key, values, None, empty)
    torch.testing.assert_close(added[0, 1, 0], values[0].sum(0)[0])


def test_favor_features_are_orthogonal_and_their_products_are_exponentials():
    directions = orthogonal_directions(20, 8, seed=1)
    inside = directions[:8] @ directions[:8].T
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-5
    assert not torch.equal(directions, orthogonal_directions(20, 8, seed=2))
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 1, 30, 1, 8) / 2).unbind(0)
    expected = softmax((q[0, :, 0] @ k[0, :, 0].T / math.sqrt(8)), dim=-1) @ v[0, :, 0]
    errors = []
    for count in (64, 4096):
        features = FavorModule(Favor(count=count), 8)
        keys, rise, _ = features.keys(k, torch.full((1, 1), -torch.inf), None)
        reached = keys * (rise.flip(1).cumsum(1).flip(1) - rise).exp()[..., None]  # what is left of each at the end
        scores = features.queries(q)[0, :, 0] @ reached[0, :, 0].T
        errors.append(float((scores / scores.sum(-1, keepdim=True) @ v[0, :, 0] - expected).norm() / expected.norm()))
    assert errors[1] < 0.15 and errors[1] < errors[0] / 2


@torch.no_grad()
def test_a_short_key_does_not_drown_what_came_before_it():
    """Features of long keys are tiny numbers, which only ratios to their peak so far can hold. Relative to the maximum over
    all keys, as it is usually taken, they would be 0 from the moment that a short key stands anywhere in the sequence."""
    m = randomise(LinearAttention(heads=2, features=Favor(count=9)).build(WIDTH))
    long = 30 * torch.randn(1, TIME, WIDTH)
    short = torch.cat([long[:, :-1], long[:, -1:] / 1000], dim=1)
    before = m(long, context(TIME))[:, :-1]
    assert before.isfinite().all() and (before != 0).any(-1).all()
    assert torch.equal(m(short, context(TIME))[:, :-1], before)


@torch.no_grad()
def test_the_check_on_short_keys_sees_a_maximum_over_the_future(monkeypatch):
    over_all = lambda peaks, before, starts: peaks.amax(1, keepdim=True).expand_as(peaks)
    monkeypatch.setattr("headspring.models.linear_attention.running_max", over_all)
    with pytest.raises(AssertionError):
        test_a_short_key_does_not_drown_what_came_before_it()


def test_running_max_begins_again_with_each_document():
    x, starts = torch.randn(ROWS, TIME, 3), torch.rand(ROWS, TIME) < 0.2
    before = torch.randn(ROWS, 3)
    found, peak = running_max(x, before, starts), before
    for t in range(TIME):
        peak = torch.maximum(torch.where(starts[:, t, None], -torch.inf, peak), x[:, t])
        assert torch.equal(found[:, t], peak)
    assert torch.equal(running_max(x, before, None), torch.cat([before[:, None], x], 1).cummax(1).values[:, 1:])


# ---- what they cost

STATE_SPACES = ["mamba", "mamba2", "linear_attention", "performer", "gated_delta", "griffin", "jamba"]
# What torch does not count: element-wise work, scans, triangular solves, and attention in full, of which the ledger has half.
UNCOUNTED = {
    "table",
    "conv",
    "act",
    "step",
    "decay",
    "scan",
    "multiply",
    "positive",
    "divide",
    "gates",
    "solve",
    "norm",
    "state",
}
UNCOUNTED |= {"mixer.pre", "mlp.pre", "pattern", "position", "rotate", "cache", "memory"}


@pytest.mark.parametrize("name", STATE_SPACES)
def test_the_ledger_is_what_is_computed_and_held(name):
    model, time = randomise(FAMILIES[name]().build()), 40  # a multiple of every chunk
    ledger = model.ledger(time)
    assert ledger.parameters == model.num_parameters()
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(1, time, dtype=torch.long)))
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "scaled_dot_product" in str(op))
    assert (
        time * sum(leaf.flops for leaf in leaves(ledger) if leaf.name not in UNCOUNTED) == counter.get_total_flops() - attention
    )
    with model.computing_in(torch.bfloat16):
        state = model.new_state(3, time)
    assert state.bytes == 3 * (ledger.fixed_state_bytes + time * ledger.state_bytes)


def leaves(cost):
    return [leaf for child in cost.children for leaf in leaves(child)] if cost.children else [cost]


def test_the_memory_does_not_grow_and_is_drawn():
    model = FAMILIES["mamba"]().build()
    assert model.new_state(1, 8).bytes == model.new_state(1, 48).bytes
    assert "state B" in repr(model).splitlines()[0].replace("state B/token", "")


def test_what_accumulates_is_kept_in_float32():
    model = FAMILIES["jamba"]().build()
    with model.computing_in(torch.bfloat16), torch.no_grad():
        state = model.new_state(1)
        hidden = model(torch.zeros(1, 5, dtype=torch.long), state=state)
    assert hidden.dtype == torch.bfloat16 and state.layers[0]["h"].dtype == torch.float32


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (Mamba2(head_dim=5), "multiple of head_dim"),
        (Mamba2(head_dim=8, groups=2), "multiple of groups"),
        (GatedLinear(blocks=5), "multiple of blocks"),
        (LinearAttention(heads=5), "multiple of heads"),
        (GatedDelta(heads=5), "multiple of heads"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(mixer, message):
    with pytest.raises(ValueError, match=message) as caught:
        mixer.build(WIDTH)
    assert "\n" not in str(caught.value)


def test_features_are_a_family_of_values():
    value = LinearAttention(features={"kind": "favor", "count": 9})
    assert value.features == Favor(count=9) and LinearAttention().features == EluPlusOne()
    assert LinearAttention.model_validate_json(value.model_dump_json()) == value
    with pytest.raises(ValidationError, match="nearest are"):
        LinearAttention(features={"kind": "favour"})


# ---- compiled, and with kernels of others


@pytest.mark.parametrize("name", ["mamba", "mamba2", "linear_attention", "performer", "gated_delta"])
def test_a_compiled_block_is_one_graph_and_the_same_function(name):
    model = randomise(FAMILIES[name]().build())
    tokens = torch.randint(0, model.config.vocab, (ROWS, TIME))
    results = []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            for block in model.blocks():
                block.compile(fullgraph=True, dynamic=False, backend="eager")
        hidden = model(tokens, segments=SEGMENTS)
        hidden.square().mean().backward()
        results.append([hidden, *(parameter.grad for parameter in model.layers.parameters())])
    torch._dynamo.reset()
    for found, expected in zip(*results):
        close(found, expected)


def stand_ins():
    """Functions with the signatures of the kernels (mamba_ssm 2, causal_conv1d 1, fla 0.6), on any device."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        b, c = (part.squeeze(1).transpose(1, 2) for part in (B, C))
        empty = u.new_zeros(u.shape[0], *A.shape)
        y, last = recurrences.selective(u.transpose(1, 2), delta.transpose(1, 2), A, b, c, empty)
        return y.transpose(1, 2), last

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None):
        none = torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool)
        return recurrences.convolution(x.mT, weight.unsqueeze(1), 0.0 if bias is None else bias, none).mT

    def chunk_simple_gla(q, k, v, g=None, scale=None, initial_state=None, output_final_state=False):
        y, last = recurrences.matrix(*(part.float() for part in (q * scale, k, v)), g, initial_state)
        return y.to(v.dtype), last

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        wide = (part.float() for part in (q * scale, k, v))
        y, last = recurrences.matrix(*wide, g, initial_state, None, beta.float())
        return y.to(v.dtype), last

    return {name: value for name, value in locals().items() if callable(value)}


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer", [Mamba(state=3), Mamba2(state=4, head_dim=6, groups=2), GatedDelta(heads=3)], ids=lambda mixer: mixer.kind
)
def test_a_fused_kernel_is_given_what_it_expects(mixer, monkeypatch):
    """No GPU is needed to see that tensors arrive in the right order and layout, and come back so."""
    used = set()

    def kernel(name):
        used.add(name)
        return stand_ins()[name]

    module, x = randomise(mixer.build(WIDTH)), torch.randn(ROWS, TIME, WIDTH)
    expected, expected_state = module(x, context(TIME)), module.new_state(ROWS, TIME, torch.float32, x.device)
    module(x, context(TIME), expected_state)
    monkeypatch.setattr(installed, "kernel", kernel)
    monkeypatch.setattr(installed, "applies", lambda x, activations, starts: starts is None)
    close(module(x, context(TIME)), expected)
    state = module.new_state(ROWS, TIME, torch.float32, x.device)
    close(module(x, context(TIME), state), expected)
    assert len(used) == 2 and state.bytes == expected_state.bytes
    for name in state.tensors:
        close(state[name], expected_state[name])


def test_kernels_leave_alone_what_they_would_change():
    x, starts = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    assert not installed.applies(x, torch.bfloat16, None)  # on the CPU
    if torch.cuda.is_available():
        assert installed.applies(x.cuda(), torch.bfloat16, None)
        assert not installed.applies(x.cuda(), torch.float32, None) and not installed.applies(
            x.cuda(), torch.bfloat16, starts.cuda()
        )
