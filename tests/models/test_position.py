"""Positions against `transformers` and against their definitions; each identity has a control that fails."""

import math

import pytest
import torch
from pydantic import ValidationError

from headspring.models import (
    ALiBi,
    Attention,
    Block,
    Decoder,
    DynamicNTK,
    Embed,
    Learned,
    Linear,
    Llama3,
    LongRoPE,
    NoPE,
    RoPE,
    SharedBias,
    Sinusoidal,
    SwiGLU,
    T5Bias,
    YaRN,
    repeat,
)
from headspring.models.context import Context
from headspring.models.kernels import rotate_plain
from headspring.models.position.bias import buckets_of
from tests.models.conftest import randomise, small_decoder

PAIRS = tuple(1.0 + 0.1 * i for i in range(8))
LONG = tuple(2.0 + 0.3 * i for i in range(8))
SCALINGS = [  # ours, and what transformers calls it
    (Linear(factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    (DynamicNTK(factor=2.0, original_context=32), {"rope_type": "dynamic", "factor": 2.0}),
    (
        YaRN(factor=4.0, original_context=32),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    (
        YaRN(factor=4.0, original_context=32, beta_fast=8.0, beta_slow=2.0, truncate=False, mscale=1.0, mscale_all_dim=0.7),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 2.0,
         "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    (
        YaRN(factor=8.0, original_context=4096, attention_factor=1.3),
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.3},
    ),
    (
        Llama3(factor=8.0, original_context=64),
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ),
    (
        LongRoPE(factor=4.0, original_context=32, short=PAIRS, long=LONG),
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32, "short_factor": list(PAIRS),
         "long_factor": list(LONG)},
    ),
]  # fmt: skip


def theirs(parameters: dict, fraction: float, time: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `transformers`, (1, T, R/2), for heads of 16 / fraction channels."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    original = parameters.get("original_max_position_embeddings", 32)
    rope = {"rope_theta": 500.0, "partial_rotary_factor": fraction, **parameters}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=1, head_dim=round(16 / fraction), max_position_embeddings=original,
        rope_parameters=rope,
    )  # fmt: skip
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(time)[None])
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize(("scaling", "parameters"), SCALINGS, ids=lambda x: getattr(x, "kind", ""))
def test_scaled_rotations_are_those_of_transformers(scaling, parameters, fraction):
    rope = RoPE(theta=500.0, fraction=fraction, scaling=scaling)
    for time in (20, 50):  # within the context of training, and beyond
        cos, sin = rope.angles(torch.arange(time)[None], round(16 / fraction))
        expected_cos, expected_sin = theirs(parameters, fraction, time)
        assert torch.allclose(cos, expected_cos, rtol=0, atol=2e-6)
        assert torch.allclose(sin, expected_sin, rtol=0, atol=2e-6)
        other = {**parameters, "factor": parameters["factor"] * 1.01}
        if time == 50 or scaling.kind != "dynamic_ntk":  # the control: another factor is seen
            assert not torch.allclose(cos, theirs(other, fraction, time)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("channels", "fraction"), [(20, 0.25), (10, 0.5), (12, 0.45), (16, 1.0)])
