"""The DPO objective against a slow reference and against laws; the stage raises the rate of right answers."""

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import log_softmax, logsigmoid

from headspring.artifacts import UserError
from headspring.data.batch import IGNORE
from headspring.data.tasks import TaskConfig
from headspring.posttraining.pair_data import PairBatch, PreferencePairs
from headspring.posttraining.pairs import Pair, read_pairs
from headspring.posttraining.preference import (
    GENERATED_KINDS,
    PreferenceConfig,
    PreferenceObjective,
    dpo,
    reference_log_probs,
)
from headspring.posttraining.sft import SFTConfig, sft
from headspring.training.optimizers import AdamW


def random_pairs(vocab: int, count: int = 6, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)

    def ids() -> tuple[int, ...]:
        return tuple(rng.integers(1, vocab, rng.integers(2, 12)).tolist())

    return [Pair(str(i), "name", "d", 0, 1, ids(), ids(), ids(), "", "", "model") for i in range(count)]


def batch_of(model, pairs, reference=None) -> PairBatch:
    values = reference_log_probs(model, pairs, 0, "fp32") if reference is None else reference
    data = PreferencePairs(pairs, values, 0, 256)
    return data.collate([data.sample(i) for i in range(len(pairs))])


def slow_log_prob(model, prompt, answer_ids):
    """One unpadded sequence at a time, every logit in float64."""
    ids = torch.tensor([[*prompt, *answer_ids]])
    logits = log_softmax(model.logits(model(ids[:, :-1]))[0].double(), -1)
    rows = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(logits[row, ids[0, row + 1]] for row in rows)


