"""The one training loop. Pretraining, SFT, preference learning and what comes later differ only in their objective and data.

    for step in 0 … steps − 1:
        samples  step·B … step·B + B − 1, this process's share, in micro-batches
        loss     Σ objective.loss / Σ objective.count, counted over the whole step and all processes
        update   clip, guard against NaN and spikes, optimizer step
        record   callbacks; checkpoint every so often, and on SIGINT or SIGTERM

Because `sample(i)` is a pure function and the checkpoint holds everything else, a run that was interrupted and goes on is
bitwise the run that was not.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from headspring.artifacts.errors import HeadspringError, UserError
from headspring.artifacts.progress import task
from headspring.data.batch import SampleSource, collate
from headspring.models.model import ModelModule
from headspring.training import allocator, checkpoint, compilation, distributed
from headspring.training.callbacks import Callback, Guard, Log, ProgressBar, UpdateSize
from headspring.training.config import TrainConfig
from headspring.training.measure import matmul_flops
from headspring.training.objective import Objective
from headspring.training.optimizers import build_optimizers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_DECISION_STEP = 5
BUDGET_STEP = 12  # by then the first, slow steps are past


class Interrupted(HeadspringError):
    """SIGINT or SIGTERM arrived; a checkpoint was written and a second run goes on from it."""


@dataclass
class Run:
    """The state of a run, as callbacks see it."""

    model: ModelModule
    objective: Objective
    data: SampleSource
    config: TrainConfig
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    steps: int
    step: int = 0
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    compiled: bool | None = None
    losses: list[float] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None

    @property
    def scalars(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        scaler = self.scaler.state_dict() if self.scaler else None
        settled = {"steps": self.steps, "compiled": self.compiled}  # what this run decided for itself
        return {**settled, "seconds": self.seconds, "losses": self.losses, "scaler": scaler}


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports: `loss` is the mean of the last tenth of the steps, per counted unit."""

    steps: int
    loss: float
    seconds: float
    tokens: int
    tokens_per_second: float
    flops: float

    def metrics(self) -> dict[str, float]:
        """The figures as every trainer's manifest names them."""
        names = {"seconds": "train_seconds"}
        return {names.get(item.name, item.name): getattr(self, item.name) for item in fields(self)}


def train(
    model: ModelModule,
    objective: Objective,
    data: SampleSource,
    config: TrainConfig,
    folder: Path,
    callbacks: Sequence[Callback] = (),
    label: str = "training",
) -> TrainResult:
    """Train `model` in place and return what it took. `folder` gets `checkpoints/` and `logs/`; a run found there goes on.

    Raises `Interrupted` after a signal, `Diverged` for NaN or a spike, `UserError` for a precision the device lacks and for
    a model that is counted.
    """
    if model.config.counted:
        raise UserError(f"a model of kind {model.config.kind!r} learns by counting documents: it cannot be trained further")
    device = pick_device(config.device)
    distributed.start(device)
    model.to(device)
    run = Run(model, objective, data, config, build_optimizers(model, config.optimizer), device, config.steps)
    if config.precision == "fp16":
        if device.type != "cuda":
            raise UserError("precision fp16 needs a GPU (its loss scaling is not supported on CPU); use bf16 or fp32")
        run.scaler = torch.amp.GradScaler("cuda")
    _resume(run, folder)
    sizes = UpdateSize(config.log_every)
    model.train()
    before = model.compute_dtype, model.checkpoint_activations
    model.compute_dtype, model.checkpoint_activations = DTYPES[config.precision], config.activation_checkpointing
    try:
        with allocator.keep_freed_memory(), task(label, run.steps) as bar, _signals() as stop:
            bar.advance(run.step)
            bar.expect(run.steps)
            watchers = [sizes, *callbacks, ProgressBar(bar, label), Log(Path(folder) / "logs")]
            for callback in watchers:
                callback.on_start(run)
            try:
                history = _steps(run, folder, watchers, sizes, stop)
            finally:
                for callback in watchers:
                    callback.on_end(run)
    finally:
        model.compute_dtype, model.checkpoint_activations = before
        if run.compiled:
            compilation.undo(model)
        model.eval()
    return _result(run, history)


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _resume(run: Run, folder: Path) -> None:
    found = checkpoint.latest(Path(folder) / "checkpoints")
    if found is None:
        return
    checkpoint.restore(found, run.model, run.optimizers)
    run.step, run.steps, run.seconds = found.step, found.scalars["steps"], found.scalars["seconds"]
    run.compiled, run.losses = found.scalars["compiled"], list(found.scalars["losses"])
    if run.scaler and found.scalars["scaler"]:
        run.scaler.load_state_dict(found.scalars["scaler"])
    if run.compiled:
        compilation.compile_blocks(run.model)


def _steps(run: Run, folder: Path, watchers: Sequence[Callback], sizes: UpdateSize, stop: "_Stop") -> list[float]:
    """Train to the last step; the losses of the steps done here."""
    config, history = run.config, []
    guard = Guard(config.spike, run.losses)
    peak = matmul_flops(DTYPES[config.precision], run.device.type, torch.get_num_threads())
    tokens_per_step = config.batch_size * run.data.sequence_length
    flops_per_token = training_flops(run.model, run.data.sequence_length)
    while run.step < run.steps:
        started = time.perf_counter()
        if run.compiled is None and run.step >= min(COMPILE_DECISION_STEP, run.steps - 1):
            _decide_compilation(run)
            started = time.perf_counter()
        if run.step == BUDGET_STEP and config.minutes is not None:
            run.steps = _affordable_steps(run, config.minutes)
        factor = config.schedule.factor(run.step, run.steps)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        metrics = _forward_backward(run)
        gradient_norm = _clip(run)
        guard.check(run.model, run.step, metrics["loss"], gradient_norm)
        sizes.before_step(run)
        _update(run)
        run.step += 1
        elapsed = time.perf_counter() - started
        run.seconds += elapsed
        run.step_seconds.append(elapsed)
        speed = tokens_per_step / elapsed
        record = {"step": run.step, **metrics, "gradient_norm": gradient_norm, "learning_rate_factor": factor}
        record |= {"tokens": run.step * tokens_per_step, "tokens_per_second": speed, "seconds": run.seconds}
        record["flops_utilization"] = speed * flops_per_token / (peak * distributed.world_size())
        history.append(metrics["loss"])
        for callback in watchers:
            callback.on_step(run, record)
        _save_if_due(run, folder, stop)
    return history


