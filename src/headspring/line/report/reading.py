"""A run folder as the report sees it: everything that is there, nothing that must be there.

A run that was stopped with `--until`, or that is still going, has stages without a manifest; they are shown as not run.
Files are read, never written. Lines of a log that do not parse (the last one of an interrupted run) are left out.
"""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from headspring.artifacts.errors import UserError
from headspring.artifacts.files import read_json
from headspring.artifacts.manifest import Manifest, read_manifest

TRAINED_KINDS = ("pretrain", "sft", "preference")
MEASURING_KINDS = ("evaluate", "baselines")


@dataclass(frozen=True)
class StageView:
    """One stage: its manifest (None where it did not finish) and its training log (empty where there is none)."""

    name: str
    kind: str
    folder: Path
    manifest: Manifest | None

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.metrics if self.manifest else {}

    @property
    def cost(self) -> dict[str, float]:
        return self.manifest.cost if self.manifest else {}

    @property
    def parents(self) -> list[str]:
        """Names of the stages this one was made from, without repeats, in the manifest's order."""
        sources = self.manifest.inputs.values() if self.manifest else ()
        return list(dict.fromkeys(source["stage"] for source in sources))

    @property
    def measures(self) -> str | None:
        """The model an evaluation is about: `evaluate-sft` → `sft`; None for other kinds."""
        return self.name.partition("-")[2] or None if self.kind == "evaluate" else None

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of `logs/metrics.jsonl`. A resumed run repeats steps; the last line of a step counts."""
        path = self.folder / "logs" / "metrics.jsonl"
        return read_log(path) if path.is_file() else []


@dataclass(frozen=True)
class RunView:
    """A run folder: its recipe, its stages in order, the data stage's report."""

    folder: Path
    name: str
    description: str
    recipe: dict[str, Any]
    stages: list[StageView]
    data_report: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> StageView | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def of_kind(self, *kinds: str) -> list[StageView]:
        """Finished stages of these kinds, in order."""
        return [stage for stage in self.stages if stage.kind in kinds and stage.manifest]


def read_run(folder: Path) -> RunView:
    """Read `folder`. Raises `UserError` where it is not a run folder."""
    folder = Path(folder)
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder (no run.json); make one with `headspring run RECIPE --run-dir {folder}`")
    try:
        run = read_json(path)
        names, recipe = list(run["stages"]), dict(run["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: does not describe a run ({type(error).__name__}: {error})") from error
    data = [stage for stage in (read_stage(folder / name) for name in names) if stage.kind == "data"]
    report = data[0].folder / "report.json" if data else folder / "data" / "report.json"
    return RunView(
        folder=folder,
        name=str(run.get("name") or recipe.get("recipe") or folder.name),
        description=str(recipe.get("description") or ""),
        recipe=recipe,
        stages=[read_stage(folder / name) for name in names],
        data_report=read_json(report) if report.is_file() else {},
    )


def read_stage(folder: Path) -> StageView:
    """The stage in `folder`; an unfinished stage's kind is guessed from its name."""
    manifest = read_manifest(folder)
    kind = manifest.kind if manifest else {"dpo": "preference"}.get(folder.name, folder.name.partition("-")[0])
    return StageView(folder.name, kind, folder, manifest)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Steps and validations of a training log, each in order of step, the last line of a repeated step."""
    kept: dict[tuple[int, bool], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            kept[int(line["step"]), "validation" in line] = line
        except (ValueError, KeyError, TypeError):
            continue
    return [kept[key] for key in sorted(kept)]


def number(value: Any) -> float | None:
    """`value` as a finite float, or None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def lookup(metrics: dict[str, Any], *paths: str) -> Any:
    """The first of these dotted paths that leads to something, or None."""
    for path in paths:
        value: Any = metrics
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None
