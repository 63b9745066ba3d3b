"""Before → after: did each stage improve the metric it exists for, and what else changed.

A rate comes with its Wilson interval. The interval of a difference between two rates is paired (bootstrap over the
same tasks) where both evaluations kept their answers, else Newcombe's (1998, method 10), which needs the two Wilson
intervals only. "Improved" means that the interval of the difference lies above zero; a better figure whose interval
holds zero is called unclear; anything else is said in red.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headspring.line.report import formats
from headspring.line.report.reading import TRAINED_KINDS, RunView, StageView, lookup, number

RATES = (
    ("task_accuracy", "tasks right"),
    ("parse_rate", "generated code that parses"),
    ("doctest_pass_rate", "doctests passed by execution"),
)


@dataclass(frozen=True)
class Verdict:
    """One trained stage and its own metric."""

    stage: str
    metric: str
    before: str
    after: str
    change: str
    state: str  # "improved", "unclear" or "failed"
    sentence: str


@dataclass(frozen=True)
class Cell:
    """One measured value; `change` is against the column to the left, `state` colours it."""

    text: str
    interval: str = ""
    change: str = ""
    state: str = ""


@dataclass(frozen=True)
class Matrix:
    """Evaluations side by side: a column for each evaluated model, a row for each metric."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def verdicts(run: RunView) -> list[Verdict]:
    """One verdict for each finished trained stage for which both sides were measured."""
    found = []
    for stage in run.of_kind(*TRAINED_KINDS):
        judge = {"pretrain": _judge_pretrain, "sft": _judge_sft, "preference": _judge_preference}[stage.kind]
        verdict = judge(run, stage)
        if verdict:
            found.append(verdict)
    return found


def _judge_pretrain(run: RunView, stage: StageView) -> Verdict | None:
    before = number(lookup(_evaluation(run, "initial"), "bits_per_byte.all"))
    after = number(lookup(_evaluation(run, stage.name), "bits_per_byte.all"))
    if before is None or after is None:
        return None
    state = "improved" if after < before else "failed"
    sentence = (
        f"{stage.name} brought held-out text from {before:.3f} to {after:.3f} bits per byte."
        if state == "improved"
        else f"{stage.name} did not lower the bits per byte of held-out text: {before:.3f} before, {after:.3f} after."
    )
    change = formats.signed(after - before)
    return Verdict(stage.name, "held-out bits per byte", f"{before:.3f}", f"{after:.3f}", change, state, sentence)


def _judge_sft(run: RunView, stage: StageView) -> Verdict | None:
    before, after = _around(run, stage)
    return _judge_rate(stage, "held-out tasks right", before.get("task_accuracy"), after.get("task_accuracy"))


def _judge_preference(run: RunView, stage: StageView) -> Verdict | None:
    rule = lookup(stage.metrics, "rule_rate", "held_out_rate")
    if isinstance(rule, dict) and "before" in rule and "after" in rule:
        return _judge_rate(stage, "answers that keep the rule", rule["before"], rule["after"], rule.get("difference"))
    before, after = _around(run, stage)
    return _judge_rate(stage, "held-out tasks right", before.get("task_accuracy"), after.get("task_accuracy"))


def _judge_rate(stage: StageView, metric: str, before: Any, after: Any, difference: Any = None) -> Verdict | None:
    old, new = rate_of(before), rate_of(after)
    if old is None or new is None:
        return None
    low, high = _interval(difference) or difference_interval(before, after) or (math.nan, math.nan)
    gain = new - old
    state = "failed" if gain <= 0 else "improved" if low > 0 else "unclear"
    span = "" if math.isnan(low) else f"{formats.signed_points(low)} … {formats.signed_points(high)}"
    points = f"{formats.signed_points(gain)} points" + (f" (95 %: {span})" if span else "")
    moved = f"{formats.percent(old)} to {formats.percent(new)}"
    sentence = {
        "improved": f"{stage.name} raised {metric} from {moved}.",
        "unclear": f"{stage.name} moved {metric} from {moved}, which is within chance; more test tasks would tell.",
        "failed": f"{stage.name} did not raise {metric}: from {moved}.",
    }[state]
    return Verdict(stage.name, metric, rate_text(before), rate_text(after), points, state, sentence)


