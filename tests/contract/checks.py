"""The identities that every family must keep: forward, state, inspection. One function each, `check(model)`.

A check raises AssertionError where the model does not keep it; `bugs` has at least one planted bug that makes it raise.
Exact means exact; everything else is compared in float32 to 1e-5 of the largest value.
"""

from itertools import pairwise

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from headspring.artifacts import UserError
from headspring.models.moe import MoEModule

TOLERANCE = 1e-5


def streams(model) -> list[tuple[str, object]]:
    """The stacks of a model and how their sites begin; what answers to the tokens comes last."""
    if not model.config.reads_source:
        return [("", getattr(model, "body", model))]
    return [("encoder.", model.encoder), ("decoder.", model.decoder)]


def sourced(model):
    """An encoder–decoder that reads the same source in every row, whoever gives it none: as a function of its tokens it owes
    what a decoder owes. Sources that differ are the business of tests/models/test_encoder_decoder.py."""
    if not model.config.reads_source:
        return model
    original = model.forward

    def forward(tokens, state=None, segments=None, padding=None, source=None, source_padding=None):
        if source is None and (state is None or state.memory is None):
            source = torch.arange(3, 10).expand(len(tokens), -1)
        return original(tokens, state, segments, padding, source, source_padding)

    model.forward = forward
    return model


def random_tokens(model, rows: int, time: int, seed: int = 0) -> torch.Tensor:
    low = int(model.config.counted)  # what is counted begins documents with token 0, and knows it nowhere else
    return torch.randint(low, model.config.vocab, (rows, time), generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    worst = float((found - expected).detach().abs().max())
    assert worst <= TOLERANCE * max(1.0, float(expected.detach().abs().max())), f"differs by {worst:.2e}"


# ---- forward


@torch.no_grad()
def shapes(model):
    """(B, T) → hidden (B, T, D) → logits (B, T, V) in float32, finite; also for one row and one token."""
    for rows, time in ((3, 7), (1, 1), (2, model.config.context)):
        hidden = model(random_tokens(model, rows, time))
        logits = model.logits(hidden)
        assert hidden.shape == (rows, time, model.config.width)
        assert logits.shape == (rows, time, model.config.vocab) and logits.dtype == torch.float32
        assert logits.isfinite().all()


def influence(model, tokens, row: int, time: int, **masks) -> torch.Tensor:
    """(B, T): how much each input moves the hidden state at (row, time), as the size of a gradient."""
    if model.config.counted:
        return influence_of_tokens(model, tokens, row, time, **masks)
    leaves = []

    def leaf(x):
        leaves.append(x.detach().requires_grad_())
        return leaves[0]

    stem, _ = streams(model)[-1]
    with model.sites.edit({f"{stem}embed": leaf}):
        hidden = model(tokens, **masks)[row, time]
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(time))
    (gradient,) = torch.autograd.grad(hidden @ direction, leaves)
    return gradient.abs().sum(-1)


@torch.no_grad()
def influence_of_tokens(model, tokens, row: int, time: int, **masks) -> torch.Tensor:
    """The same without gradients: what another token in each place changes."""
    before, moved = model(tokens, **masks)[row, time], torch.zeros(tokens.shape)
    for place in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
        other = tokens.clone()
        other[place[0], place[1]] = tokens[place[0], place[1]] % (model.config.vocab - 1) + 1
        moved[place[0], place[1]] = (model(other, **masks)[row, time] - before).abs().sum()
    return moved


def causality(model):
    """The gradient of position t with respect to inputs after t is exactly 0, masks or no masks; that of t is not."""
    tokens, time = random_tokens(model, 2, 9), 9
    segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 7])
    for masks in ({}, {"padding": torch.tensor([0, 3])}, {"segments": segments}):
        for t in range(4, time):
            moved = influence(model, tokens, 1, t, **masks)
            assert moved[1, t + 1 :].count_nonzero() == 0, f"position {t} sees the future"
            assert moved[1, t] > 0
    assert (influence(model, tokens, 1, 8)[1, 6:] > 0).all()  # as far as the shortest window reaches


def sees_both_ways(model):
    """Every token of a row or document moves every other one of it: the counterpart of causality."""
    tokens = random_tokens(model, 2, 9)
    moved = [influence(model, tokens, 1, t)[1] for t in range(9)]
    for t in range(9):
        assert (moved[t] > 0).all(), f"position {t} does not see the whole row"