def test_partial_rotation_is_that_of_gpt_neox(channels, fraction):
    """The first ⌊C · fraction⌋ channels, one more where that is odd, and the exponents are those of the odd number."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": fraction}
    config = transformers.GPTNeoXConfig(hidden_size=2 * channels, num_attention_heads=2, rope_parameters=rope)
    x, positions = torch.randn(2, 7, 2, channels), torch.arange(7)[None]
    cos, sin = GPTNeoXRotaryEmbedding(config)(x, positions)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    module = RoPE(fraction=fraction).build(2, channels, causal=True)
    context = Context.of(7, 0, None, None, x.device)
    module.prepare(context)
    assert torch.allclose(module.place(x, context), expected.transpose(1, 2), atol=1e-5)
    whole = rotate_plain(x, *RoPE().angles(positions, channels))
    assert torch.allclose(module.place(x, context), whole, atol=1e-5) == (fraction == 1.0)


@pytest.mark.parametrize("heads", range(1, 21))
def test_alibi_slopes_are_those_of_bloom_and_mpt(heads):
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32)[:, 0, 1]
    mpt = -build_mpt_alibi_tensor(heads, 9)[:, 0, -2]
    slopes = ALiBi().slopes(heads)
    assert torch.allclose(slopes, bloom) and torch.allclose(slopes, mpt)
    assert torch.allclose(ALiBi(steepest=4.0).slopes(heads), -build_mpt_alibi_tensor(heads, 9, 4)[:, 0, -2])


def test_alibi_by_distance_is_alibi_by_key():
    """The two forms differ by a constant of each row, which a softmax does not see; that of a query is not such a one."""
    context, slopes = Context.of(6, 0, None, None, torch.device("cpu")), ALiBi().slopes(3)
    module = ALiBi().build(3, 8, causal=True)
    module.prepare(context)
    hidden = torch.ones(6, 6).triu(1).bool()
    distance = module.bias(context).masked_fill(hidden, -math.inf).softmax(-1)
    by_key = slopes[:, None, None] * torch.arange(6.0)[None, None, :]
    assert torch.allclose(distance, by_key.expand(3, 6, 6).masked_fill(hidden, -math.inf).softmax(-1)[None], atol=1e-6)
    by_query = by_key.mT.expand(3, 6, 6).masked_fill(hidden, -math.inf).softmax(-1)
    assert not torch.allclose(distance, by_query[None], atol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (6, 11)])
def test_buckets_are_those_of_t5(causal, buckets, max_distance):
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    expected = T5Attention._relative_position_bucket(relative, not causal, buckets, max_distance)
    assert torch.equal(buckets_of(relative, buckets, max_distance, causal), expected)
    assert not torch.equal(buckets_of(relative, buckets, max_distance, not causal), expected)


def test_shared_bias_is_the_first_layers_table():
    """Two layers that share a table are two layers with that table; its gradient is the sum over both."""

    def decoder(second):
        attention = [Attention(heads=4, position=position, qk_norm=None) for position in (T5Bias(), second)]
        layers = tuple(Block(mixer=a, feedforward=SwiGLU(hidden=48)) for a in attention)
        return randomise(small_decoder(layers=layers).build())

    shared, separate = decoder(SharedBias()), decoder(T5Bias())
    names = {name for name, _ in shared.named_parameters()}
    assert "layers.1.mixer.f.position.weight" not in names
    separate.load_state_dict(shared.state_dict(), strict=False)
    tables = [separate.layers[i].mixer.f.position.weight for i in (0, 1)]
    tokens = torch.arange(20)[None]
    assert not torch.equal(shared(tokens), separate(tokens))
    tables[1].data.copy_(tables[0].data)
    hidden, expected = shared(tokens), separate(tokens)
    assert torch.equal(hidden, expected)
    hidden.sum().backward(), expected.sum().backward()
    assert torch.allclose(shared.layers[0].mixer.f.position.weight.grad, tables[0].grad + tables[1].grad, atol=1e-3)


def test_checkpointed_bias_has_the_same_gradient():
    layers = tuple(
        Block(mixer=Attention(position=p, qk_norm=None), feedforward=SwiGLU(hidden=48)) for p in (T5Bias(), SharedBias())
    )
    model, gradients = randomise(small_decoder(layers=layers).build()), []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        model(torch.arange(20)[None]).square().sum().backward()
        gradients.append(model.layers[0].mixer.f.position.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4) and gradients[0].abs().max() > 0


# ---- absolute positions


def test_sinusoids_are_those_of_the_paper_and_of_transformers():
    pytest.importorskip("transformers")
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    found = Sinusoidal().encode(torch.arange(50), 12)
    for position in (0, 1, 7, 49):
        for i in range(6):
            angle = position / 10_000 ** (2 * i / 12)
            assert found[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert found[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)
    marian = MarianSinusoidalPositionalEmbedding(50, 12).create_weight()
    assert torch.allclose(Sinusoidal(layout="halves").encode(torch.arange(50), 12).float(), marian, atol=1e-6)
    fairseq = M2M100SinusoidalPositionalEmbedding.get_embedding(50, 12)
    halves = Sinusoidal(layout="halves", spacing="inclusive", offset=2)
    assert torch.allclose(halves.encode(torch.arange(48), 12).float(), fairseq[2:], atol=1e-5)
    assert not torch.allclose(marian, fairseq, atol=1e-2)


def test_embedding_is_the_sum_of_its_parts():
    embed = Embed(scale=2.0, positions=Learned(rows=40, offset=3), types=2)
    module = randomise(small_decoder(embed=embed).build()).embed
    tokens, types = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])
    positions = torch.tensor([[0, 0, 1]])
    expected = 2.0 * module.weight[tokens] + module.positions.weight[positions + 3] + module.types.weight[types]
    assert torch.allclose(module(tokens, torch.float32, positions, types), expected)
    of_first_type = 2.0 * module.weight[tokens] + module.positions.weight[positions + 3] + module.types.weight[0]
    assert torch.allclose(module(tokens, torch.float32, positions), of_first_type)


# ---- positions behind padding, in packed documents, in sequences that grow


def test_context_counts_from_each_documents_first_token():
    segments, padding = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 2, 2, 2]]), torch.tensor([2, 0])
    both = Context.of(7, 0, segments, padding, torch.device("cpu"))
    assert both.positions.tolist() == [[0, 0, 0, 1, 0, 1, 2], [0, 1, 0, 0, 1, 2, 3]]
    assert both.lengths.tolist() == [[2, 2, 2, 2, 3, 3, 3], [2, 2, 1, 4, 4, 4, 4]]
    later = Context.of(2, 5, None, padding, torch.device("cpu"))
    assert later.positions.tolist() == [[3, 4], [5, 6]] and later.lengths.tolist() == [[5], [7]]
    assert later.relative[0].tolist() == [[-3, -3, -3, -2, -1, 0, 1], [-4, -4, -4, -3, -2, -1, 0]]


GROWING = [
    DynamicNTK(factor=4.0, original_context=8),
    LongRoPE(factor=4.0, original_context=8, short=(1.0,) * 4, long=(1.0, 2.0, 3.0, 5.0)),
]


@pytest.fixture(params=GROWING, ids=lambda scaling: scaling.kind)
def growing(request):
    """A model whose rotations depend on the length, beyond 8 tokens."""
    attention = Attention(heads=4, position=RoPE(scaling=request.param))
    return randomise(small_decoder(layers=repeat(2, Block(mixer=attention, feedforward=SwiGLU(hidden=48)))).build())


def close(found, expected) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_a_rows_length_is_its_own(growing):
    """Neither longer neighbours, nor pads, nor other documents of its row stretch a short one."""
    tokens = torch.randint(0, 61, (2, 14), generator=torch.Generator().manual_seed(0))
    padded = growing(tokens, padding=torch.tensor([8, 0]))
    assert close(padded[0, 8:], growing(tokens[:1, 8:])[0]) and close(padded[1], growing(tokens[1:])[0])
    segments = torch.tensor([[0] * 5 + [1] * 9])
    packed = growing(tokens[:1], segments=segments)
    assert close(packed[0, :5], growing(tokens[:1, :5])[0]) and close(packed[0, 5:], growing(tokens[:1, 5:])[0])
    assert not close(growing(tokens[:1])[0, :5], growing(tokens[:1, :5])[0])  # the control: a length is seen


@torch.no_grad()
def test_a_state_that_outgrows_its_rotation_is_read_anew(growing, monkeypatch):
    """With a state each call gives what the whole sequence so far gives; keys of the old rotation would not."""
    tokens, padding = torch.randint(0, 61, (2, 14), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0])

    def in_steps():
        state = growing.new_state(2, 14)
        found = [growing(tokens[:, :6], state=state, padding=padding)[:, -1]]
        found += [growing(tokens[:, t : t + 1], state=state)[:, -1] for t in range(6, 14)]
        return torch.stack(found, 1), state

    expected = torch.stack([growing(tokens[:, : t + 1], padding=padding)[:, -1] for t in range(5, 14)], 1)
    found, state = in_steps()
    assert close(found, expected)
    state.rewind(8)  # back to where the short rotation held
    assert close(growing(tokens[:, 6:7], state=state)[:, -1], growing(tokens[:, :7], padding=padding)[:, -1])
    monkeypatch.setattr(type(growing), "_outgrown", lambda *_: False)
    assert not close(in_steps()[0], expected)


# ---- what cannot work


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(head_dim=7), "rotary positions turn pairs"),
        (lambda: Attention(head_dim=4, position=RoPE(fraction=0.3)), "rotary positions turn pairs"),
        (lambda: Attention(head_dim=16, position=RoPE(scaling=GROWING[1])), "needs 8 positive short factors"),
        (lambda: Attention(head_dim=2, position=RoPE(scaling=GROWING[0])), "more than 2 rotated channels"),
        (lambda: RoPE(scaling={"kind": "ntk", "factor": 2}), "no kind 'ntk'"),
        (lambda: small_decoder(embed=Embed(positions=Learned(rows=33, offset=2))).build(), "needs 34 rows"),
        (lambda: small_decoder(embed=Embed(positions=Sinusoidal()), width=3, tied=False,
                               layers=(Block(mixer=Attention(heads=1, position=NoPE())),)).build(), "an even width"),
        (lambda: small_decoder(layers=(Block(mixer=Attention(position=SharedBias())),)).build()(torch.zeros(1, 2).long()),
         "needs a layer before it with a t5_bias"),
        (lambda: T5Bias(buckets=32, max_distance=16).build(4, 8, causal=True), "must exceed the 16 distances"),
    ],
)  # fmt: skip
def test_what_cannot_work_says_so(make, message):
    with pytest.raises((ValueError, ValidationError), match=message):
        make()


def test_positions_survive_json():
    for scaling, _ in SCALINGS:
        model = small_decoder(layers=(Block(mixer=Attention(position=RoPE(fraction=0.5, scaling=scaling))),))
        assert Decoder.model_validate_json(model.model_dump_json()) == model
