"""Gathered attention is dense attention with the same mask, and reads less; windows are held in a state that does not grow."""

from unittest.mock import patch

import pytest
import torch

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
    Strided,
    T5Bias,
    block_sparse,
    strided,
)
from headspring.models import attend as attend_module
from headspring.models.chosen import Chosen
from headspring.models.context import Context
from headspring.models.families import FAMILIES
from headspring.models.mask import BLOCK
from tests.contract import checks
from tests.models.conftest import fill, randomise

MASKS = [
    Causal(window=4),
    Causal(window=3, sinks=2),
    Full(window=2),
    LocalGlobal(window=4, globals=2),
    LocalGlobal(window=3, globals=1, every=7),
    Strided(stride=7, local=3),
    Strided(stride=32, local=30),
    Strided(stride=2, local=2),
    Routed(block=4, top=1),
    Routed(block=3, top=2),
    Hashed(block=4, top=2, buckets=4, rounds=1),
]
TIME = 45
SEGMENTS = torch.tensor([[0] * 30 + [1] * 15, [0] * 5 + [1] * 1 + [2] * 39])
CASES = {"plain": {}, "padding": {"padding": torch.tensor([0, 11])}, "documents": {"segments": SEGMENTS}}


def module(mask, **settings):
    return fill(Attention(heads=4, kv_heads=2, mask=mask, **settings).build(24))


def context_of(case) -> Context:
    return Context.of(TIME, 0, case.get("segments"), case.get("padding"), torch.device("cpu"))


def run(part, case, dense: bool):
    """The answers and the gradients, with pads left out."""
    x = torch.randn(2, TIME, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    context = context_of(case)
    with patch.object(block_sparse, "worthwhile", lambda mask, context: not dense):
        part.prepare(context)
        y = part(x, context)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    if "padding" in case:
        weight[1, :11] = 0
    return y * (weight != 0), *torch.autograd.grad((y * weight).sum(), [x, *part.parameters()])


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_gathered_is_dense(mask, case):
    part = module(mask)
    assert_same(run(part, CASES[case], dense=False), run(part, CASES[case], dense=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"position": ALiBi()},
        {"position": T5Bias(buckets=8, max_distance=20)},
        {"softcap": 2.0, "sink": True, "position": NoPE()},
        {"sink": True, "position": ALiBi()},
        {"scale": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [MASKS[1], MASKS[4], MASKS[5], MASKS[6], MASKS[8]], ids=repr)
def test_gathered_is_dense_whatever_is_done_to_the_scores(mask, settings):
    part = module(mask, **settings)
    for case in CASES.values():
        assert_same(run(part, case, dense=False), run(part, case, dense=True))


def test_what_is_gathered_again_is_the_same():
    """Long lists are not kept for the backward pass: in pieces or whole, and with another bias a head."""
    part = module(MASKS[4], position=T5Bias(buckets=8, max_distance=20))
    with patch.object(block_sparse, "ROWS", 1), patch.object(block_sparse, "KEPT", 1):
        again = run(part, CASES["documents"], dense=False)
    with patch.object(block_sparse, "KEPT", 100):
        assert_same(again, run(part, CASES["documents"], dense=False))


@pytest.mark.parametrize("case", CASES)
def test_columns_are_read_some_rows_at_a_time(case):
    part = module(MASKS[5], position=ALiBi())
    with patch.object(strided, "SCORES", 1):
        assert_same(run(part, CASES[case], dense=False), run(part, CASES[case], dense=True))


def test_a_window_or_a_column_too_short_is_noticed():
    part = module(Strided(stride=32, local=30))
    expected = run(part, {}, dense=True)
    with patch.object(Strided, "reach", 0), pytest.raises(AssertionError):
        assert_same(run(part, {}, dense=False), expected)
    unseen = torch.full((2, 2, 2, 2, 32, 2), -torch.inf)
    with patch.object(strided._Rows, "_far", lambda self, q, k: unseen), pytest.raises(AssertionError):
        assert_same(run(part, {}, dense=False), expected)


def test_a_key_left_out_of_the_lists_is_noticed():
    part = module(MASKS[3])
    expected = run(part, {}, dense=True)
    original = LocalGlobal.gathered
    with (
        patch.object(LocalGlobal, "gathered", lambda *a: original(*a)[..., 1:]),
        pytest.raises(AssertionError),
    ):
        assert_same(run(part, {}, dense=False), expected)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if not isinstance(mask, Chosen | Strided)], ids=repr)
def test_lists_have_each_visible_key_once(mask):
    length, block = 50, mask.query_block
    for index in range(length // block):
        keys = mask.gathered(torch.tensor(index), length)
        keys = keys[(keys >= 0) & (keys < length)].tolist()
        assert len(keys) == len(set(keys))
        queries = torch.arange(index * block, (index + 1) * block)
        visible = mask.allowed(queries[:, None], torch.arange(length)).any(0).nonzero().flatten().tolist()
        assert set(visible) <= set(keys)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if not isinstance(mask, Chosen)], ids=repr)