def has_no_state(model):
    """What every later token changes cannot be kept: a state is refused in one line."""
    try:
        model.new_state(1, 8)
    except UserError as error:
        assert "no state" in str(error) and "\n" not in str(error)
        return
    raise AssertionError("gave a state to a model that cannot keep one")


def masked_is_removed(model):
    """Pads and other documents have no influence at all, and what they hold changes nothing, bit for bit (but for experts)."""
    tokens, other = random_tokens(model, 2, 9), random_tokens(model, 2, 9, seed=1)
    padding = torch.tensor([4, 0])
    segments = torch.tensor([[0] * 4 + [1] * 5] * 2)
    for masks in ({"padding": padding}, {"segments": segments}):
        assert influence(model, tokens, 0, 8, **masks)[0, :4].count_nonzero() == 0
        with torch.no_grad():
            changed = torch.cat([other[:, :4], tokens[:, 4:]], dim=1)
            before, after = model(tokens, **masks)[0, 4:], model(changed, **masks)[0, 4:]
        assert_close(after, before)
        # An expert multiplies more or fewer rows when others go elsewhere, and the last bit of a product depends on that.
        assert torch.equal(before, after) or any(isinstance(module, MoEModule) for module in model.modules())


@torch.no_grad()
def one_row_is_many_rows(model):
    """A row has the same hidden states alone and beside others."""
    tokens = random_tokens(model, 5, 11)
    together = model(tokens)
    for row in range(5):
        assert_close(together[row : row + 1], model(tokens[row : row + 1]))


@torch.no_grad()
def left_padded_is_unpadded(model):
    """A row behind pads has the hidden states of the row without them."""
    tokens, padding = random_tokens(model, 4, 12), torch.tensor([0, 1, 5, 11])
    padded = model(tokens, padding=padding)
    assert padded.isfinite().all()  # a pad sees only itself, which is no reason for NaN
    for row, pads in enumerate(padding.tolist()):
        assert_close(padded[row, pads:], model(tokens[row : row + 1, pads:])[0])


@torch.no_grad()
def packed_is_separate(model):
    """Documents packed in one row have the hidden states of documents in rows of their own."""
    tokens, lengths = random_tokens(model, 2, 15), [[4, 1, 10], [7, 6, 2]]
    segments = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in lengths])
    packed = model(tokens, segments=segments)
    for row in range(2):
        for document in range(3):
            place = segments[row] == document
            assert_close(packed[row, place], model(tokens[row : row + 1, place])[0])


# ---- state


