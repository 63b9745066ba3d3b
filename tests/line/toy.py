"""A line of toy stages, with the shape of the real one, that runs in milliseconds."""

import json
import os
import signal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from headspring.artifacts import UserError, Value
from headspring.line.registry import Context, Stage

MODELS = ("pretrain", "sft", "preference")


class Stdlib(Value):
    kind: Literal["stdlib"] = "stdlib"
    max_bytes: int = Field(1000, gt=0)


class Files(Value):
    kind: Literal["files"]
    path: str


class DataConfig(Value):
    sources: str | dict[str, Annotated[Stdlib | Files, Field(discriminator="kind")]] = Field(default_factory=dict)
    text: str = "the corpus"


class TokenizerConfig(Value):
    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = Field(256, gt=0)


class Optimizer(Value):
    learning_rate: float = Field(1e-3, gt=0)


class TrainConfig(Value):
    steps: int = Field(4, ge=1)
    optimizer: Optimizer = Optimizer()
    stop: Literal["", "kill", "terminate", "full", "crash"] = ""
    stop_at: int = 2


class EvaluateConfig(Value):
    sets: tuple[str, ...] = ()
    tasks: int = 3


calls: list[str] = []


def data(context: Context) -> dict:
    calls.append("data")
    if not context.config.text:
        raise UserError("the corpus is empty")
    (context.folder / "text.txt").write_text(context.config.text.lower())
    return {"files": [file.name for file in context.files]}


def tokenizer(context: Context) -> dict:
    calls.append("tokenizer")
    text = (context.inputs["data"] / "text.txt").read_text()
    (context.folder / "tokenizer.json").write_text(json.dumps(sorted(set(text))))
    return {"vocab": context.config.vocab_size}


def train(context: Context) -> dict:
    """Counts its steps; a step's checkpoint is the file `checkpoints/<step>`, and every step ever done is logged."""
    calls.append(context.folder.name.removesuffix(".partial"))
    checkpoints = context.folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    start = max((int(file.name) for file in checkpoints.iterdir()), default=0)
    for step in range(start + 1, context.config.steps + 1):
        (checkpoints / str(step)).touch()
        with open(context.folder / "logs" / "steps", "a") as log:
            log.write(f"{step}\n")
        if step == context.config.stop_at and start == 0:
            _stop(context.config.stop)
    initial = context.folder / "initial"
    initial.mkdir(exist_ok=True)
    (initial / "weights").write_text("0")
    (context.folder / "weights").write_text(f"{context.config.steps} {context.config.optimizer.learning_rate}")
    return {"steps": context.config.steps, "started_at": start, "cost": {"flops": 7.0}}


def _stop(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    elif how == "full":
        raise OSError(28, "No space left on device")
    elif how == "crash":
        raise ZeroDivisionError("a defect")


def evaluate(context: Context) -> dict:
    calls.append(context.folder.name.removesuffix(".partial"))
    weights = (context.inputs["model"] / "weights").read_text()
    (context.folder / "answers.txt").write_text(weights)
    return {"weights": weights, "asked": context.config.tasks}


STAGES = {
    stage.kind: stage
    for stage in (
        Stage("data", 1, lambda: DataConfig, data, reads_evaluation_files=True),
        Stage("tokenizer", 1, lambda: TokenizerConfig, tokenizer, {"data": ("data",)}),
        Stage("pretrain", 1, lambda: TrainConfig, train, {"tokenizer": ("tokenizer",)}, training=True, model=True),
        Stage("sft", 1, lambda: TrainConfig, train, {"model": MODELS, "data": ("data",)}, training=True, model=True),
        Stage("preference", 1, lambda: TrainConfig, train, {"model": MODELS}, training=True, model=True),
        Stage(
            "evaluate", 1, lambda: EvaluateConfig, evaluate, {"model": MODELS, "data": ("data",)}, each_model=True,
            files=lambda config: config.sets, before_training=lambda config: config.model_copy(update={"tasks": 0}),
        ),
    )
}  # fmt: skip

RECIPE = """\
recipe: toy
seed: 3
data:
  sources:
    library: {kind: stdlib, max_bytes: 100}
tokenizer: {vocab_size: 300}
pretrain:
  steps: 4
  optimizer:
    learning_rate: 3e-4
sft:
  steps: 2
dpo:
evaluate:
"""


def write(folder: Path, text: str = RECIPE, name: str = "toy.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path
