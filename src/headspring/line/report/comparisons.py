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

from headspring.artifacts.errors import UserError
from headspring.evaluation.tasks import paired_difference
from headspring.line.recipe import INITIAL
from headspring.line.report import formats
from headspring.line.report.reading import RunView, StageView, lookup, number

TOLERATED = 0.01  # of bits per byte that a quantized model may lose
VISIBLE_BITS = 0.005  # a change of bits per byte (which come without an interval) that is worth a colour
RATES = (
    ("task_accuracy", "tasks right"),
    ("parse_rate", "generated code that parses"),
    ("doctest_pass_rate", "outputs confirmed by execution"),
    ("function_pass_rate", "functions written that pass their doctests"),
)


@dataclass(frozen=True)
class Verdict:
    """One stage that makes a model, and its own metric."""

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
    """One verdict for each finished stage that makes a model and for which both sides were measured."""
    found = []
    for stage in run.of_kind(*_JUDGES):
        verdict = _JUDGES[stage.kind](run, stage)
        if verdict:
            found.append(verdict)
    return found


def _judge_pretrain(run: RunView, stage: StageView) -> Verdict | None:
    before, after = run.evaluation(f"{stage.name}/{INITIAL}"), run.evaluation(stage.name)
    if before and after and "bits_per_byte" in after.metrics:
        levels = (lookup(each.metrics, "bits_per_byte.all") for each in (before, after))
        return _judge_level(stage, "held-out bits per byte", *levels)
    hidden = lookup(stage.metrics, "validation_after.bits_per_byte") is None  # an encoder's: tokens guessed from both sides
    name, metric = ("loss", "loss, nats a hidden token") if hidden else ("bits_per_byte", "bits per byte")
    levels = (lookup(stage.metrics, f"validation_{when}.{name}") for when in ("before", "after"))
    return _judge_level(stage, f"validation {metric}", *levels)


def _judge_sft(run: RunView, stage: StageView) -> Verdict | None:
    before, after = run.evaluation(stage.model), run.evaluation(stage.name)
    if before and after and "task_accuracy" in after.metrics:
        return _judge_rate(stage, "held-out tasks right", *_accuracies(before, after), change_interval(before, after))
    levels = (lookup(stage.metrics, f"validation_{when}.loss") for when in ("before", "after"))
    return _judge_level(stage, "validation loss, nats", *levels)


def _judge_preference(run: RunView, stage: StageView) -> Verdict | None:
    rule = lookup(stage.metrics, "rule_rate")
    if rule is not None:
        metric, ends = "held-out answers that keep the rule", _interval(rule["difference"])
        return _judge_rate(stage, metric, rule["before"], rule["after"], ends)
    return _judge_sft(run, stage)


def _judge_contrastive(run: RunView, stage: StageView) -> Verdict | None:
    found = lookup(stage.metrics, "retrieval")
    if found is None:
        return None
    ends = _interval(found["difference"])
    return _judge_rate(stage, "held-out sources found first", found["before"], found["after"], ends)


def _judge_multimodal(run: RunView, stage: StageView) -> Verdict | None:
    found = lookup(stage.metrics, "answers")
    if found is None:
        return None
    ends = _interval(found["difference"])
    return _judge_rate(stage, "questions about held-out items answered", found["before"], found["after"], ends)


def _judge_quantize(run: RunView, stage: StageView) -> Verdict | None:
    """Bytes should fall, and the loss on held-out text hardly rise."""
    old, new = (number(stage.metrics.get(name)) for name in ("original_bytes", "bytes"))
    low, high = (number(stage.metrics.get(name)) for name in ("original_bits_per_byte", "bits_per_byte"))
    if old is None or new is None or low is None or high is None:
        return None
    before, after = f"{formats.byte_count(old)}, {low:.4f}", f"{formats.byte_count(new)}, {high:.4f}"
    lost = high / low - 1
    state = "failed" if new >= old else "improved" if lost <= TOLERATED else "unclear"
    sentence = {
        "improved": "",
        "unclear": f"{stage.name} cost {100 * lost:.1f} % of bits per byte: more bits, smaller groups or int4-gptq cost less.",
        "failed": f"{stage.name} did not make the model smaller, which is what it is for.",
    }[state]
    change = f"{old / new:.1f} times smaller, {formats.signed(high - low)} bits per byte"
    return Verdict(stage.name, "bytes, held-out bits per byte", before, after, change, state, sentence)


_JUDGES = {
    "quantize": _judge_quantize,
    "pretrain": _judge_pretrain,
    "sft": _judge_sft,
    "preference": _judge_preference,
    "contrastive": _judge_contrastive,
    "multimodal": _judge_multimodal,
}


def _accuracies(before: StageView, after: StageView) -> tuple[Any, Any]:
    return before.metrics.get("task_accuracy"), after.metrics["task_accuracy"]


