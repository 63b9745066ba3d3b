"""What watches a run: one idea a callback, and none of them changes the mathematics.

The loop calls `on_start(run)` once, `on_step(run, record)` after every step with the numbers of that step, and
`on_end(run)`. A record is a flat JSON object; callbacks may add to it, and the last one writes it down.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headspring.artifacts.errors import HeadspringError
from headspring.artifacts.progress import Task
from headspring.models.model import ModelModule
from headspring.training import distributed

if TYPE_CHECKING:
    from headspring.training.loop import Run


class Callback:
    """Does nothing; override what you need."""

    def on_start(self, run: "Run") -> None: ...

    def on_step(self, run: "Run", record: dict[str, Any]) -> None: ...

    def on_end(self, run: "Run") -> None: ...


class Diverged(HeadspringError):
    """The loss is not finite, or jumped. The update was not applied and the last checkpoint is good."""


class Guard:
    """Stops a run before a bad update: not a callback, because it must speak before the optimizer does."""

    def __init__(self, spike: float, losses: list[float]):
        self.spike, self.losses = spike, losses

    def check(self, model: ModelModule, step: int, loss: float, gradient_norm: float) -> None:
        """Raise `Diverged` for a loss or gradient that is not finite, and for a loss spike."""
        finite = loss == loss and abs(loss) != float("inf") and gradient_norm == gradient_norm
        if not finite or gradient_norm == float("inf"):
            where = first_not_finite(model)
            raise Diverged(f"step {step}: loss {loss:.4g}, gradient norm {gradient_norm:.4g}; {where}")
        if len(self.losses) >= 20 and loss > statistics.median(self.losses) + self.spike:
            name, norm = largest_gradient(model)
            usual = statistics.median(self.losses)
            raise Diverged(
                f"step {step}: loss jumped from {usual:.3f} to {loss:.3f}; the largest gradient is in {name} "
                f"(norm {norm:.3g}); the last checkpoint is kept: lower the learning rate, or raise spike to go on"
            )
        self.losses.append(loss)
        del self.losses[:-50]


def first_not_finite(model: ModelModule) -> str:
    """Names the first parameter, else the first gradient, that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name} is not finite"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the first gradient that is not finite is that of {name}"
    return "parameters and gradients are finite, the loss itself overflowed"


def largest_gradient(model: ModelModule) -> tuple[str, float]:
    """The parameter with the largest gradient norm, and that norm."""
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    name = max(norms, key=lambda key: norms[key])
    return name, norms[name]


class Validation(Callback):
    """Calls `measure()` every `every` steps and at the end; adds what it returns as `validation`."""

    def __init__(self, measure: Callable[[], dict[str, float]], every: int):
        self.measure, self.every = measure, every

    def on_step(self, run: "Run", record: dict[str, Any]) -> None:
        if run.step % self.every == 0 or run.step == run.steps:
            record["validation"] = self.measure()


class UpdateSize(Callback):
    """Adds |Δw| / |w| of every layer for the steps that are logged."""

    def __init__(self, every: int):
        self.every = every
        self._before: dict[str, torch.Tensor] = {}

    def before_step(self, run: "Run") -> None:
        """Remember the parameters that the coming update will move."""
        if (run.step + 1) % self.every == 0:
            self._before = {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def on_step(self, run: "Run", record: dict[str, Any]) -> None:
        if not self._before:
            return
        moved: dict[str, list[float]] = {}
        for name, parameter in run.model.named_parameters():
            layer = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
            sums = moved.setdefault(layer, [0.0, 0.0])
            sums[0] += float((parameter.detach() - self._before[name]).square().sum())
            sums[1] += float(self._before[name].square().sum())
        self._before = {}
        record["update_size"] = {layer: (d / w) ** 0.5 if w else 0.0 for layer, (d, w) in moved.items()}


class ProgressBar(Callback):
    """Shows steps, loss and speed."""

    def __init__(self, task: Task, label: str):
        self.task, self.label = task, label

    def on_step(self, run: "Run", record: dict[str, Any]) -> None:
        if run.step % run.config.log_every == 0:
            speed = record["tokens_per_second"]
            self.task.describe(f"{self.label} · loss {record['loss']:.3f} · {speed:,.0f} tokens/s")
        self.task.expect(run.steps)
        self.task.advance(1)


class Log(Callback):
    """Writes every record to `logs/metrics.jsonl` and its numbers to TensorBoard. A resumed run continues the file."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def on_start(self, run: "Run") -> None:
        if distributed.rank():
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= run.step]
        path.write_text("".join(kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in on_end
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=run.step + 1)

    def on_step(self, run: "Run", record: dict[str, Any]) -> None:
        if distributed.rank():
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in _numbers(record):
            self.board.add_scalar(name, value, run.step)

    def on_end(self, run: "Run") -> None:
        if not distributed.rank():
            self.file.close()
            self.board.close()


def _lines(path: Path) -> list[str]:
    """Whole JSON lines of a log; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]


def _numbers(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((f"{prefix}{name}", value))
    return found
