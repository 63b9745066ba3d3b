"""Encoder–decoders with sources that differ: padding, state, and what does not fit together. The rest is the contract's."""

import pytest
import torch
from pydantic import ValidationError

from headspring.artifacts import UserError
from headspring.models import Attention, Block, CrossAttention, Decoder, Encoder, EncoderDecoder, Full, NoPE, SwiGLU
from headspring.models.families import FAMILIES
from headspring.models.position import DynamicNTK, RoPE
from headspring.models.state import MemoryState, State
from tests.contract.checks import assert_close, random_tokens
from tests.models.conftest import randomise

NAMES = ("encoder_decoder", "vaswani", "bart", "t5", "t5_v1_1")
PADS = torch.tensor([0, 3, 6])


@pytest.fixture(params=NAMES)
def model(request):
    return randomise(FAMILIES[request.param]().build()).eval()


def sources(model, rows: int = 3, time: int = 8) -> torch.Tensor:
    return random_tokens(model, rows, time, seed=7)


@torch.no_grad()
def test_a_padded_source_is_the_source_without_pads(model):
    tokens, source = random_tokens(model, 3, 9), sources(model)
    together = model(tokens, source=source, source_padding=PADS)
    for row, pads in enumerate(PADS.tolist()):
        alone = model(tokens[row : row + 1], source=source[row : row + 1, pads:])
        assert_close(together[row : row + 1], alone)


def test_pads_of_a_source_have_no_influence_and_its_tokens_have(model):
    source, tokens, leaves = sources(model), random_tokens(model, 3, 9), []

    def leaf(x):
        leaves.append(x.detach().requires_grad_())
        return leaves[0]

    with model.sites.edit({"encoder.embed": leaf}):
        hidden = model(tokens, source=source, source_padding=PADS)
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad((hidden[:, 0] * torch.randn(hidden[:, 0].shape)).sum(), leaves)
    moved = gradient.abs().sum(-1)  # what the first token written is moved by: every token of its own source
    pad = torch.arange(source.shape[1]) < PADS[:, None]
    assert moved[pad].count_nonzero() == 0 and (moved[~pad] > 0).all()


@torch.no_grad()
def test_state_with_sources(model):
    """Any split, then select, fork and rewind: rows keep their sources."""
    tokens, source = random_tokens(model, 3, 12), sources(model)
    expected = model(tokens, source=source, source_padding=PADS)
    state = model.new_state(3, 12)
    first = model(tokens[:, :5], state=state, source=source, source_padding=PADS)
    assert_close(first, expected[:, :5])
    model(random_tokens(model, 3, 3, seed=4), state=state)
    state.rewind(3)
    assert_close(model(tokens[:, 5:8], state=state), expected[:, 5:8])
    rows = torch.tensor([2, 0, 2])
    state.select(rows)
    state.fork(2)
    rows = rows.repeat_interleave(2)
    assert_close(model(tokens[rows, 8:], state=state), expected[rows, 8:])
    state.rewind(state.length)  # nothing is left but the source
    assert_close(model(tokens[rows], state=state), expected[rows])


@pytest.mark.parametrize("forgets", [State, MemoryState])
def test_a_control_of_the_state(forgets, monkeypatch):
    """A select that leaves the memory, or its keys, where they were is seen."""
    original = forgets.select

    def select(self, rows):
        before = (self.memory,) if forgets is State else (self.keys, self.values)
        original(self, rows)
        if forgets is State:
            (self.memory,) = before
            for layer in self.layers:
                layer.memory.keys = None
        else:
            self.keys, self.values = (kept[torch.arange(len(rows)) % len(kept)] for kept in before)

    monkeypatch.setattr(forgets, "select", select)
    with pytest.raises((AssertionError, RuntimeError)):
        test_state_with_sources(randomise(FAMILIES["bart"]().build()).eval())


@torch.no_grad()
def test_a_layer_that_reads_anew_keeps_the_source():
    """Where a longer sequence is read in another way, all layers start again, and the memory stays."""
    position = RoPE(scaling=DynamicNTK(original_context=6, factor=2.0))
    model = randomise(tiny(Attention(heads=2, position=position)).build()).eval()
    tokens, source = random_tokens(model, 2, 12), sources(model, 2)
    state = model.new_state(2, 12)
    model(tokens[:, :5], state=state, source=source)
    assert_close(model(tokens[:, 5:], state=state), model(tokens, source=source)[:, 5:])