def _judge_level(stage: StageView, metric: str, before: Any, after: Any) -> Verdict | None:
    """A figure that should fall and has no interval."""
    old, new = number(before), number(after)
    if old is None or new is None:
        return None
    sentence = "" if new < old else f"{stage.name} did not lower its {metric}, which is what it is for."
    state = "improved" if new < old else "failed"
    return Verdict(stage.name, metric, f"{old:.3f}", f"{new:.3f}", formats.signed(new - old), state, sentence)


def _judge_rate(stage: StageView, metric: str, before: Any, after: Any, ends: tuple[float, float] | None) -> Verdict | None:
    """A rate that should rise; `ends` is the interval of the difference."""
    old, new = rate_of(before), rate_of(after)
    if old is None or new is None:
        return None
    gain = new - old
    state = "failed" if gain <= 0 else "improved" if ends and ends[0] > 0 else "unclear"
    span = f" (95 %: {formats.signed_points(ends[0])} … {formats.signed_points(ends[1])})" if ends else ""
    sentence = {
        "improved": "",
        "unclear": "The interval of the change holds zero: this could be chance.",
        "failed": f"{stage.name} did not raise the share of {metric}, which is what it is for.",
    }[state]
    change = f"{formats.signed_points(gain)} points{span}"
    return Verdict(stage.name, metric, rate_text(before), rate_text(after), change, state, sentence)


def change_interval(before: StageView, after: StageView, kind: str | None = None) -> tuple[float, float] | None:
    """95 % interval of the change of task accuracy between two evaluations, of one kind of task or of all."""
    try:
        _, low, high = paired_difference(before.folder, after.folder, kind)
        return low, high
    except UserError:  # no answers were kept, or the two were asked different tasks
        path = f"tasks.{kind}" if kind else "task_accuracy"
        return difference_interval(lookup(before.metrics, path), lookup(after.metrics, path))


def rate_of(value: Any) -> float | None:
    """The rate in {"rate": …} or in a bare number."""
    return number(value.get("rate")) if isinstance(value, dict) else number(value)


def rate_text(value: Any) -> str:
    """ "45.7 % (41.0 – 50.4)"."""
    ends, text = _interval(value), formats.percent(rate_of(value))
    return f"{text} ({100 * ends[0]:.1f} – {100 * ends[1]:.1f})" if ends else text


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
    rows = [
        (
            f"bits per byte · {source}",
            _level_cells([(stage.metrics.get("bits_per_byte") or {}).get(source) for stage in stages]),
        )
        for source in _keys(stages, "bits_per_byte")
    ]
    for key, label in RATES:
        cells = _rate_cells(stages, key)
        rows += [(label, cells)] if any(cell.interval for cell in cells) else []
    rows += [(f"task · {kind}", _rate_cells(stages, "tasks", kind)) for kind in _keys(stages, "tasks")]
    return Matrix([model_label(stage) for stage in stages], rows)


def model_label(stage: StageView) -> str:
    """How an evaluation's model is called in tables: its stage's name, or `untrained` for an initial model."""
    name, _, part = stage.model.partition("/")
    return "untrained" if part == INITIAL else name or stage.name


def _keys(stages: Sequence[StageView], group: str) -> list[str]:
    """Keys of a group in any evaluation, `all` first."""
    keys = {key for stage in stages for key in stage.metrics.get(group) or {}}
    return sorted(keys, key=lambda key: (key != "all", key))


def _level_cells(values: Sequence[Any]) -> list[Cell]:
    """Cells of a figure that should fall."""
    cells: list[Cell] = []
    last: float | None = None
    for value in map(number, values):
        change = None if value is None or last is None else value - last
        state = "" if change is None or abs(change) < VISIBLE_BITS else "better" if change < 0 else "worse"
        cells.append(Cell(formats.plain(value), "", formats.signed(change) if change is not None else "", state))
        last = value if value is not None else last
    return cells


def _rate_cells(stages: Sequence[StageView], key: str, kind: str | None = None) -> list[Cell]:
    """Cells of a rate that should rise; coloured where the interval of the difference excludes zero."""
    cells: list[Cell] = []
    last: StageView | None = None
    for stage in stages:
        value = _rate_at(stage, key, kind)
        rate, ends = rate_of(value), _interval(value)
        change, state = "", ""
        if last is not None and rate is not None:
            before = _rate_at(last, key, kind)
            change = formats.signed_points(rate - (rate_of(before) or 0.0))
            tasks = key in ("tasks", "task_accuracy")
            low, high = (change_interval(last, stage, kind) if tasks else difference_interval(before, value)) or (0, 0)
            state = "better" if low > 0 else "worse" if high < 0 else ""
        interval = f"{100 * ends[0]:.1f} – {100 * ends[1]:.1f}" if ends else ""
        cells.append(Cell(formats.percent(rate), interval, change, state))
        last = stage if rate is not None else last
    return cells


def _rate_at(stage: StageView, key: str, kind: str | None) -> Any:
    return (stage.metrics.get(key) or {}).get(kind) if kind else stage.metrics.get(key)
