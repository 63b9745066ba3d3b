"""`headspring plan`, and `--dry-run`: what would run and why, and what it would cost, before anything is written.

Parameters, tokens, FLOPs and memory (`memory.py`) follow from the recipe. Seconds come from the best thing known: for a trained
stage a few steps of its model, measured here and now; for another stage its last run in this folder, else the rough rates of
`estimates.py`. What cannot be known is left open (`?`), and the sum then says that it is a lower bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from headspring.artifacts.manifest import Manifest
from headspring.line.decide import finished, reasons, wanted
from headspring.line.recipe import Recipe, Step, load_recipe
from headspring.line.record import check_folder
from headspring.line.registry import Estimate, Known, Memory, Registry
from headspring.line.report import formats
from headspring.line.report.reading import lookup, number
from headspring.line.run import selected

WIDTH = 120


@dataclass(frozen=True)
class PlannedStage:
    """One row. `reason` is empty where the stage is cached or runs for the first time. `memory` is that of training, where
    the stage trains."""

    stage: str
    kind: str
    cached: bool
    reason: str
    estimate: Estimate
    memory: Memory | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe's stages and what they are expected to cost."""

    recipe: str
    folder: Path
    stages: tuple[PlannedStage, ...]

    @property
    def seconds(self) -> float:
        """Expected seconds of all stages of which they are known."""
        return sum(row.estimate.seconds or 0.0 for row in self.stages if not row.cached)

    @property
    def complete(self) -> bool:
        return all(row.cached or row.estimate.seconds is not None for row in self.stages)

    def as_json(self) -> dict[str, Any]:
        rows = []
        for row in self.stages:
            said = {"stage": row.stage, "kind": row.kind, "cached": row.cached, "reason": row.reason}
            rows.append(said | asdict(row.estimate) | {"memory": row.memory.as_json() if row.memory else None})
        whole = {"seconds": self.seconds, "complete": self.complete}
        return {"recipe": self.recipe, "run": str(self.folder), **whole, "stages": rows}

    def print(self) -> None:
        """The plan as a table on standard output."""
        title = f"{self.recipe} · {self.folder}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("stage", "", "parameters", "tokens", "FLOPs", "memory", "time"):
            side: Literal["left", "right"] = "left" if name in ("stage", "") else "right"
            table.add_column(name, justify=side, header_style="bold", overflow="fold")
        for row in self.stages:
            what = "cached" if row.cached else f"run: {row.reason}" if row.reason else "run"
            figures = (_figure(row.estimate.parameters), _figure(row.estimate.tokens), _figure(row.estimate.flops))
            memory = formats.byte_count(row.memory.total) if row.memory else ""
            table.add_row(row.stage, what, *figures, memory, "" if row.cached else _time(row.estimate.seconds))
        total, most = formats.seconds(self.seconds), max((row.memory.total for row in self.stages if row.memory), default=None)
        largest = "" if most is None else formats.byte_count(most)
        table.add_row("all", "", "", "", "", largest, f"~{total}" if self.complete else f"> {total}", style="bold")
        _console().print(table)

    def print_memory(self) -> None:
        """What the memory of each training stage is made of, on standard output."""
        table = Table(title="memory", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("stage", header_style="bold")
        names = ("weights", "gradients", "optimizer", "activations", "logits")
        for name in (*names, "tokens at once"):
            table.add_column(name, justify="right", header_style="bold")
        for row in self.stages:
            if row.memory:
                parts = [formats.byte_count(getattr(row.memory, name)) for name in names]
                table.add_row(row.stage, *parts, formats.count(row.memory.tokens))
        if table.row_count:
            _console().print(table)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def plan(
    recipe: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    run_dir: str | Path | None = None,
    until: str | None = None,
    force: str | Sequence[str] = (),
    registry: Registry | None = None,
) -> Plan:
    """What `run` with the same arguments would do; writes nothing. Raises what `run` raises before its first stage."""
    loaded = load_recipe(recipe, overrides, registry)
    folder, steps, forced = selected(loaded, run_dir, until, force)
    check_folder(folder, loaded)
    manifests: dict[str, Manifest] = {}
    estimates: dict[str, Estimate] = {}
    memories: dict[str, Memory | None] = {}
    rows = []
    for step in steps:
        reason, known = _reason(step, loaded, folder, manifests, forced), _known(step, loaded, estimates, memories)
        before = _before(step, folder, forced)
        if reason is None and before is not None:
            manifests[step.name] = before
            estimate = _measured(before)
        else:
            estimate = _estimate(step, known, before)
        above = step.inputs.get("model")
        estimates[step.name] = estimate.inheriting(estimates[above.step] if above else None)
        memories[step.name] = step.stage.memory(step.config, known)
        said = (step.name, step.stage.kind, reason is None, reason or "")
        rows.append(PlannedStage(*said, estimates[step.name], memories[step.name]))
    return Plan(loaded.name, folder, tuple(rows))


def drawings(recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> dict[str, str]:
    """The model of each pretrain stage, drawn with shapes, parameters and FLOPs a token for each part."""
    loaded = load_recipe(recipe, overrides)
    found = {}
    for step in loaded.steps:
        if step.stage.kind == "pretrain":
            vocab = loaded.step(step.inputs["tokenizer"].step).config.vocab_size
            found[step.name] = import_module("headspring.training.pretrain").drawing(step.config, vocab)
    return found


def _before(step: Step, folder: Path, forced: set[str]) -> Manifest | None:
    """The manifest of the stage's last run; not checked for a forced one, which may be forced because it is corrupt."""
    return None if step.name in forced else finished(step, folder / step.name, check=False)


def _reason(step: Step, recipe: Recipe, folder: Path, manifests: Mapping[str, Manifest], forced: set[str]) -> str | None:
    """Why the stage would run ("" for the first time); None where it would not."""
    if step.name in forced:
        return "forced"
    changing = [source.step for source in step.inputs.values() if source.step not in manifests]
    before = _before(step, folder, forced)
    if changing:
        return f"after {', '.join(dict.fromkeys(changing))}" if before else ""
    target = wanted(step, recipe.seed, manifests)
    if before is None:
        return ""
    return None if before.cache_key == target.key else ", ".join(reasons(before, target))


def _known(step: Step, recipe: Recipe, estimates: Mapping[str, Estimate], memories: Mapping[str, Memory | None]) -> Known:
    above = {role: recipe.step(source.step) for role, source in step.inputs.items()}
    return Known(
        configs={role: source.config for role, source in above.items()},
        estimates={role: estimates[source.name] for role, source in above.items()},
        bytes=next((known.bytes for known in estimates.values() if known.bytes is not None), None),
        memories={role: memories[source.name] for role, source in above.items()},
    )


def _estimate(step: Step, known: Known, before: Manifest | None) -> Estimate:
    estimate = step.stage.estimate(step.config, known)
    if before is not None and (estimate.seconds is None or not step.stage.training):
        return estimate.with_seconds(before.cost.get("seconds"))
    return estimate


def _measured(manifest: Manifest) -> Estimate:
    """What a finished stage did cost."""
    figures = {name: number(lookup(manifest.metrics, name)) for name in ("tokens", "parameters", "flops")}
    steps, batch = (number(value) for value in (manifest.metrics.get("steps"), manifest.config.get("batch_size")))
    sample_tokens = figures["tokens"] / (steps * batch) if figures["tokens"] and steps and batch else None
    trained, tokens = number(manifest.metrics.get("train_seconds")), figures["tokens"]
    return Estimate(
        seconds=manifest.cost.get("seconds"),
        bytes=number(lookup(manifest.metrics, "bytes_kept")),
        sample_tokens=sample_tokens,
        seconds_per_token=trained / tokens if trained and tokens else None,
        **figures,
    )


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else f"~{formats.seconds(seconds)}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}" if value >= 1e12 else formats.count(value)
