"""The identities that training and formats must keep for every family. `check(model)`; see `checks`."""

import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, Batch, Sample, Visit
from headspring.models import dialects, folder
from headspring.models.families import FAMILIES
from headspring.training import loop
from headspring.training.callbacks import Callback
from headspring.training.config import TrainConfig
from headspring.training.masked import MaskedTokens
from headspring.training.objective import NextToken
from headspring.training.optimizers import AdamW, build_optimizers
from headspring.training.schedule import WarmupStableDecay
from tests.contract.checks import assert_close, random_tokens, sourced

LENGTH = 12
TRAINED = {name: tiny for name, tiny in FAMILIES.items() if not tiny().counted}  # the families that gradients train


class Stream:
    """Random rows that depend on their index alone; rows `distinct` apart are the same. Some targets carry no loss, and
    rows carry different numbers of them, so that a mean of means is another number."""

    sequence_length = LENGTH

    def __init__(self, vocab: int, distinct: int = 1000):
        self.vocab, self.distinct = vocab, distinct

    def sample(self, index: int) -> Sample:
        generator = np.random.default_rng(index % self.distinct)
        tokens = generator.integers(0, self.vocab, LENGTH + 1)
        targets = tokens[1:].copy()
        targets[generator.random(LENGTH) < 0.15 * (index % 5)] = IGNORE
        return Sample(tokens[:-1], targets, np.zeros(LENGTH, dtype=np.int32))

    def where(self, document_id: str) -> list[Visit]:
        return []


class HiddenStream(Stream):
    """The same rows for a model that sees both ways, whose targets stand at their own places: every third token is hidden,
    and a few others."""

    def sample(self, index: int) -> Sample:
        generator = np.random.default_rng(index % self.distinct)
        tokens = generator.integers(0, self.vocab - 1, LENGTH)
        hidden = (np.arange(LENGTH) % 3 == 1) | (generator.random(LENGTH) < 0.1 * (index % 5))
        inputs, targets = np.where(hidden, self.vocab - 1, tokens), np.where(hidden, tokens, IGNORE)
        return Sample(inputs, targets, np.zeros(LENGTH, dtype=np.int32))


class SourcedStream(Stream):
    """The same rows for a model that reads a source, another one for each row and of another length."""

    def sample(self, index: int) -> Sample:
        generator = np.random.default_rng((index % self.distinct, 1))
        return replace(super().sample(index), source=generator.integers(0, self.vocab, 5 + index % 3))


def lesson(model, distinct: int = 1000) -> tuple[NextToken, Stream]:
    """The objective of a family and rows to try it on."""
    vocab = model.config.vocab
    if model.config.causal:
        return NextToken(), (SourcedStream if model.config.reads_source else Stream)(vocab, distinct)
    return MaskedTokens(), HiddenStream(vocab, distinct)


def config(**changes) -> TrainConfig:
    settings = {"steps": 6, "batch_size": 4, "precision": "fp32", "compile": "never", "checkpoint_every": 100}
    return TrainConfig(**(settings | changes))


class StopAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_step(self, run, record):
        if run.step == self.step:
            signal.raise_signal(signal.SIGTERM)


def overfits_one_batch(model):
    """Four rows of random tokens can be learned by heart: nothing between input and loss is cut or lost."""
    student = model.config.build(seed=1)
    settings = config(steps=80, batch_size=4, optimizer=AdamW(learning_rate=0.02, weight_decay=0.0),
                      schedule=WarmupStableDecay())  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        result = loop.train(student, *lesson(model, distinct=4), settings, Path(place))
    assert result.loss < 0.2, f"loss {result.loss:.3f} after {result.steps} steps on one batch"


def resume_is_bitwise(model):
    """A run that is stopped after three of six steps and goes on ends with the very same bits."""
    taught = lesson(model)
    whole, parts = model.config.build(seed=1), model.config.build(seed=1)
    with tempfile.TemporaryDirectory() as place:
        loop.train(whole, *taught, config(), Path(place) / "whole")
        with pytest.raises(loop.Interrupted):
            loop.train(parts, *taught, config(), Path(place) / "parts", [StopAt(3)])
        parts = model.config.build(seed=2)  # whatever is not in the checkpoint is lost
        loop.train(parts, *taught, config(), Path(place) / "parts")
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(a, b), f"{name} differs"