def _around(run: RunView, stage: StageView) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the evaluations of the model a stage started from, and of the model it made."""
    trained = {other.name for other in run.of_kind(*TRAINED_KINDS)}
    parent = next((name for name in stage.parents if name in trained), "")
    return _evaluation(run, parent), _evaluation(run, stage.name)


def _evaluation(run: RunView, model: str) -> dict[str, Any]:
    """Metrics of the evaluation of `model` ({} where there is none)."""
    return next((stage.metrics for stage in run.of_kind("evaluate") if stage.measures == model), {})


def rate_of(value: Any) -> float | None:
    """The rate in {"rate": …} or in a bare number."""
    return number(value.get("rate")) if isinstance(value, dict) else number(value)


def rate_text(value: Any) -> str:
    """"45.7 % (41.0 – 50.4)"."""
    low, high = _interval(value) or (None, None)
    text = formats.percent(rate_of(value))
    return text if low is None else f"{text} ({100 * low:.1f} – {100 * high:.1f})"


def _interval(value: Any) -> tuple[float, float] | None:
    low, high = (number(value.get(key)) for key in ("low", "high")) if isinstance(value, dict) else (None, None)
    return None if low is None or high is None else (low, high)


def difference_interval(before: Any, after: Any) -> tuple[float, float] | None:
    """95 % interval of rate(after) − rate(before) from their Wilson intervals (Newcombe 1998, method 10)."""
    old, new = rate_of(before), rate_of(after)
    old_ends, new_ends = _interval(before), _interval(after)
    if old is None or new is None or old_ends is None or new_ends is None:
        return None
    gain = new - old
    # low = d − √((p₂ − l₂)² + (u₁ − p₁)²),  high = d + √((u₂ − p₂)² + (p₁ − l₁)²)
    return (
        gain - math.hypot(new - new_ends[0], old_ends[1] - old),
        gain + math.hypot(new_ends[1] - new, old - old_ends[0]),
    )


def matrix(run: RunView) -> Matrix:
    """All metrics of all evaluations."""
    stages = run.of_kind("evaluate")
    metrics = [stage.metrics for stage in stages]
    rows: list[tuple[str, list[Cell]]] = []
    for source in _keys(metrics, "bits_per_byte"):
        values = [number(lookup(each, "bits_per_byte")[source]) if source in (each.get("bits_per_byte") or {}) else None
                  for each in metrics]  # fmt: skip
        rows.append((f"bits per byte · {source}", _level_cells(values)))
    for key, label in RATES:
        if any(rate_of(each.get(key)) is not None for each in metrics):
            rows.append((label, _rate_cells([each.get(key) for each in metrics])))
    for task in _keys(metrics, "tasks"):
        rows.append((f"task · {task}", _rate_cells([(each.get("tasks") or {}).get(task) for each in metrics])))
    return Matrix([stage.measures or stage.name for stage in stages], rows)


def _keys(metrics: Sequence[dict[str, Any]], group: str) -> list[str]:
    """Keys of a group in any evaluation, `all` first."""
    keys = dict.fromkeys(key for each in metrics for key in (each.get(group) or {}))
    return sorted(keys, key=lambda key: (key != "all", key))


def _level_cells(values: Sequence[float | None]) -> list[Cell]:
    """Cells of a figure that should fall."""
    cells, last = [], None
    for value in values:
        change = None if value is None or last is None else value - last
        state = "" if change is None or abs(change) < 5e-4 else "better" if change < 0 else "worse"
        cells.append(Cell(formats.plain(value), "", formats.signed(change) if change is not None else "", state))
        last = value if value is not None else last
    return cells


def _rate_cells(values: Sequence[Any]) -> list[Cell]:
    """Cells of a rate that should rise; coloured where the interval of the difference excludes zero."""
    cells, last = [], None
    for value in values:
        rate, ends = rate_of(value), _interval(value)
        change, state = "", ""
        if rate is not None and rate_of(last) is not None:
            change = formats.signed_points(rate - (rate_of(last) or 0.0))
            low, high = difference_interval(last, value) or (0.0, 0.0)
            state = "better" if low > 0 else "worse" if high < 0 else ""
        interval = f"{100 * ends[0]:.1f} – {100 * ends[1]:.1f}" if ends else ""
        cells.append(Cell(formats.percent(rate), interval, change, state))
        last = value if rate is not None else last
    return cells