def slow_loss(policy, reference, pairs, beta):
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        chosen, rejected = (
            slow_log_prob(policy, pair.prompt_ids, ids) - slow_log_prob(reference, pair.prompt_ids, ids).detach()
            for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        total = total - logsigmoid(beta * (chosen - rejected))
    return total


@pytest.fixture(scope="module")
def models(world):
    return world.model(seed=1), world.model(seed=2)  # policy, reference


def test_loss_and_gradient_equal_the_slow_reference(world, models):
    policy, reference = models
    pairs = random_pairs(world.tokenizer().vocab_size)
    expected = slow_loss(policy, reference, pairs, beta=0.3)
    expected_gradient = torch.autograd.grad(expected, list(policy.parameters()))
    batch = batch_of(policy, pairs, reference_log_probs(reference, pairs, 0, "fp32"))
    loss, metrics = PreferenceObjective(beta=0.3).loss(policy, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5 * len(pairs))
    for ours, slow in zip(torch.autograd.grad(loss, list(policy.parameters())), expected_gradient):
        assert torch.allclose(ours, slow, atol=1e-5)
    assert metrics["margin"].item() == pytest.approx(
        0.3 * (metrics["chosen_log_ratio"] - metrics["rejected_log_ratio"]).item(), abs=1e-4
    )


@pytest.mark.parametrize("bug", ["mask off", "sides swapped", "reference forgotten"])
def test_planted_bugs_are_caught(world, models, bug):
    policy, reference = models
    pairs = random_pairs(world.tokenizer().vocab_size)
    batch = batch_of(policy, pairs, reference_log_probs(reference, pairs, 0, "fp32"))
    if bug == "mask off":
        shifted = torch.full_like(batch.targets, 0)
        shifted[:, :-1] = batch.inputs[:, 1:]
        batch.targets = torch.where(batch.targets == IGNORE, shifted, batch.targets)
    elif bug == "sides swapped":
        batch.inputs, batch.targets = (torch.cat(value.chunk(2)[::-1]) for value in (batch.inputs, batch.targets))
    else:
        batch.reference = torch.zeros_like(batch.reference)
    expected = slow_loss(policy, reference, pairs, beta=0.3)
    assert abs(PreferenceObjective(beta=0.3).loss(policy, batch)[0].item() - expected.item()) > 1e-2


def test_policy_equal_to_reference_gives_ln_2(world, models):
    policy, _ = models
    pairs = random_pairs(world.tokenizer().vocab_size)
    objective, batch = PreferenceObjective(), batch_of(policy, pairs)
    loss, metrics = objective.loss(policy, batch)
    assert loss.item() / objective.count(batch) == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"].abs().item() < 1e-4


def test_padding_changes_nothing(world, models):
    policy, reference = models
    pairs = random_pairs(world.tokenizer().vocab_size)
    values = reference_log_probs(reference, pairs, 0, "fp32")
    batch = batch_of(policy, pairs, values)
    wide = torch.nn.functional.pad
    padded = PairBatch(wide(batch.inputs, (0, 7), value=3), wide(batch.targets, (0, 7), value=IGNORE), batch.reference)
    objective = PreferenceObjective()
    assert torch.allclose(objective.loss(policy, padded)[0], objective.loss(policy, batch)[0], atol=1e-5)
    one_by_one = sum(objective.loss(policy, batch_of(policy, [pair], values[i : i + 1]))[0] for i, pair in enumerate(pairs))
    assert torch.allclose(one_by_one, objective.loss(policy, batch)[0], atol=1e-4)


def test_swapping_the_sides_turns_the_margin_round(world, models):
    policy, reference = models
    pairs = random_pairs(world.tokenizer().vocab_size)
    batch = batch_of(policy, pairs, reference_log_probs(reference, pairs, 0, "fp32"))
    swapped = PairBatch(*(torch.cat(v.chunk(2)[::-1]) for v in (batch.inputs, batch.targets, batch.reference)))
    objective = PreferenceObjective()
    (loss, metrics), (other, turned) = objective.loss(policy, batch), objective.loss(policy, swapped)
    assert turned["margin"].item() == pytest.approx(-metrics["margin"].item(), abs=1e-5)
    # −log σ(x) + log σ(−x) = −x, summed over pairs
    assert (loss - other).item() == pytest.approx(-metrics["margin"].item(), abs=1e-4)


def test_the_nll_term_is_the_mean_of_the_chosen_answer(world, models):
    policy, reference = models
    (pair,) = random_pairs(world.tokenizer().vocab_size, count=1)
    batch = batch_of(policy, [pair], reference_log_probs(reference, [pair], 0, "fp32"))
    plain, with_term = (PreferenceObjective(nll_weight=w).loss(policy, batch)[0] for w in (0.0, 0.5))
    nll = -slow_log_prob(policy, pair.prompt_ids, pair.chosen_ids) / len(pair.chosen_ids)
    assert (with_term - plain).item() == pytest.approx(0.5 * nll.item(), abs=1e-5)


def test_the_optimum_of_an_enumerable_world():
    """The minimum over all pairs of a rewarded three-answer world is π ∝ π_ref · exp(r / β) (equation 4)."""
    from headspring.posttraining.preference_losses import LOSSES

    reward, beta = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64), 0.5
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    preferred = torch.sigmoid(reward[:, None] - reward)  # how often the row's answer wins (Bradley–Terry)
    optimizer = torch.optim.LBFGS([scores], max_iter=100, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        ratio = log_softmax(scores, 0) - reference
        loss = (preferred * LOSSES["sigmoid"](ratio[:, None], ratio, beta)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = torch.softmax(reference + reward / beta, 0)
    assert torch.allclose(torch.softmax(scores.detach(), 0), best, atol=1e-6)


def test_other_losses_and_impossible_settings_are_refused():
    with pytest.raises(ValidationError, match="loss"):
        PreferenceConfig(loss="ipo")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="document_mask"):
        PreferenceConfig(document_mask=True)
    with pytest.raises(ValidationError, match="summary"):
        PreferenceConfig(tasks=TaskConfig())
    assert "summary" not in GENERATED_KINDS


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A model that SFT left half-trained, so that some of its answers are right and some wrong."""
    folder = tmp_path_factory.mktemp("dpo")
    world.tokens_folder(world.data_folder(folder / "data"), folder / "tokens")
    world.save(world.model(), folder / "base")
    tasks = TaskConfig(kinds=("parameter_count",), per_kind=200, per_function=2)
    settings = {"optimizer": AdamW(learning_rate=3e-3, weight_decay=0.0), "precision": "fp32", "batch_size": 4}
    sft(
        SFTConfig(tasks=tasks, steps=60, checkpoint_every=100, pretraining_share=0, **settings),
        folder / "base",
        folder / "data",
        folder / "tokens",
        folder / "sft",
    )
    return folder, tasks


def dpo_config(tasks, **changes) -> PreferenceConfig:
    optimizer = AdamW(learning_rate=1e-3, weight_decay=0.0)
    settings = {"tasks": tasks, "steps": 40, "batch_size": 8, "num_answers": 8, "max_answer_tokens": 20}
    settings |= {"optimizer": optimizer, "temperature": 1.0, "validation_per_kind": 100}
    return PreferenceConfig(**{**settings, **changes})


def test_the_stage_end_to_end(tuned):
    folder, tasks = tuned
    metrics = dpo(dpo_config(tasks), folder / "sft", folder / "data", folder / "dpo")
    rule = metrics["rule_rate"]
    assert rule["after"]["rate"] > rule["before"]["rate"] and rule["difference"]["low"] > 0
    assert rule["before"]["n"] == rule["by_kind"]["parameter_count"]["after"]["n"] >= 60
    pairs = read_pairs(folder / "dpo")
    assert len(pairs) == metrics["pairs"]["pairs"] == sum(metrics["pairs"]["by_kind"].values())
    assert sum(metrics["pairs"][key] for key in ("pairs", "all_right", "all_wrong")) == sum(metrics["tasks"].values())
    records = [json.loads(line) for line in (folder / "dpo/logs/metrics.jsonl").read_text().splitlines()]
    assert records[0]["margin"] == pytest.approx(0, abs=1e-5) and records[-1]["margin"] > 0.1
    assert records[-1]["validation"]["rule_rate"] == rule["after"]["rate"]


def test_a_second_attempt_keeps_its_pairs_and_ends_at_the_same_weights(tuned, tmp_path):
    from safetensors.torch import load_file

    from headspring.training.callbacks import Callback
    from headspring.training.loop import Interrupted, Run

    folder, tasks = tuned
    config = dpo_config(tasks, steps=12, checkpoint_every=4)
    dpo(config, folder / "sft", folder / "data", tmp_path / "whole")

    class Stop(Callback):
        def on_step(self, run: Run, record):
            if run.step == 6:
                raise Interrupted("planted")

    import headspring.posttraining.preference as module

    train, calls = module.train, []

    def interrupted(*arguments):
        calls.append(1)
        return train(*arguments[:5], [*arguments[5], Stop()], *arguments[6:])

    module.train = interrupted
    try:
        with pytest.raises(Interrupted):
            dpo(config, folder / "sft", folder / "data", tmp_path / "twice")
    finally:
        module.train = train
    before = (tmp_path / "twice/pairs.jsonl").stat().st_mtime_ns
    dpo(config, folder / "sft", folder / "data", tmp_path / "twice")
    assert (tmp_path / "twice/pairs.jsonl").stat().st_mtime_ns == before and calls == [1]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "twice"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prompts_that_leave_no_room_are_refused(tuned, tmp_path):
    folder, tasks = tuned
    with pytest.raises(UserError, match="raise sequence_length"):
        dpo(dpo_config(tasks, sequence_length=30), folder / "sft", folder / "data", tmp_path)