def gradients(model, **changes) -> dict[str, torch.Tensor]:
    """The gradients of a run's first step, as the loop forms them here, in this process or group of processes."""
    settings = config(batch_size=8, **changes)
    optimizers = build_optimizers(model, settings.optimizer)
    run = loop.Run(model, *lesson(model), settings, optimizers, torch.device("cpu"), settings.steps)
    loop._forward_backward(run)
    parameters = dict(model.named_parameters())  # a head that is not asked has no gradient, which counts as zero
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in expected:
        worst = float((found[name] - expected[name]).abs().max())
        assert worst <= 1e-5 * scale, f"{name}: differs by {worst / scale:.1e} of the largest gradient"


def accumulation_is_one_batch(model):
    """Micro-batches of 1 and 3 give the gradient of the batch of 8."""
    whole = gradients(model)
    for size in (1, 3):
        assert_same_gradients(gradients(model, micro_batch_size=size), whole)


def batch_of(model, masked: bool = False) -> Batch:
    tokens = random_tokens(model, 3, LENGTH + 1)
    targets = tokens[:, 1:].clone()
    targets[0, :7] = IGNORE
    targets[2] = IGNORE
    return Batch(tokens[:, :-1], torch.full_like(targets, IGNORE) if masked else targets)


def loss_mask_is_respected(model):
    """The summed loss is −Σ log softmax over the unmasked targets, here written out in float64."""
    batch = batch_of(model)
    objective, _ = lesson(model)
    loss, _ = objective.loss(model, batch)
    with torch.no_grad():
        wide = model.logits(model(batch.inputs)).double().log_softmax(-1)
    places = [(row, time) for row in range(3) for time in range(LENGTH) if batch.targets[row, time] != IGNORE]
    expected = -sum(wide[row, time, batch.targets[row, time]] for row, time in places)
    assert objective.count(batch) == len(places) == 5 + LENGTH
    assert_close(loss.double(), expected)


def an_all_masked_batch_is_zero(model):
    """No trained token: loss 0, gradients 0, no NaN."""
    model.zero_grad()
    loss, _ = lesson(model)[0].loss(model, batch_of(model, masked=True))
    loss.backward()
    assert float(loss.detach()) == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.count_nonzero() == 0, name


@torch.no_grad()
def counts_are_those_of_documents(model):
    """The order of documents does not matter, nothing is counted across their borders, and what was read is expected."""
    draw = np.random.default_rng(1)
    documents = [np.array([model.config.bos, *draw.integers(1, model.config.vocab, 12)]) for _ in range(3)]
    tokens, found = torch.tensor(np.stack(documents)), []
    for order in (documents, documents[::-1]):
        student = model.config.build()
        student.count(order)
        found.append(student(tokens))
    assert torch.equal(*found)
    right = found[0][:, 3:-1].argmax(-1) == tokens[:, 4:]
    assert right.float().mean() > 0.9
    after_the_end = student(tokens[:, -2:])[:, -1].exp()  # bos never follows, so that all it knows is the unigrams
    assert (after_the_end.max(-1).values < 0.5).all(), "something was counted over the end of a document"


# ---- formats


def refusal(model, place) -> str:
    try:
        dialects.export_huggingface(model, place)
    except UserError as error:
        return str(error)
    return "exported what the format has no words for"


@torch.no_grad()
def saved_and_loaded_is_bitwise(model):
    """Config, weights and hidden states come back from a folder as they were."""
    with tempfile.TemporaryDirectory() as place:
        folder.save_model(model, Path(place))
        loaded = sourced(folder.load_model(Path(place)))
    assert loaded.config == model.config
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    tokens = random_tokens(model, 2, 9)
    assert torch.equal(loaded(tokens), model(tokens))


@torch.no_grad()
def exported_is_the_same_in_transformers(model):
    """`transformers` gives the same logits and the way back the same bits; what it has no words for is refused."""
    transformers = pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as place:
        if dialects.expresses(model.config) is None:
            assert "cannot express this model" in refusal(model, place)
            return
        dialects.export_huggingface(model, place)
        kind = "Seq2SeqLM" if model.config.reads_source else "CausalLM" if model.config.causal else "MaskedLM"
        theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(place, attn_implementation="eager")
        back = dialects.import_huggingface(place)
    tokens = random_tokens(model, 2, 9)
    if model.config.reads_source:
        source = random_tokens(model, 2, 7, seed=1)
        assert_close(theirs(source, decoder_input_ids=tokens).logits, model.logits(model(tokens, source=source)))
    else:
        assert_close(theirs(tokens).logits, model.logits(model(tokens)))
    for (name, a), b in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b), name