def _affordable_steps(run: Run, minutes: float) -> int:
    """How many steps fit into `minutes` at the median speed so far; the same on every process."""
    usual = sorted(run.step_seconds)[len(run.step_seconds) // 2]
    total = float(distributed.sum_across(torch.tensor(usual, dtype=torch.float64))) / distributed.world_size()
    return max(run.step + 1, min(run.config.steps, int(minutes * 60 / total)))


def training_flops(model: ModelModule, sequence_length: int) -> float:
    """FLOPs per token of forward and backward: three times the forward, causal attention counted as such."""
    return 3.0 * model.ledger(sequence_length).flops


def measured_seconds(model: ModelModule, objective: Objective, batch: Any, precision: str, repeats: int = 3) -> float:
    """Seconds of a forward and backward pass over `batch`, the best of `repeats`. The model is left as it was."""
    before, model.compute_dtype = model.compute_dtype, DTYPES[precision]
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        objective.loss(model, batch)[0].backward()
        best = min(best, time.perf_counter() - started)
    model.compute_dtype = before
    model.zero_grad(set_to_none=True)
    return best


def _micro_batches(run: Run) -> list[Any]:
    config = run.config
    indices = distributed.share(range(run.step * config.batch_size, (run.step + 1) * config.batch_size))
    size = config.micro_batch_size or max(1, len(indices))
    join = getattr(run.data, "collate", None) or (lambda samples: collate(samples, config.document_mask))
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    return [join([run.data.sample(index) for index in group]).to(run.device) for group in groups]


def _forward_backward(run: Run) -> dict[str, float]:
    """Gradients of one step, summed over processes; the step's metrics, per counted unit."""
    batches = _micro_batches(run)
    count = torch.tensor(float(sum(run.objective.count(batch) for batch in batches)), dtype=torch.float64)
    total = float(distributed.sum_across(count))
    weight = 1.0 / max(total, 1.0)  # a step without a single trained token has loss 0 and no gradient
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = {"loss": 0.0}
    for batch in batches:
        loss, metrics = run.objective.loss(run.model, batch)
        scaled = loss * weight
        (run.scaler.scale(scaled) if run.scaler else scaled).backward()
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    distributed.sum_gradients([p for p in run.model.parameters() if p.requires_grad])
    values = distributed.sum_across(torch.tensor(list(sums.values()), dtype=torch.float64))
    return {name: float(value) * weight for name, value in zip(sums, values)}


def _clip(run: Run) -> float:
    """Clip gradients to the configured norm; the norm before clipping."""
    if run.scaler:
        for optimizer in run.optimizers:
            run.scaler.unscale_(optimizer)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    limit = run.config.gradient_clip
    if limit is not None and not norm <= limit:  # also where the norm is NaN, which the guard reports
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def _update(run: Run) -> None:
    for optimizer in run.optimizers:
        if run.scaler:
            run.scaler.step(optimizer)
        else:
            optimizer.step()
    if run.scaler:
        run.scaler.update()


def _decide_compilation(run: Run) -> None:
    wanted = run.config.compile
    remaining = run.seconds / max(run.step, 1) * (run.steps - run.step)
    if wanted == "always":
        compilation.compile_blocks(run.model)
        run.compiled = True
    elif wanted == "never" or distributed.world_size() > 1 or not compilation.worth_trying(remaining):
        run.compiled = False
    else:
        run.compiled = compilation.faster_compiled(run.model, lambda: _forward_backward(run))


def _save_if_due(run: Run, folder: Path, stop: "_Stop") -> None:
    """Write a checkpoint where one is due, and raise `Interrupted` where a signal arrived at any process."""
    signalled = bool(distributed.sum_across(torch.tensor(float(stop.requested))) > 0)
    config = run.config
    due = run.step % config.checkpoint_every == 0 or run.step in config.keep_steps or run.step == run.steps
    if (due or signalled) and distributed.rank() == 0:
        snapshot = checkpoint.take(run.model, run.optimizers, run.step, run.scalars)
        checkpoint.write(snapshot, Path(folder) / "checkpoints")
        checkpoint.prune(Path(folder) / "checkpoints", config.keep_checkpoints, config.keep_steps)
    if signalled and run.step < run.steps:
        distributed.barrier()
        raise Interrupted(f"saved at step {run.step} of {run.steps}; run the same command again to go on")


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Inside the block SIGINT and SIGTERM only ask the loop to stop; a second one acts at once."""
    stop = _Stop()
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(run: Run, history: list[float]) -> TrainResult:
    losses = history or run.losses or [float("nan")]
    tail = losses[-max(1, len(losses) // 10) :]
    tokens = run.step * run.config.batch_size * run.data.sequence_length
    flops = tokens * training_flops(run.model, run.data.sequence_length)
    speed = tokens / run.seconds if run.seconds else 0.0
    return TrainResult(run.step, sum(tail) / len(tail), run.seconds, tokens, speed, flops)