@torch.no_grad()
def test_keys_of_the_source_are_made_once(model):
    """Those of the first call serve the others, and the state's size counts them."""
    state, source = model.new_state(3, 12), sources(model)
    model(random_tokens(model, 3, 2), state=state, source=source)
    keys, size = state.layers[0].memory.keys, state.bytes
    model(random_tokens(model, 3, 2), state=state)
    assert state.layers[0].memory.keys is keys and state.bytes == size
    kept = [layer.memory for layer in state.layers]
    assert size == sum(layer.own.bytes + 2 * keys.numel() * 4 for layer in state.layers) + state.memory.bytes
    assert len(kept) == len(model.decoder.layers)


def test_shared_tables_are_one_parameter():
    shared, apart = (tiny(shared=shared).build() for shared in (True, False))
    assert shared.encoder.embed.rows is shared.decoder.embed.rows is shared.output_weight
    assert apart.num_parameters() - shared.num_parameters() == 53 * 24 == apart.encoder.embed.weight.numel()
    assert shared.ledger().parameters == shared.num_parameters() and apart.ledger().parameters == apart.num_parameters()


@torch.no_grad()
def test_activations_compute_in_the_dtype_of_the_whole(model):
    with model.computing_in(torch.bfloat16):
        hidden = model(random_tokens(model, 2, 5), source=sources(model, 2))
        assert hidden.dtype == model.encode(sources(model, 2)).hidden.dtype == torch.bfloat16


def tiny(mixer: Attention | None = None, *, cross: CrossAttention | None = None, **changes) -> EncoderDecoder:
    sizes = {"vocab": 53, "width": 24, "context": 48}
    mixer, feedforward = mixer or Attention(heads=2), SwiGLU(hidden=32)
    reads = Block(mixer=Attention(heads=2, mask=Full()), feedforward=feedforward)
    writes = Block(mixer=mixer, cross=cross or CrossAttention(heads=2), feedforward=feedforward)
    sides = {
        "encoder": Encoder(**sizes, layers=(reads,), head=None),
        "decoder": Decoder(**sizes, layers=(writes,)),
    }
    return EncoderDecoder(**{**sides, **changes})


def test_it_comes_back_from_json():
    value = tiny(Attention(heads=3, position=NoPE()), cross=CrossAttention(heads=4, kv_heads=2), start=5)
    assert EncoderDecoder.model_validate(value.model_dump(mode="json")) == value
    assert (value.vocab, value.width, value.context) == (53, 24, 48)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(start=53), "no token of a vocabulary of 53"),
        (lambda: tiny(vocab=54), "is the decoder's"),
        (lambda: tiny(encoder=Encoder(vocab=53, width=16, layers=tiny().encoder.layers, head=None)), "width .16. must be"),
        (lambda: tiny(encoder=Encoder(vocab=53, width=24, layers=tiny().encoder.layers)), "predicts nothing itself"),
        (lambda: tiny(encoder=Encoder(vocab=40, width=24, layers=tiny().encoder.layers, head=None)), "same vocab"),
        (lambda: tiny(decoder=Decoder(vocab=53, width=24, layers=(Block(mixer=Attention(heads=2)),))), "does not read"),
        (lambda: tiny(Attention(heads=2, mask=Full())), "sees later tokens"),
        (lambda: Block(mixer=CrossAttention(heads=2)), "give it as cross"),
        (lambda: Block(mixer=Attention(), cross=Attention()), "does not read an encoder"),
        (lambda: Block(mixer=Attention(), cross=SwiGLU(hidden=8)), "does not read an encoder"),
        (lambda: Block(mixer=Attention(), cross=CrossAttention(), parallel=True), "parallel block has no cross"),
        (lambda: Encoder(vocab=53, width=24, layers=tiny().decoder.layers), "has no cross|left to right"),
        (lambda: CrossAttention(heads=3, kv_heads=2), "multiple of kv_heads"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_wrong_questions_are_refused_in_a_line():
    model = tiny().build()
    tokens, source = random_tokens(model, 2, 4), sources(model, 2)
    with pytest.raises(UserError, match="give it a source"):
        model(tokens)
    with pytest.raises(UserError, match="part of an encoder_decoder"):
        tiny().decoder.build()
    with pytest.raises(ValueError, match="3 sources for 2 rows"):
        model(tokens, source=sources(model, 3))
    state = model.new_state(2, 8)
    model(tokens, state=state, source=source)
    with pytest.raises(ValueError, match="with the first tokens of a state only"):
        model(tokens, state=state, source=source)
