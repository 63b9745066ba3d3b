"""Direct preference optimisation (arXiv 2305.18290): the model learns from pairs of its own answers.

1. The model answers training tasks several times; right against wrong makes the pairs (`pairs`).
2. The same model, frozen, is the reference: its log-probabilities of all answers are computed once, in the precision of
   training, so that policy and reference agree before the first update and the loss starts at ln 2.
3. The one training loop minimises the pair loss.
4. The rule judges answers to held-out tasks, before and after: sampled ones, at the temperature of the pairs, for that is
   the distribution which DPO changes (`rule_rate`), and greedy ones (`greedy_rate`).

Why not a reward model and reinforcement learning: the reward here is a rule, exact already, and DPO needs one forward
pass over pairs where those need sampling in the loop. What it gives up: the pairs grow stale as the policy moves.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from headspring.artifacts import UserError
from headspring.artifacts.files import read_json, write_json
from headspring.artifacts.progress import track
from headspring.data.questions import TEMPLATES, Kind
from headspring.data.tasks import Task, TaskConfig, counts
from headspring.inference.language_model import LanguageModel
from headspring.models import load_model, save_model
from headspring.models.scoring import log_probs
from headspring.posttraining import rates
from headspring.posttraining.answers import answer, prompt_ids
from headspring.posttraining.held_out import split_tasks
from headspring.posttraining.pair_data import PairBatch, PreferencePairs, pad_rows
from headspring.posttraining.pairs import Pair, PairReport, make_pairs, read_pairs, write_pairs
from headspring.posttraining.preference_losses import LOSSES, LossName
from headspring.posttraining.sft import row_length
from headspring.tokenization.tokenizer import Tokenizer
from headspring.training import distributed
from headspring.training.callbacks import Validation
from headspring.training.config import TrainConfig
from headspring.training.loop import DTYPES, pick_device, train
from headspring.training.optimizers import AdamW, OptimizerConfig

GENERATED_KINDS: tuple[Kind, ...] = tuple(kind for kind in TEMPLATES if kind != "summary")  # that is chosen, not written
REPORT = "pairs.json"


class PreferenceConfig(TrainConfig):
    """Pairs, objective and training of the dpo stage. `batch_size` counts pairs; a pair is two rows.

    Each of at most `tasks.per_kind` tasks a kind is answered `num_answers` times at `temperature`, with at most
    `max_answer_tokens`. `nll_weight` adds that times −log π(chosen) / length (arXiv 2404.19733), 1 as in its paper; 0 is
    the plain loss. The defaults suit a few million parameters; docs/posttraining.md says what was measured."""

    packs_documents: ClassVar[bool] = False

    tasks: TaskConfig = TaskConfig(kinds=GENERATED_KINDS, per_kind=150)
    num_answers: int = Field(4, gt=1)
    max_answer_tokens: int = Field(48, gt=0)
    temperature: float = Field(0.7, gt=0)
    gold_as_chosen: bool = False
    loss: LossName = "sigmoid"
    beta: float = Field(0.1, gt=0)
    nll_weight: float = Field(1.0, ge=0)
    sequence_length: int | None = Field(None, gt=1)
    validation_per_kind: int = Field(30, gt=0)
    steps: int = Field(40, gt=0)
    batch_size: int = Field(16, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: OptimizerConfig = AdamW(learning_rate=1e-4, weight_decay=0.0)
    compile: Literal["auto", "never", "always"] = "never"  # every batch has another length

    @model_validator(mode="after")
    def _tasks_give_pairs(self) -> "PreferenceConfig":
        if "summary" in self.tasks.kinds:
            raise ValueError("tasks of kind summary are answered by likelihood and give no pairs; leave the kind out")
        return self


class PreferenceObjective:
    """The loss of pairs against a frozen reference, summed; `count` is pairs. See `preference_losses`."""

    def __init__(self, beta: float = 0.1, loss: LossName = "sigmoid", nll_weight: float = 0.0):
        self.beta, self.nll_weight = beta, nll_weight
        self.pair_loss = LOSSES[loss]

    def count(self, batch: PairBatch) -> int:
        return batch.pairs

    def loss(self, model: torch.nn.Module, batch: PairBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The summed loss, and sums of the implicit reward's margin, of its sign being right, and of both log-ratios.

        A chosen log-ratio that falls while the margin grows is DPO's usual way to fail: watch it."""
        policy = answer_log_probs(model, batch.inputs, batch.targets)
        chosen_ratio, rejected_ratio = (policy - batch.reference).chunk(2)
        losses = self.pair_loss(chosen_ratio, rejected_ratio, self.beta)
        if self.nll_weight:
            lengths = (batch.targets[: batch.pairs] >= 0).sum(-1)
            losses = losses - self.nll_weight * policy[: batch.pairs] / lengths
        margin = (self.beta * (chosen_ratio - rejected_ratio)).detach()
        metrics = {
            "margin": margin.sum(),
            "accuracy": (margin > 0).float().sum(),
            "chosen_log_ratio": chosen_ratio.detach().sum(),
            "rejected_log_ratio": rejected_ratio.detach().sum(),
        }
        return losses.sum(), metrics