def state_law(model, examples: int = 60):
    """Parallel = chunked = step by step = any split of the cache = any padding: all equal each row alone, at once."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    @torch.no_grad()
    def law(data):
        rows, time = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 14))
        pads = data.draw(st.none() | st.lists(st.integers(0, time - 1), min_size=rows, max_size=rows))
        cuts = data.draw(st.just(range(1, time)) | st.sets(st.integers(1, time - 1)))
        tokens = random_tokens(model, rows, time, seed=data.draw(st.integers(0, 99)))
        chunked = in_chunks(model, tokens, sorted(cuts), None if pads is None else torch.tensor(pads))
        for row in range(rows):
            start = pads[row] if pads else 0
            assert_close(chunked[row, start:], model(tokens[row : row + 1, start:])[0])

    law()


def in_chunks(model, tokens, cuts, padding=None) -> torch.Tensor:
    """Hidden states of tokens given to a state in pieces that end at `cuts`."""
    state, edges = model.new_state(len(tokens), tokens.shape[1]), [0, *cuts, tokens.shape[1]]
    pieces = []
    for start, end in pairwise(edges):
        pieces.append(model(tokens[:, start:end], state=state, padding=None if start else padding))
    assert state.length == tokens.shape[1]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def rewind(model):
    """A state that forgot its last tokens goes on as if it had never read them."""
    tokens, wrong = random_tokens(model, 2, 12), random_tokens(model, 2, 4, seed=1)
    padding = torch.tensor([0, 2])
    state = model.new_state(2, 12)
    model(tokens[:, :6], state=state, padding=padding)
    model(wrong, state=state)
    state.rewind(4)
    assert state.length == 6
    assert_close(model(tokens[:, 6:], state=state), model(tokens, padding=padding)[:, 6:])


@torch.no_grad()
def select(model):
    """Rows of a state can be dropped, reordered and doubled, their padding with them."""
    tokens, padding = random_tokens(model, 3, 12), torch.tensor([0, 3, 5])
    rows = torch.tensor([2, 0, 2, 1])
    state = model.new_state(3, 12)
    model(tokens[:, :8], state=state, padding=padding)
    state.select(rows)
    expected = model(tokens[rows], padding=padding[rows])[:, 8:]
    assert_close(model(tokens[rows, 8:], state=state), expected)


@torch.no_grad()
def fork(model):
    """Copies of a row stand side by side and go their own ways."""
    tokens, padding = random_tokens(model, 2, 6), torch.tensor([0, 2])
    answers = random_tokens(model, 6, 4, seed=1)
    state = model.new_state(2, 10)
    model(tokens, state=state, padding=padding)
    state.fork(3)
    whole = torch.cat([tokens.repeat_interleave(3, dim=0), answers], dim=1)
    expected = model(whole, padding=padding.repeat_interleave(3))[:, 6:]
    assert_close(model(answers, state=state), expected)


# ---- inspection


@torch.no_grad()
def looking_changes_nothing(model):
    """Captured sites leave the logits bit for bit as they were; those that no fused kernel forms (the attention pattern)
    leave them equal to rounding. Nothing stays behind."""
    tokens = random_tokens(model, 2, 9)
    plain = model.logits(model(tokens))
    with model.sites.capture(set(model.sites.names) - model.sites.plain):
        assert torch.equal(model.logits(model(tokens)), plain)
    with model.sites.capture(model.sites.names) as seen:
        assert_close(model.logits(model(tokens)), plain)
    assert set(seen) == set(model.sites.names)
    assert torch.equal(model.logits(model(tokens)), plain)


@torch.no_grad()
def the_stream_is_the_sum_of_its_parts(model):
    """embed → pre, pre + mixer → mid, mid + feed-forward → post, through whatever norms the family puts around them."""
    with model.sites.capture(model.sites.names) as seen:
        model(random_tokens(model, 2, 9))
    for stem, stack in streams(model):
        is_the_sum_of_its_parts(stack, {name.removeprefix(stem): value for name, value in seen.items()})


def is_the_sum_of_its_parts(stack, seen: dict[str, torch.Tensor]) -> None:
    stream = seen["embed"]
    for i, block in enumerate(stack.layers):
        assert torch.equal(seen[f"layers.{i}.residual.pre"], stream)
        parts = ((block.mixer, "mixer", "mid"), (block.cross, "cross", "cross"), (block.feedforward, "mlp", "post"))
        for branch, part, place in parts:
            if branch is None:
                continue
            y = seen[f"layers.{i}.{part}.out"]
            y = y if branch.post is None else branch.post(y)
            stream = branch.skip * stream + y if branch.residual else y
            stream = stream if branch.out is None else branch.out(stream)
            assert_close(seen[f"layers.{i}.residual.{place}"], stream)
            stream = seen[f"layers.{i}.residual.{place}"]
    assert torch.equal(seen["final"], stream if stack.norm is None else stack.norm(stream))


@torch.no_grad()
def patching_everything_restores_everything(model):
    """Any one cut through the stream, put back from a clean run, gives the clean output whatever the tokens were."""
    clean, corrupt = random_tokens(model, 2, 9), random_tokens(model, 2, 9, seed=1)
    with model.sites.capture(model.sites.names) as seen:
        expected = model(clean)
    assert not torch.allclose(model(corrupt), expected)
    stem, stack = streams(model)[-1]
    sites = [name for name in model.sites.names if name.startswith(stem)]
    parallel = [f"{stem}layers.{i}.residual.mid" for i, block in enumerate(stack.layers) if block.parallel]
    cuts = [[f"{stem}embed"]]  # between branches that read the same, there is no cut
    cuts += [[name] for name in sites if ".residual." in name and name not in parallel]
    cuts.append([f"{stem}embed", *(name for name in sites if name.endswith((".mixer.out", ".cross.out", ".mlp.out")))])
    for names in cuts:
        with model.sites.edit({name: give(seen[name]) for name in names}):
            assert_close(model(corrupt), expected)
    last = f"{stem}layers.{len(stack.layers) - 1}.mixer"
    parts, out = [f"{last}.{part}" for part in stack.layers[-1].mixes.cut], f"{last}.out"
    if not set(parts) <= set(model.sites.names):
        return
    with model.sites.edit({name: give(seen[name]) for name in parts}), model.sites.capture([out]) as again:
        model(corrupt)
    assert_close(again[out], seen[out])


def give(value: torch.Tensor):
    return lambda _: value
