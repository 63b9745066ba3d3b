"""The curves of a training stage, read from its log: loss, speed, gradient norm, learning rate."""

from dataclasses import dataclass
from typing import Any

from headspring.line.report.charts import LineChart, Points, Series, line_chart
from headspring.line.report.reading import StageView, lookup, number


@dataclass(frozen=True)
class Curves:
    stage: str
    note: str
    charts: list[LineChart]


def curves(stage: StageView) -> Curves | None:
    """What the stage logged, or None where it logged no step. A quantity that was not logged has no chart."""
    log = stage.log
    if not log:
        return None
    both_in_bits = points(log, "validation.bits_per_byte") and points(log, "bits_per_byte")
    unit, title = ("bits_per_byte", "loss, bits per byte") if both_in_bits else ("loss", "loss, nats")
    loss = [
        Series("training", points(log, unit)),
        Series("validation", points(log, f"validation.{unit}"), markers=True),
    ]
    charts = [
        line_chart(title, loss),
        *(line_chart(name, [Series(name, found)], from_zero=True) for name, found in _others(log)),
    ]
    return Curves(stage.name, _note(log), [chart for chart in charts if chart])


def _others(log: list[dict[str, Any]]) -> list[tuple[str, Points]]:
    """The quantities that have a chart of their own, in order."""
    return [
        ("speed, tokens per second", points(log, "tokens_per_second")),
        ("gradient norm, before clipping", points(log, "gradient_norm")),
        ("learning rate", points(log, "learning_rate")),
        ("learning rate, share of its peak", points(log, "learning_rate_factor")),
        ("share of answers preferred rightly", points(log, "accuracy")),
        ("update size |Δw| / |w|, mean of layers", [(step, sum(of.values()) / len(of)) for step, of in _updates(log)]),
    ]


def _updates(log: list[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    return [(float(line["step"]), line["update_size"]) for line in log if line.get("update_size")]


def points(log: list[dict[str, Any]], path: str) -> Points:
    """(step, value) of every line that has a finite value there."""
    found = ((float(line["step"]), number(lookup(line, path))) for line in log)
    return [(step, value) for step, value in found if value is not None]


def _note(log: list[dict[str, Any]]) -> str:
    """ "1,200 steps · 61 % of this machine's matrix-multiplication rate"."""
    note = [f"{len(log):,} steps"]
    shares = sorted(value for _, value in points(log, "flops_utilization"))
    if shares:
        median = 100 * shares[len(shares) // 2]
        note.append(f"{median:.0f} % of this machine's measured matrix-multiplication rate (median)")
    return " · ".join(note)
