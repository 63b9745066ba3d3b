"""Heads beside the next token's: what they leave alone, what they learn, and that they come back from a folder."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, Batch
from headspring.data.rows import Rows, join_labelled, join_scored
from headspring.models import Attention, Block, Decoder, SwiGLU, repeat
from headspring.models.early_exit import exit_after
from headspring.models.folder import load_model, save_model
from headspring.models.heads import Classifier, Headed, MultiToken, ValueHead
from headspring.models.pooling import Pooling
from headspring.training.config import TrainConfig
from headspring.training.heads import Ahead, Labels, LayerSkip, Values, chance, exit_weights, targets_ahead
from headspring.training.loop import train
from headspring.training.objective import NextToken
from headspring.training.optimizers import AdamW
from tests.models.conftest import randomise

VOCAB = 23
BLOCK = Block(mixer=Attention(heads=4, kv_heads=2), feedforward=SwiGLU(hidden=40))
BODY = Decoder(vocab=VOCAB, width=24, layers=repeat(3, BLOCK), context=32)
TRAINING = {"batch_size": 16, "precision": "fp32", "compile": "never", "checkpoint_every": 10_000}


def config(steps: int) -> TrainConfig:
    return TrainConfig(steps=steps, optimizer=AdamW(learning_rate=0.01, weight_decay=0.0), **TRAINING)


def ramps(rows: int, length: int = 13, seed: int = 0) -> torch.Tensor:
    """Rows that count up by their own stride: two tokens tell all that follow."""
    draw = np.random.default_rng(seed)
    start, stride = draw.integers(0, VOCAB, (rows, 1)), draw.integers(1, 5, (rows, 1))
    return torch.from_numpy((start + stride * np.arange(length)) % VOCAB)


def join(rows) -> Batch:
    tokens = torch.stack(list(rows))
    return Batch(tokens[:, :-1], tokens[:, 1:])


RAMPS = Rows(list(ramps(256)), join, sequence_length=12)


# ---- tokens further ahead


@pytest.mark.parametrize("chained", [True, False])
def test_the_main_path_is_that_of_the_body(chained):
    model = randomise(Headed(body=BODY, heads={"ahead": MultiToken(block=BLOCK, chained=chained)}).build())
    alone = BODY.build()
    alone.load_state_dict(model.body.state_dict())
    tokens = ramps(3)
    assert torch.equal(model(tokens), alone(tokens))
    assert torch.equal(model.logits(model(tokens)), alone.logits(alone(tokens)))


@pytest.mark.parametrize("chained", [True, False])
@torch.no_grad()
def test_foresight_reads_no_token_that_it_is_to_guess(chained):
    """Step k at place i has seen tokens up to i + k (chained) or i (parallel), and the last of them matters."""
    model = randomise(Headed(body=BODY, heads={"ahead": MultiToken(ahead=2, block=BLOCK, chained=chained)}).build())
    head, tokens, place = model.heads["ahead"], ramps(1), 5
    before = list(head.foresee(model.body, model(tokens), tokens))
    for number, states in enumerate(before, 1):
        assert states.shape == (1, tokens.shape[1] - number, 24)
        last = place + number if chained else place
        for changed, same in ((last + 1, True), (last, False)):
            other = tokens.clone()
            other[0, changed] = (other[0, changed] + 7) % VOCAB
            after = list(head.foresee(model.body, model(other), other))[number - 1]
            assert torch.equal(after[0, place], states[0, place]) == same


def test_targets_stop_at_the_border_of_a_document():
    targets, segments = torch.arange(6)[None], torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert targets_ahead(targets, None, 2).tolist() == [[2, 3, 4, 5]]
    assert targets_ahead(targets, segments, 2).tolist() == [[2, IGNORE, IGNORE, 5]]


@torch.no_grad()
def test_packed_documents_foresee_as_separate_ones():
    model = randomise(Headed(body=BODY, heads={"ahead": MultiToken(ahead=2, block=BLOCK)}).build())
    first, second = ramps(1, 6), ramps(1, 7, seed=1)
    packed, segments = torch.cat([first, second], 1), torch.tensor([[0] * 6 + [1] * 7])
    together = list(model.heads["ahead"].foresee(model.body, model(packed, segments=segments), packed, segments))
    alone = list(model.heads["ahead"].foresee(model.body, model(second), second))
    for packed_states, states in zip(together, alone):
        torch.testing.assert_close(packed_states[:, 6:], states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chained", [True, False])
def test_trained_drafts_are_what_the_model_says(chained, tmp_path):
    model = Headed(body=BODY, heads={"ahead": MultiToken(ahead=2, block=BLOCK, chained=chained)}).build()
    train(model, Ahead(weight=1.0), RAMPS, config(150), tmp_path)
    drafted = agreement(model)
    assert drafted[0] == 1.0  # the next token is the model's own
    assert min(drafted[1:]) > 0.7  # chance is 1 / 23
    with patch.object(type(model.heads["ahead"].steps[0]), "forward", lambda self, x, *rest: torch.zeros_like(x)):
        assert max(agreement(model)[1:]) < 0.4  # the control: a head that knows nothing


@torch.no_grad()
def agreement(model) -> list[float]:
    """How often each drafted token is what the model itself says next, given all before it."""
    tokens = ramps(64, 7, seed=5)
    drafts, said = model.draft(tokens, model(tokens)), tokens
    for _ in range(drafts.shape[1]):
        said = torch.cat([said, model.logits(model(said)[:, -1:]).argmax(-1)], 1)
    return (drafts == said[:, 7:]).float().mean(0).tolist()


def test_what_heads_are_not_for_is_refused():
    with pytest.raises(ValueError, match="leave it out"):
        Headed(width=25, body=BODY, heads={"value": ValueHead()})
    with pytest.raises(ValueError, match="has seen nothing"):
        Headed(body=BODY, heads={"topic": Classifier(labels=("a", "b"), pooling=Pooling(mode="first"))})
    with pytest.raises(UserError, match=r"needs one MultiToken among the heads of the model, which are: value"):
        Ahead().loss(Headed(body=BODY, heads={"value": ValueHead()}).build(), join(ramps(2)))
    with pytest.raises(UserError, match="needs one ValueHead among the heads of the model, which are: none"):
        Values().loss(BODY.build(), join_scored([(np.arange(3), np.zeros(3))]))


# ---- early exit


@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.no_grad()
def test_an_exit_is_the_truncated_model(layers):
    model, tokens = randomise(BODY.build()), ramps(2)
    short = BODY.model_copy(update={"layers": BODY.layers[:layers]}).build()
    short.load_state_dict({name: value for name, value in model.state_dict().items() if name in short.state_dict()})
    view = exit_after(model, layers)
    assert torch.equal(view(tokens), short(tokens)) and view.config == short.config
    state = view.new_state(2, 13)
    pieces = [view(tokens[:, :5], state=state), view(tokens[:, 5:], state=state)]
    torch.testing.assert_close(torch.cat(pieces, 1), short(tokens), rtol=1e-5, atol=1e-5)
    assert {id(p) for p in view.parameters()} <= {id(p) for p in model.parameters()}
    assert torch.equal(exit_after(model, 3)(tokens), model(tokens))
    with pytest.raises(ValueError, match="cannot leave after layer 4: this model has 3"):
        exit_after(model, 4)


def test_the_loss_of_layer_skip_is_the_weighted_loss_of_its_exits():
    model, batch = randomise(BODY.build()).eval(), join(ramps(4))
    weights = exit_weights(3, 0.2)
    assert sum(weights) == pytest.approx(1) and weights == sorted(weights)
    expected = sum(w * float(NextToken().loss(exit_after(model, k), batch)[0].detach()) for k, w in enumerate(weights, 1))
    assert float(LayerSkip().loss(model, batch)[0].detach()) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_layers_are_left_out_by_row_and_never_the_first():
    model, batch = randomise(BODY.build()).train(), join(ramps(64))
    skip = LayerSkip(dropout=0.9)
    with model.sites.edit(skip._left_out(batch.inputs, 3)), model.sites.capture(model.sites.names) as seen:
        hidden = model(batch.inputs)
    left = [
        (seen[f"layers.{i}.residual.pre"] == seen[f"layers.{i}.residual.post"]).flatten(1).all(1).float().mean()
        for i in range(3)
    ]
    assert left[0] == 0 and 0.2 < left[1] < 0.55 and 0.7 < left[2] <= 1
    with model.sites.edit(skip._left_out(batch.inputs[7:9], 3)):  # the same rows elsewhere are cut alike
        torch.testing.assert_close(model(batch.inputs[7:9]), hidden[7:9], rtol=1e-5, atol=1e-5)


def test_chance_is_uniform_and_differs_by_layer():
    tokens = torch.arange(8000).reshape(2000, 4)
    first, second = chance(tokens, 0), chance(tokens, 1)
    for drawn in (first, second):
        counts = torch.histc(drawn, 10, 0, 1)
        assert ((counts - 200).square() / 200).sum() < 30  # χ² of 9 degrees of freedom: p > 0.0004
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.08


def test_layer_skip_makes_early_layers_readable(tmp_path):
    """On an easy task; a model that was trained at its last layer alone is the control."""
    found = {}
    for name, objective in (("skip", LayerSkip(dropout=0.2, exit_scale=1.0)), ("plain", NextToken())):
        model = BODY.build(seed=1)
        train(model, objective, RAMPS, config(150), tmp_path / name)
        found[name] = [accuracy(exit_after(model, layers)) for layers in (1, 2, 3)]
    assert found["skip"][1] > found["plain"][1] + 0.2
    assert found["skip"][2] > 0.9


@torch.no_grad()
def accuracy(model) -> float:
    batch = join(ramps(64, seed=9))
    return float((model.logits(model(batch.inputs)).argmax(-1) == batch.targets)[:, 2:].float().mean())


# ---- values and labels


def test_a_value_head_learns_what_is_left(tmp_path):
    """The score of a token is how far it is from the end of its row, seen from a token that says so."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(128):
        left = np.arange(draw.integers(5, 13))[::-1]
        rows.append((left.copy(), np.where(draw.random(len(left)) < 0.2, np.nan, left / 10)))
    model = Headed(body=BODY, heads={"value": ValueHead()}).build()
    result = train(model, Values(), Rows(rows, join_scored, 12), config(80), tmp_path / "run")
    assert result.loss < 0.01 < np.nanvar(np.concatenate([scores for _, scores in rows]))
    save_model(model, tmp_path / "model")
    loaded, batch = load_model(tmp_path / "model"), join_scored(rows[:4])
    values = loaded.heads["value"](loaded(batch.inputs, padding=batch.padding))
    assert torch.equal(values, model.heads["value"](model(batch.inputs, padding=batch.padding)))
    assert float((values - batch.scores).nan_to_num().abs().max()) < 0.4


