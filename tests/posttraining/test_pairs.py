"""Pairs are the model's own answers, ranked by the rule, with provenance; the data source is pure and invertible."""

from dataclasses import dataclass

import numpy as np
import pytest

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE
from headspring.data.tasks import check_answer
from headspring.posttraining.answers import answer, prompt_ids
from headspring.posttraining.pair_data import PreferencePairs
from headspring.posttraining.pairs import make_pairs, read_pairs, write_pairs


@dataclass
class Said:
    token_ids: list[int]
    text: str
    finish_reason: str = "stop"


class Scripted:
    """A language model that says what the test wants: `script(task index, answer index) -> text`."""

    def __init__(self, tokenizer, script, finish="stop"):
        self.tokenizer, self.script, self.finish = tokenizer, script, finish

    def generate(self, prompts, *, n, stop_token_ids, **sampling):
        texts = [self.script(index, k) for index in range(len(prompts)) for k in range(n)]
        end = [stop_token_ids[0]] if self.finish == "stop" else []
        return [Said(self.tokenizer.encode(text) + end, text, self.finish) for text in texts]


@pytest.fixture(scope="module")
def tasks(world):
    return world.tasks(kinds=("name", "parameters", "returns"))


@pytest.fixture(scope="module")
def pairs(world, tasks):
    def script(index, k):
        return [tasks[index].answer, "wrong", "wrong", "other"][k]

    return make_pairs(Scripted(world.tokenizer(), script), tasks, num_answers=4)[0]


def test_right_is_chosen_over_the_most_frequent_wrong(world, tasks, pairs):
    assert len(pairs) == len(tasks)
    by_id = {task.id: task for task in tasks}
    end = world.tokenizer().end_id
    for pair in pairs:
        task = by_id[pair.task_id]
        assert check_answer(task, pair.chosen) and not check_answer(task, pair.rejected)
        assert pair.rejected == "wrong" and pair.chosen_origin == "model"
        assert (pair.document_id, pair.byte_start, pair.byte_end) == (task.document_id, task.byte_start, task.byte_end)
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == end
        whole = world.tokenizer().render(task.conversation).ids
        assert list(pair.prompt_ids + pair.chosen_ids) == list(whole)


def test_tasks_that_teach_nothing_are_skipped_and_counted(world, tasks):
    def script(index, k):
        right = index % 3 == 0 or (index % 3 == 1 and k == 0)
        return tasks[index].answer if right else "wrong"

    pairs, report = make_pairs(Scripted(world.tokenizer(), script), tasks, num_answers=3)
    mixed = len(tasks[1::3])
    assert (report.pairs, report.all_right, report.all_wrong) == (mixed, len(tasks[0::3]), len(tasks[2::3]))
    assert {pair.task_id for pair in pairs} == {task.id for task in tasks[1::3]}
    assert report.right_rate == pytest.approx((3 * len(tasks[0::3]) + mixed) / (3 * len(tasks)))


def test_gold_stands_in_only_where_asked_and_says_so(world, tasks):
    never = Scripted(world.tokenizer(), lambda index, k: "wrong")
    with pytest.raises(UserError, match="gold_as_chosen"):
        make_pairs(never, tasks)
    pairs, report = make_pairs(never, tasks, gold_as_chosen=True)
    assert report.gold_chosen == report.pairs == len(pairs) == len(tasks)
    by_id = {task.id: task for task in tasks}
    assert all(pair.chosen_origin == "gold" and pair.chosen == by_id[pair.task_id].answer for pair in pairs)
    assert all(pair.chosen_ids[-1] == world.tokenizer().end_id for pair in pairs)


def test_a_model_that_does_not_stop_has_not_answered(world, tasks):
    endless = Scripted(world.tokenizer(), lambda index, k: tasks[index].answer, finish="length")
    answers = answer(endless, tasks, 2, 48, 1.0, 0)
    assert not any(item.right for row in answers for item in row)
    with pytest.raises(UserError, match="no preference pair"):
        make_pairs(endless, tasks)


