"""Block masks and scores of FlexAttention are those of the dense definition. The kernel is compiled on a GPU only; here its
plain form runs, forward, and backward once torch's own check of the device is silenced."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from headspring.models import (
    ALiBi,
    Attention,
    Block,
    Causal,
    Decoder,
    Full,
    Hashed,
    LocalGlobal,
    NoPE,
    Routed,
    SharedBias,
    Strided,
    T5Bias,
    flex,
)
from headspring.models.context import Context
from tests.models.conftest import fill, randomise

TIME = 45
MASKS = [
    Causal(),
    Causal(window=4),
    Causal(window=3, sinks=2),
    Full(),
    Full(window=2),
    LocalGlobal(window=3, globals=1, every=7),
    Strided(stride=7, local=3),
    Routed(block=4, top=1),
    Hashed(block=4, top=2, buckets=4, rounds=1),
]
SETTINGS = [
    {"position": ALiBi()},
    {"position": T5Bias(buckets=8, max_distance=20)},
    {"softcap": 2.0, "sink": True, "position": NoPE()},
    {"softcap": 3.0, "scale": 0.7, "position": T5Bias(buckets=8, max_distance=20)},
]
SEGMENTS = torch.tensor([[0] * 30 + [1] * 15, [0] * 5 + [1] * 1 + [2] * 39])
CASES = {"plain": {}, "padding": {"padding": torch.tensor([0, 11])}, "documents": {"segments": SEGMENTS}}

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def run(part, case, chosen: bool, traced: bool = False) -> tuple[torch.Tensor, ...]:
    """The answers and the gradients by this path or by the dense one; what pads answer is left out. `traced` is how torch runs
    it unless told otherwise, which takes seconds a call."""
    x = torch.randn(2, TIME, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    context = Context.of(TIME, 0, case.get("segments"), case.get("padding"), torch.device("cpu"))
    with (
        patch.object(flex, "serves", lambda *_: chosen),
        patch.object(flex, "BLOCK", 8),  # several tiles in a short sequence
        patch.object(torch_flex, "_validate_device", lambda *_: None),
        patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", not traced),
    ):
        part.prepare(context)
        y = part(x, context)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        if "padding" in case:
            weight[1, :11] = 0
        gradients = torch.autograd.grad((y * weight).sum(), [x, *part.parameters()], allow_unused=not traced)
        return y * (weight != 0), *gradients


def assert_same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.detach().abs().max()))


def module(mask, **settings):
    return fill(Attention(heads=4, kv_heads=2, mask=mask, **settings).build(24))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_every_mask_is_the_dense_one(mask, case):
    part = module(mask)
    assert_same(run(part, CASES[case], chosen=True), run(part, CASES[case], chosen=False))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("mask", [MASKS[2], MASKS[7]], ids=repr)
def test_every_change_of_the_scores_is_the_dense_one(mask, settings):
    part = module(mask, **settings)
    for case in CASES.values():
        assert_same(run(part, case, chosen=True)[:1], run(part, case, chosen=False)[:1])


@pytest.mark.slow
def test_what_the_scores_learn_is_what_they_learn_densely():
    for mask, settings in ((MASKS[1], SETTINGS[1]), (MASKS[2], SETTINGS[2])):
        part = module(mask, **settings)
        found = run(part, CASES["documents"], chosen=True, traced=True)
        assert_same(found, run(part, CASES["documents"], chosen=False))


def test_bugs_are_noticed():
    """A window too long by one, the bias of another head, no sink."""
    part = module(Causal(window=4), position=ALiBi(), sink=True)
    part.sinks.data.fill_(1.0)
    expected = run(part, {}, chosen=False)
    allowed, element = Causal.allowed, type(part.position).element
    bugs = [
        patch.object(Causal, "allowed", lambda self, q, k: allowed(self, q - 1, k)),
        patch.object(type(part.position), "element", lambda self, r, head, c: element(self, r, (head + 1) % 4, c)),
        patch.object(torch, "sigmoid", torch.ones_like),
    ]
    for bug in bugs:
        with bug, pytest.raises(AssertionError):
            assert_same(run(part, {}, chosen=True), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", MASKS[7:], ids=repr)
def test_the_tiles_of_a_choice_are_those_that_it_shows(mask, case):
    """The plain form looks at every element, so that a tile left out would only be missed on a GPU."""
    made, make = [], flex.chosen_block_mask

    def note(*arguments):
        made.append(make(*arguments))
        return made[0]

    with patch.object(flex, "chosen_block_mask", note):
        run(module(mask), CASES[case], chosen=True)
    shown = torch_flex.create_mask(made[0].mask_mod, 2, 4, TIME, TIME, "cpu")
    tiles = torch.nn.functional.pad(shown, (0, 3, 0, 3)).unflatten(3, (6, 8)).unflatten(2, (6, 8)).any(5).any(3)
    read = made[0].to_dense().bool()
    assert not (tiles & ~read).any()
    assert read.sum() <= 1.4 * tiles.sum()


def test_layers_share_their_tiles_and_their_bias():
    layers = [Block(mixer=Attention(heads=4, mask=Causal(window=4), position=p)) for p in (T5Bias(), SharedBias())]
    model, tokens = (
        randomise(Decoder(vocab=53, width=24, layers=tuple(layers), context=64).build()),
        torch.randint(53, (2, TIME)),
    )
    made, block_mask = [], flex.block_mask

    def note(mask, context):
        made.append(mask)
        return block_mask(mask, context)

    with torch.no_grad():
        expected = model(tokens)
        with patch.object(flex, "serves", lambda *_: True), patch.object(flex, "block_mask", note):
            found = model(tokens)
    assert_same([found], [expected])
    assert len(made) == 1


def test_hidden_tiles_are_skipped():
    context = Context.of(1024, 0, None, None, torch.device("cpu"))
    for mask, share in ((Causal(), 0.57), (Causal(window=128), 0.24), (LocalGlobal(window=128, globals=4), 0.36)):
        assert 1 - flex.block_mask(mask, context).sparsity() / 100 < share


def test_it_serves_whole_sequences_on_a_gpu():
    def context(device: str, time: int = 256, past: int = 0) -> Context:
        return Context(time, past, torch.zeros(1, time, dtype=torch.int64, device=device))

    with patch.object(flex, "_compiles", lambda: True), patch.object(Context, "device", torch.device("cuda")):
        assert flex.serves(context("cpu"), 64)
        assert not flex.serves(context("cpu", past=5), 64)
        assert not flex.serves(context("cpu", time=8), 64)
        assert not flex.serves(context("cpu"), 8)
        with patch.object(flex, "_compiles", lambda: False):
            assert not flex.serves(context("cpu"), 64)
    assert not flex.serves(context("cpu"), 64)


def test_the_plain_fused_kernel_stays_where_it_does_all():
    context = Context.of(256, 0, None, None, torch.device("cpu"))
    with patch.object(flex, "serves", lambda *_: True):
        assert not module(Causal())._flexes(context)
        assert not module(Causal(window=256))._flexes(context)
        assert module(Causal(window=255))._flexes(context)
        assert module(Causal(), position=ALiBi())._flexes(context)
        assert module(Causal())._flexes(Context.of(256, 0, torch.zeros(1, 256, dtype=torch.int64), None, torch.device("cpu")))


def test_the_benchmark_reads_its_arguments(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
    import flex_attention

    options = flex_attention.parse(["--length", "4096", "--only", "window", "routed"])
    assert (options.length, options.only, options.heads) == (4096, ["window", "routed"], 16)
    assert set(flex_attention.parse([]).only) == set(flex_attention.LAYERS)
    with pytest.raises(SystemExit):
        flex_attention.parse(["--only", "nothing"])
    sys.modules.pop("flex_attention")