def test_the_ledger_counts_the_keys_that_are_seen(mask):
    for length in (1, 5, 23, 64):
        place = torch.arange(length)
        assert mask.keys_seen(length) == pytest.approx(float(mask.allowed(place[:, None], place).sum()) / length)
        hidden = (~mask.allowed(place[:, None], place)) & ((place <= place[:, None]) | (not mask.causal))
        assert not (mask.shows_all(length) and hidden.any())


def test_the_ledger_counts_the_blocks_that_are_chosen():
    seen = [min(t // 4, 2) * 4 + t % 4 + 1 for t in range(23)]
    assert Routed(block=4, top=2).keys_seen(23) == pytest.approx(sum(seen) / 23)


# ---- choices


def looked_at(part, x) -> torch.Tensor:
    """(B, H, T, T) bool: where the dense form puts weight."""
    seen = []
    part.tap, part.watched = lambda name, value: seen.append(value) or value if name == "pattern" else value, {"pattern"}
    context = Context.of(x.shape[1], 0, None, None, x.device)
    part.prepare(context)
    part(x, context)
    part.tap, part.watched = None, frozenset()
    return seen[0] > 0


def by_hand(part, x, scores) -> torch.Tensor:
    """The same in loops: the best earlier blocks by the pooled queries of the block before."""
    mask, time, context = part.value.mask, x.shape[1], Context.of(x.shape[1], 0, None, None, x.device)
    q = part.q_norm(part.q(x).unflatten(-1, (part.heads, -1)))
    k = part.k_norm(part.k(x).unflatten(-1, (part.kv_heads, -1)))
    expected = torch.zeros(len(x), part.heads, time, time, dtype=torch.bool)
    for row in range(len(x)):
        for head in range(part.heads):
            group = head // (part.heads // part.kv_heads)
            members = range(group * (part.heads // part.kv_heads), (group + 1) * (part.heads // part.kv_heads))
            asks = torch.stack([q[row, :, member] for member in members]).mean(0)
            for t in range(time):
                own = t // mask.block
                allowed = set(range(own * mask.block, t + 1))
                if own:
                    ask = asks[(own - 1) * mask.block : own * mask.block].mean(0)
                    means = [k[row, j * mask.block : (j + 1) * mask.block, group].mean(0) for j in range(own)]
                    ranked = sorted((s, j) for j, mean in enumerate(means) if (s := scores(ask, mean, j)) is not None)
                    for _, j in ranked[-mask.top :]:
                        allowed |= set(range(j * mask.block, (j + 1) * mask.block))
                expected[row, head, t, list(allowed)] = True
    assert context.time == time
    return expected


def test_routed_blocks_are_those_of_the_definition():
    part, x = module(Routed(block=4, top=2), position=NoPE()), torch.randn(2, 27, 24)
    with torch.no_grad():
        assert torch.equal(looked_at(part, x), by_hand(part, x, lambda ask, mean, j: float(ask @ mean)))
        assert not torch.equal(looked_at(part, x), by_hand(part, x, lambda ask, mean, j: j))


def test_hashed_blocks_are_those_of_the_definition():
    mask = Hashed(block=4, top=2, buckets=4, rounds=2, seed=5)
    part, x = module(mask, position=NoPE()), torch.randn(2, 27, 24)

    def meets(ask, mean, j):
        directions = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(5))
        buckets = [[int(torch.cat([y @ d, -(y @ d)]).argmax()) for d in directions] for y in (ask, mean)]
        return j if any(a == b for a, b in zip(*buckets, strict=True)) else None

    with torch.no_grad():
        assert torch.equal(looked_at(part, x), by_hand(part, x, meets))


def test_a_choice_prefers_what_it_asks_for():
    """A block whose keys are the query gets chosen, and one that has not ended cannot be."""
    asks, keys = torch.zeros(1, 1, 6, 2, 4), torch.zeros(1, 1, 6, 2, 4)
    asks[..., 0], keys[0, 0, 2, :, 0] = 1.0, 1.0
    index = torch.arange(6)[None]
    choice = block_sparse.choose(Routed(block=2, top=1), asks, keys, index)
    assert choice[0, 0, 3:, 0].tolist() == [2, 2, 2] and choice[0, 0, :, 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert choice[0, 0, 2, 0] != 2


# ---- the contract, with every sequence gathered


@pytest.mark.parametrize("name", ["sliding_window", "window_and_sinks", "strided", "local_global", "routed", "hashed"])
def test_families_keep_the_contract_where_all_is_gathered(name):
    model = randomise(FAMILIES[name]().build()).eval()
    calls = []

    def always(mask, context):
        calls.append(mask)
        return not context.past

    with patch.object(block_sparse, "worthwhile", always):
        checks.causality(model)
        checks.masked_is_removed(model)
        checks.left_padded_is_unpadded(model)
        checks.packed_is_separate(model)
        checks.state_law(model, examples=15)
    assert calls


def test_short_sequences_are_read_densely():
    for length, expected in ((512, False), (2048, True)):
        context = Context.of(length, 0, None, None, torch.device("cpu"))
        assert block_sparse.worthwhile(Causal(window=2 * BLOCK), context) is expected
        assert block_sparse.worthwhile(Routed(block=64, top=4), context) is expected
        assert block_sparse.worthwhile(Strided(stride=128, local=128), context) is expected
        assert not block_sparse.worthwhile(Causal(), context)


# ---- savings


def kept_bytes(part, time: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, context = torch.randn(1, time, 24, requires_grad=True), Context.of(time, 0, None, None, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        part.prepare(context)
        y = part(x, context)
    assert y.requires_grad
    return sum(kept.values())


LEAN = [Causal(window=16), Causal(window=16, sinks=2), Routed(block=16, top=2), Strided(stride=64, local=16)]


@pytest.mark.parametrize("mask", LEAN, ids=repr)
def test_memory_grows_with_the_sequence_and_not_its_square(mask, monkeypatch):
    part = module(mask, softcap=5.0)  # the plain form, which would keep a pattern
    monkeypatch.setattr(block_sparse, "PRICE", 0)
    monkeypatch.setattr(block_sparse, "LAID_OUT", 0)
    small, large = kept_bytes(part, 512), kept_bytes(part, 2048)
    assert large < 4.3 * small
    with patch.object(block_sparse, "worthwhile", lambda *_: False), patch.object(attend_module, "PIECE", 10**9):
        assert kept_bytes(part, 2048) > 12 * kept_bytes(part, 512)


def test_soft_caps_and_sinks_in_pieces_are_those_at_once():
    for settings in ({"softcap": 2.0}, {"sink": True, "position": ALiBi()}, {"sink": True, "mask": Full()}):
        part = fill(Attention(heads=4, kv_heads=2, **settings).build(24))
        for case in CASES.values():
            whole = run(part, case, dense=True)
            with patch.object(attend_module, "PIECE", 7):
                assert_same(run(part, case, dense=True), whole)
    assert kept_bytes(part, 1024) < 5 * kept_bytes(part, 256)


# ---- the window's state


def windowed(mask=None, **settings) -> Decoder:
    return Decoder(
        vocab=53, width=24, layers=(Block(mixer=Attention(heads=2, mask=mask or Causal(window=3), **settings)),), context=400
    )


@pytest.mark.parametrize(
    "settings", [{}, {"position": ALiBi()}, {"mask": Causal(window=3, sinks=2), "position": T5Bias()}], ids=str
)
@torch.no_grad()
def test_a_window_that_has_slid_far_is_still_the_window(settings):
    model = randomise(windowed(**settings).build())
    tokens, padding = checks.random_tokens(model, 2, 150), torch.tensor([0, 7])
    expected = model(tokens, padding=padding)
    state, at, pieces = model.new_state(2), 0, []
    for length in [5, 1, 1, 60, *[1] * 50, 3, 30]:
        pieces.append(model(tokens[:, at : at + length], state=state, padding=None if at else padding))
        at += length
    assert at == 150
    checks.assert_close(torch.cat(pieces, dim=1)[:, 7:], expected[:, 7:])


@torch.no_grad()
def test_a_window_rewinds_as_far_as_one_likes():
    model = randomise(windowed(Causal(window=3, sinks=2)).build())
    tokens = checks.random_tokens(model, 2, 120)
    expected = model(tokens)
    for kept, reread in ((110, 0), (90, 90), (2, 2), (0, 0)):
        state = model.new_state(2)
        for start in range(0, 120, 5):
            model(tokens[:, start : start + 5], state=state)
        state.rewind(120 - kept)
        assert state.pending == reread  # what is still held need not be read again
        checks.assert_close(model(tokens[:, kept:], state=state), expected[:, kept:])


def test_the_state_of_a_window_does_not_grow():
    model = windowed(Causal(window=3, sinks=2)).build()
    sizes = []
    for context in (100, 200, 400):
        state, ledger = model.new_state(2, context), model.ledger(context)
        assert state.bytes == 2 * 2 * (ledger.fixed_state_bytes + context * ledger.state_bytes)  # two rows of four bytes
        sizes.append(state.bytes)
    assert sizes[0] == sizes[1] == sizes[2]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="must not exceed the stride"):
        Strided(stride=3, local=4)
    with pytest.raises(ValueError, match="even"):
        Hashed(buckets=5)
