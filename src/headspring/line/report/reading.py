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
from headspring.line.record import FILE, read_record

TRAINED_KINDS = ("pretrain", "sft", "preference", "contrastive", "multimodal")
MEASURING_KINDS = ("evaluate", "baselines")


@dataclass(frozen=True)
class StageView:
    """One stage: its manifest (None where it did not finish) and what fills its inputs (role → stage or stage/part)."""

    name: str
    kind: str
    folder: Path
    manifest: Manifest | None
    inputs: dict[str, str]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.metrics if self.manifest else {}

    @property
    def cost(self) -> dict[str, float]:
        return self.manifest.cost if self.manifest else {}

    @property
    def parents(self) -> list[str]:
        """Names of the stages this one is made from, without repeats."""
        return list(dict.fromkeys(source.partition("/")[0] for source in self.inputs.values()))

    @property
    def model(self) -> str:
        """The model the stage starts from or measures: `pretrain`, or `pretrain/initial` for the untrained one."""
        return self.inputs.get("model", "")

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of `logs/metrics.jsonl`; empty where there is none."""
        path = self.folder / "logs" / "metrics.jsonl"
        return read_log(path) if path.is_file() else []


@dataclass(frozen=True)
class RunView:
    """A run folder: its recipe as resolved, its stages in order, the data stage's report."""

    folder: Path
    name: str
    description: str
    recipe: dict[str, Any]
    stages: list[StageView]
    data_report: dict[str, Any] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[StageView]:
        """Finished stages of these kinds, in order."""
        return [stage for stage in self.stages if stage.kind in kinds and stage.manifest]

    def evaluation(self, model: str) -> StageView | None:
        """The finished evaluation of `model` (`sft`, `pretrain/initial`), or None."""
        return next((stage for stage in self.of_kind("evaluate") if stage.model == model), None)


def read_run(folder: Path) -> RunView:
    """Read `folder`. Raises `UserError` where it is not a run folder or its record is another version's."""
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder}: not a run folder (no {FILE}); make one with `headspring run RECIPE --run-dir {folder}`")
    stages = [read_stage(folder, name, record) for name in record["stages"]]
    data = [stage.folder / "report.json" for stage in stages if stage.kind == "data" and stage.manifest]
    return RunView(
        folder=folder,
        name=str(record["recipe"]),
        description=str(record.get("description") or ""),
        recipe=resolved_recipe(record),
        stages=stages,
        data_report=read_json(data[0]) if data and data[0].is_file() else {},
    )


def read_stage(folder: Path, name: str, record: dict[str, Any]) -> StageView:
    return StageView(name, record["kinds"][name], folder / name, read_manifest(folder / name), record["inputs"][name])


def resolved_recipe(record: dict[str, Any]) -> dict[str, Any]:
    """The recipe with every default filled in and one entry for each stage that it stands for."""
    head = {key: record[key] for key in ("recipe", "description", "seed") if record.get(key) not in (None, "")}
    return head | {name: {"kind": record["kinds"][name], **record["configs"][name]} for name in record["stages"]}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log in order of step. A resumed run may repeat steps: the last line of a step counts."""
    kept: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            kept[int(line["step"])] = line
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