def test_tasks_answered_by_likelihood_give_no_pairs(world):
    tasks = world.tasks(kinds=("summary", "name"), per_kind=10)
    script = lambda index, k: "wrong" if k else asked[index].answer
    asked = [task for task in tasks if task.check != "choice"]
    pairs, _ = make_pairs(Scripted(world.tokenizer(), script), tasks, num_answers=2)
    assert len(asked) < len(tasks) and {pair.task_id for pair in pairs} == {task.id for task in asked}


def test_pairs_survive_their_file(pairs, tmp_path):
    write_pairs(pairs, tmp_path)
    assert read_pairs(tmp_path) == pairs
    with pytest.raises(UserError, match="no such file"):
        read_pairs(tmp_path / "nowhere")


def source(pairs, **changes):
    reference = np.arange(2 * len(pairs), dtype=np.float32).reshape(-1, 2)
    return PreferencePairs(pairs, reference, 0, **{"sequence_length": 256, "seed": 1, "num_samples": 2 * len(pairs), **changes})


def test_sample_is_pure_and_every_epoch_holds_every_pair(pairs):
    first, second = source(pairs), source(pairs)
    assert [first.sample(i) for i in reversed(range(len(first)))] == [second.sample(i) for i in range(len(first))][::-1]
    for epoch in (0, 1):
        seen = [first.sample(epoch * len(pairs) + i).pair.task_id for i in range(len(pairs))]
        assert sorted(seen) == sorted(pair.task_id for pair in pairs)
    for i in range(len(first)):  # the reference goes with its pair
        sample = first.sample(i)
        assert sample.reference_chosen == 2 * pairs.index(sample.pair)


def test_where_is_the_inverse_of_sample(pairs):
    data = source(pairs, num_samples=int(1.5 * len(pairs)))
    found = set()
    for document_id in {pair.document_id for pair in pairs}:
        for visit in data.where(document_id):
            pair = data.sample(visit.sample).pair
            assert pair.document_id == document_id and (visit.byte_start, visit.byte_end) == (
                pair.byte_start,
                pair.byte_end,
            )
            rejected = visit.start >= data.sequence_length
            ids = pair.rejected_ids if rejected else pair.chosen_ids
            assert visit.end - visit.start == len(pair.prompt_ids) + len(ids) - 1
            found.add((visit.sample, rejected))
    assert found == {(i, side) for i in range(len(data)) for side in (False, True)}


def test_batches_hold_chosen_then_rejected_and_train_answers_only(pairs):
    data = source(pairs)
    samples = [data.sample(i) for i in range(3)]
    batch = data.collate(samples)
    assert batch.inputs.shape == batch.targets.shape and batch.inputs.shape[0] == 6 and batch.pairs == 3
    for row, ids in enumerate([s.pair.chosen_ids for s in samples] + [s.pair.rejected_ids for s in samples]):
        targets = batch.targets[row]
        assert tuple(targets[targets != IGNORE].tolist()) == ids
        prompt = samples[row % 3].pair.prompt_ids
        assert tuple(batch.inputs[row, : len(prompt)].tolist()) == prompt
        assert (targets[: len(prompt) - 1] == IGNORE).all() and targets[len(prompt) - 1] == ids[0]


def test_pairs_that_are_too_long_are_dropped_with_their_reference(pairs):
    lengths = sorted(pair.length for pair in pairs)
    limit = lengths[len(lengths) // 2]
    data = source(pairs, sequence_length=limit)
    assert data.dropped == sum(length > limit for length in lengths) > 0
    assert all(data.sample(i).reference_chosen == 2 * pairs.index(data.sample(i).pair) for i in range(len(data.pairs)))
    with pytest.raises(UserError, match="fits into 3 tokens"):
        source(pairs, sequence_length=3)


def test_the_prompt_asks_for_an_answer(world, tasks):
    ids = prompt_ids(world.tokenizer(), tasks[0])
    assert world.tokenizer().decode(ids, control="show").endswith("<|end|><|assistant|>")