@pytest.mark.parametrize("mode", ["last", "mean"])
def test_a_classifier_learns_the_stride_of_a_row(mode, tmp_path):
    """Texts of several lengths, padded on the left; a body that is frozen at its random start is the control."""
    draw = np.random.default_rng(1)
    strides = draw.integers(1, 5, 300)
    texts = [(draw.integers(VOCAB) + s * np.arange(draw.integers(4, 12))) % VOCAB for s in strides]
    rows = [(text, int(s) - 1) for text, s in zip(texts, strides)]
    head = Classifier(labels=("one", "two", "three", "four"), pooling=Pooling(mode=mode, normalize=False))
    found = {}
    for frozen in (False, True):
        model = Headed(body=BODY, heads={"stride": head}).build()
        train(model, Labels(frozen=frozen), Rows(rows[:240], join_labelled, 12), config(200), Path(tmp_path) / str(frozen))
        batch = join_labelled(rows[240:])
        said = model.classify("stride", batch.inputs, batch.padding).argmax(-1)
        found[frozen] = float((said == batch.labels).float().mean())
        one = model.classify("stride", torch.from_numpy(rows[240][0])[None])
        torch.testing.assert_close(one[0], model.classify("stride", batch.inputs, batch.padding)[0], rtol=1e-4, atol=1e-4)
    assert found[False] > 0.8 and found[False] > found[True] + 0.2


def test_the_ledger_is_what_is_there():
    made = {"ahead": MultiToken(ahead=2, block=BLOCK), "value": ValueHead(), "topic": Classifier(labels=("a", "b"))}
    model, alone = Headed(body=BODY, heads=made).build(), BODY.build()
    assert model.ledger().parameters == model.num_parameters() > alone.num_parameters()
    assert model.ledger().state_bytes == alone.ledger().state_bytes  # the heads remember nothing
    logits = 2 * 2 * VOCAB * 24
    steps = sum(step.cost("step", 32).flops for step in model.heads["ahead"].steps)
    assert model.ledger().flops == alone.ledger().flops + steps + logits + 2 * 24