def answer_log_probs(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(answer | prompt) in nats, (B,) float32: the sum over a row's targets (B, T) int64 that are not IGNORE."""
    return log_probs(model, model(inputs), targets).sum(-1)


@torch.inference_mode()
def reference_log_probs(model: Any, pairs: list[Pair], pad_id: int, precision: str, batch_size: int = 32) -> np.ndarray:
    """(n, 2) float32: the model's log-probability of each pair's chosen and rejected answer."""
    rows = [(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
    values = np.zeros(len(rows), dtype=np.float32)
    with model.computing_in(DTYPES[precision]):
        for start in track(range(0, len(order), batch_size), "reference log-probabilities"):
            indices = order[start : start + batch_size]
            inputs, targets = pad_rows([rows[row] for row in indices], pad_id)
            values[indices] = answer_log_probs(model, inputs.to(model.device), targets.to(model.device)).cpu().numpy()
    return values.reshape(-1, 2)


def dpo(config: PreferenceConfig, model_folder: Path, data_folder: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Make pairs with the model of `model_folder`, train on them, and measure the rule on held-out tasks.

    Writes `config.json`, `model.safetensors`, the tokenizer, `pairs.jsonl` (with provenance), `pairs.json` (counts),
    `logs/` and `checkpoints/` into `folder`. `rule_rate` and `greedy_rate` in the metrics hold the share of right answers
    to validation tasks before and after (sampled at `temperature`; greedy), and the difference with a paired interval."""
    folder = Path(folder)
    model, tokenizer = load_model(model_folder), Tokenizer.load(model_folder)
    model.to(pick_device(config.device))
    length = row_length(config.sequence_length, model)
    draw = seed + 1  # other tasks than those of an SFT stage with the same seed, which the model has seen
    tasks, held_out = split_tasks(config.tasks, data_folder, draw, config.validation_per_kind)
    tasks, held_out = (_fitting(items, tokenizer, length - config.max_answer_tokens) for items in (tasks, held_out))
    if not tasks or not held_out:
        raise UserError(f"no task's prompt fits into {length - config.max_answer_tokens} tokens; raise sequence_length")
    rule = _Rule(LanguageModel(model, tokenizer), held_out, config)
    model.compute_dtype = DTYPES[config.precision]  # answers come from the precision that is trained
    before = rule.judge()
    pairs, report = _pairs(config, rule.lm, tasks, folder, seed)
    pad_id = tokenizer.pad_id or 0
    reference = reference_log_probs(model, pairs, pad_id, config.precision)
    samples = config.steps * config.batch_size
    data = PreferencePairs(pairs, reference, pad_id, length, seed, num_samples=samples)
    objective = PreferenceObjective(config.beta, config.loss, config.nll_weight)
    watchers = [Validation(rule.measure, config.validate_every)]
    stream: Any = data  # its samples are pairs, and its own `collate` stacks them
    result = train(model, objective, stream, config, folder, watchers, "dpo")
    after = rule.latest or rule.judge()
    if distributed.rank() == 0:
        save_model(model, folder)
        tokenizer.save(folder)
    return {
        "parameters": model.num_parameters(),
        "steps": result.steps,
        "train_seconds": result.seconds,
        "loss": result.loss,
        "epochs": result.steps * config.batch_size / len(data.pairs),
        "objective": f"{config.loss} β={config.beta} nll={config.nll_weight}",
        "tasks": counts(tasks),
        "pairs": {**asdict(report), "dropped": data.dropped, "by_kind": counts(pairs)},
        "rule_rate": rule.compare(before.sampled, after.sampled),
        "greedy_rate": rule.compare(before.greedy, after.greedy),
        "compute_dtype": config.precision,
    }


def _fitting(tasks: list[Task], tokenizer: Tokenizer, length: int) -> list[Task]:
    """The tasks whose prompt leaves room for an answer."""
    return [task for task in tasks if len(prompt_ids(tokenizer, task)) <= length]


def _pairs(
    config: PreferenceConfig, lm: LanguageModel, tasks: list[Task], folder: Path, seed: int
) -> tuple[list[Pair], PairReport]:
    """The pairs of this attempt. An attempt that goes on from its checkpoints keeps the pairs it started with.

    One process samples them, all processes read them: they must be the same to the last token."""
    distributed.start(pick_device(config.device))
    if distributed.rank() == 0 and not ((folder / "checkpoints").exists() and (folder / REPORT).exists()):
        pairs, report = make_pairs(
            lm,
            tasks,
            num_answers=config.num_answers,
            max_tokens=config.max_answer_tokens,
            temperature=config.temperature,
            gold_as_chosen=config.gold_as_chosen,
            seed=seed,
        )
        write_pairs(pairs, folder)
        write_json(folder / REPORT, asdict(report))
    distributed.barrier()
    return read_pairs(folder), PairReport(**read_json(folder / REPORT))


@dataclass(frozen=True)
class _Judged:
    """Whether each held-out task was answered right."""

    sampled: list[bool]
    greedy: list[bool]


class _Rule:
    """Answers to held-out tasks, judged by the tasks' rule."""

    def __init__(self, lm: LanguageModel, tasks: list[Task], config: PreferenceConfig):
        self.lm, self.tasks, self.config = lm, tasks, config
        self.latest: _Judged | None = None

    def judge(self) -> _Judged:
        """One sampled and one greedy answer to each task. The same seed each time: equal models give equal answers."""
        rows = [
            answer(self.lm, self.tasks, 1, self.config.max_answer_tokens, temperature, seed=0)
            for temperature in (self.config.temperature, 0.0)
        ]
        return _Judged(*([first.right for (first,) in row] for row in rows))

    def measure(self) -> dict[str, float]:
        """Both rates now, for the log; keeps the answers, so that the last step's are not made twice."""
        self.latest = self.judge()
        total = len(self.tasks)
        return {"rule_rate": sum(self.latest.sampled) / total, "greedy_rate": sum(self.latest.greedy) / total}

    def compare(self, before: list[bool], after: list[bool]) -> dict[str, Any]:
        """Both rates with intervals, their difference with a paired one, and the rates by kind."""
        by_kind = {}
        for kind in sorted({task.kind for task in self.tasks}):
            of_kind = [index for index, task in enumerate(self.tasks) if task.kind == kind]
            by_kind[kind] = {
                "before": rates.rate([before[index] for index in of_kind]),
                "after": rates.rate([after[index] for index in of_kind]),
            }
        return {
            "before": rates.rate(before),
            "after": rates.rate(after),
            "difference": rates.difference(before, after),
            "by_kind": by_kind,
        }
