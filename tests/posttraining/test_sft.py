"""SFT learns answers it was never shown, trains only answers, and refuses what it cannot do."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE, Batch, collate
from headspring.data.conversations import PackedConversations, render_targets
from headspring.data.packing import PackedTokens
from headspring.data.shards import TokenShards
from headspring.data.store import read_documents
from headspring.data.task_files import read_tasks, write_tasks
from headspring.data.tasks import TaskConfig
from headspring.inference.language_model import LanguageModel
from headspring.models import load_model
from headspring.posttraining.answers import answer
from headspring.posttraining.held_out import split_tasks
from headspring.posttraining.sft import SFTConfig, blend, sft, text_rows, trained_tokens
from headspring.tokenization.train import TokenizerConfig, train_tokenizer
from headspring.training.objective import NextToken, held_out_loss
from headspring.training.optimizers import AdamW

KINDS = ("name", "parameter_count")


def config(**changes) -> SFTConfig:
    settings = {
        "tasks": TaskConfig(kinds=KINDS, per_kind=60, per_function=2),
        "steps": 60,
        "batch_size": 4,
        "precision": "fp32",
        "optimizer": AdamW(learning_rate=3e-3, weight_decay=0.0),
        "checkpoint_every": 50,
        "validate_every": 30,
    }
    return SFTConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    world.tokens_folder(world.data_folder(folder / "data"), folder / "tokens")
    world.save(world.model(), folder / "base")
    metrics = sft(config(), folder / "base", folder / "data", folder / "tokens", folder / "sft")
    return folder, metrics


def test_held_out_loss_falls_and_the_model_learns_to_stop(world, finished):
    folder, metrics = finished
    assert metrics["validation_after"]["loss"] < 0.5 * metrics["validation_before"]["loss"]
    _, held_out = split_tasks(config().tasks, folder / "data", 0, 30)
    before, after = (LanguageModel.load(folder / name) for name in ("base", "sft"))
    counting = [task for task in held_out if task.kind == "parameter_count"]
    stops = [sum(row[0].stopped for row in answer(lm, counting, 1, 20, 0.0, 0)) for lm in (before, after)]
    right = [sum(row[0].right for row in answer(lm, counting, 1, 20, 0.0, 0)) for lm in (before, after)]
    assert stops[0] < 0.1 * len(counting) and stops[1] == len(counting)
    assert right[0] < 0.1 * len(counting) and right[1] > 0.8 * len(counting)


def test_its_folder_holds_the_model_its_tasks_and_its_log(finished):
    folder, metrics = finished
    records = [json.loads(line) for line in (folder / "sft/logs/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 61)) and "validation" in records[-1]
    train = {document.id for document in read_documents(folder / "data", split="train")}
    tasks = read_tasks(folder / "sft")
    assert {task.document_id for task in tasks} <= train
    assert metrics["conversations"] + metrics["dropped"] == len(tasks) == sum(metrics["tasks"].values())
    assert (folder / "sft/tokenizer.json").exists() and metrics["steps"] == 60


def test_tasks_survive_their_file(world, tmp_path):
    tasks = world.tasks()
    write_tasks(tasks, tmp_path)
    assert read_tasks(tmp_path) == tasks


def gradients(model, batch):
    model.zero_grad()
    objective = NextToken()
    (objective.loss(model, batch)[0] / objective.count(batch)).backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


def separate(world, tasks):
    """The slow, obvious reference: one unpadded conversation at a time."""
    rows = [render_targets(world.tokenizer(), task.conversation) for task in tasks]
    return [Batch(torch.from_numpy(inputs)[None], torch.from_numpy(targets)[None]) for inputs, targets in rows]


def loss_of(model, batches):
    objective = NextToken()
    return sum(objective.loss(model, batch)[0] for batch in batches) / sum(map(objective.count, batches))


def test_packed_conversations_train_as_separate_ones(world):
    tasks, model = world.tasks(kinds=KINDS, per_kind=8), world.model()
    data = PackedConversations(tasks, world.tokenizer(), 256)
    packed = [data.sample(index) for index in range(len(data))]
    alone = separate(world, tasks)
    loss = loss_of(model, alone)
    model.zero_grad()
    loss.backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    together = collate(packed, document_mask=True)
    assert torch.allclose(loss_of(model, [together]), loss, atol=1e-5)
    assert torch.allclose(gradients(model, together), expected, atol=1e-5)
    leaking = collate(packed, document_mask=False)  # the planted bug: conversations see their neighbours
    assert not torch.allclose(loss_of(model, [leaking]), loss, atol=1e-4)


def test_prompts_carry_no_loss(world):
    task, model = world.tasks(kinds=KINDS, per_kind=4)[0], world.model()
    (batch,) = separate(world, [task])
    first = int((batch.targets[0] != IGNORE).nonzero()[0])
    changed = copy.deepcopy(batch)
    changed.targets[0, :first] = 7  # what a mask that is off would train
    assert NextToken().count(changed) > NextToken().count(batch)
    assert not torch.allclose(loss_of(model, [changed]), loss_of(model, [batch]))


def test_epochs_set_the_steps(world, finished, tmp_path):
    folder, _ = finished
    settings = config().model_dump(exclude={"steps"}) | {"epochs": 2, "batch_size": 3}
    metrics = sft(SFTConfig(**settings), folder / "base", folder / "data", folder / "tokens", tmp_path / "sft")
    assert metrics["epochs"] == pytest.approx(2, abs=4 / metrics["rows"])
    with pytest.raises(ValidationError, match="give one of them"):
        SFTConfig(steps=3, epochs=1)


def test_bad_input_is_refused(world, finished, tmp_path):
    folder, _ = finished
    with pytest.raises(UserError, match="longer than the model's context"):
        sft(config(sequence_length=1000), folder / "base", folder / "data", folder / "tokens", tmp_path)
    empty = tmp_path / "data"
    from headspring.data.store import Row, write_documents

    write_documents([Row(item, "train") for item in world.documents()], empty)
    with pytest.raises(UserError, match="validation split"):
        sft(config(), folder / "base", empty, folder / "tokens", tmp_path)
    world.save(world.model(), tmp_path / "base")
    train_tokenizer([item.text for item in world.documents()], TokenizerConfig(vocab_size=390)).save(tmp_path / "base")
    with pytest.raises(UserError, match="another tokenizer"):
        sft(config(), tmp_path / "base", folder / "data", folder / "tokens", tmp_path)


def text_loss(folder, name, world):
    """Nats a token of held-out plain text."""
    text = PackedTokens(TokenShards(folder / "tokens"), "validation", 256, packing="best_fit")
    return held_out_loss(load_model(folder / name), text, len(text), 8, torch.float32, document_mask=True)


def test_pretraining_text_keeps_what_conversations_alone_forget(world, finished):
    """From a model that knows the text: with half of the trained tokens text it still does, with none it forgets."""
    folder, _ = finished
    losses = {}
    for name, base, share in (("knowing", "base", 0.95), ("kept", "knowing", 0.5), ("forgot", "knowing", 0.0)):
        trained = sft(config(pretraining_share=share), folder / base, folder / "data", folder / "tokens", folder / name)
        losses[name] = text_loss(folder, name, world)
    assert trained["trained_tokens"].keys() == {"conversations"}
    assert losses["kept"] < losses["knowing"] < losses["forgot"] - 0.3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_counted_in_trained_tokens(world, finished, share):
    folder, _ = finished
    shards, conversations = TokenShards(folder / "tokens"), PackedConversations(world.tasks(), world.tokenizer(), 256)
    data = blend(conversations, shards, text_rows(share, conversations, shards), 0, 2000)
    trained = trained_tokens(data)
    assert trained["text"] / sum(trained.values()) == pytest.approx(share, abs=0.01)
    assert data.counts["text"] / 2000 < share - 0.05  # the control: a share of rows is another thing


def test_copies_of_held_out_functions_are_not_trained(world, tmp_path):
    from headspring.data.store import Row, write_documents
    from headspring.text.documents import Document

    originals = world.documents()[:10]
    copies = [Document(item.text, "tiny", "code", f"copy{i}.py") for i, item in enumerate(originals[5:])]
    rows = [Row(item, "train") for item in [*originals[:5], *copies]] + [Row(item, "validation") for item in originals[5:]]
    write_documents(rows, tmp_path)
    train, held_out = split_tasks(TaskConfig(kinds=KINDS), tmp_path, 0, 10)
    assert {task.document_id for task in train} == {item.id for item in originals[:5]}
    assert {task.document_id for task in held_out} <= {item.id for item in originals[5:]}
