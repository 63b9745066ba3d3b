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
    steps = [line for line in stage.log if "validation" not in line]
    validations = [line for line in stage.log if isinstance(line.get("validation"), dict)]
    if not steps:
        return None
    unit = "bits_per_byte" if points(validations, f"validation.bits_per_byte") and points(steps, "bits_per_byte") else "loss"
    charts = [
        line_chart(
            "loss, bits per byte" if unit == "bits_per_byte" else "loss, nats",
            [Series("training", points(steps, unit)), Series("validation", points(validations, f"validation.{unit}"), True)],
        ),
        line_chart("speed, tokens per second", [Series("tokens/s", points(steps, "tokens_per_second"))], from_zero=True),
        line_chart("gradient norm, before clipping", [Series("gradient norm", points(steps, "gradient_norm"))], from_zero=True),
        line_chart("learning rate", [Series("learning rate", points(steps, "learning_rate"))], from_zero=True),
    ]
    return Curves(stage.name, _note(steps), [chart for chart in charts if chart])


def points(lines: list[dict[str, Any]], path: str) -> Points:
    """(step, value) of every line that has a finite value there."""
    found = ((float(line["step"]), number(lookup(line, path))) for line in lines)
    return [(step, value) for step, value in found if value is not None]


def _note(steps: list[dict[str, Any]]) -> str:
    """"1,200 steps · 61 % of this machine's matrix-multiplication rate"."""
    note = [f"{len(steps):,} steps"]
    shares = sorted(value for _, value in points(steps, "flops_utilization"))
    if shares:
        note.append(f"{100 * shares[len(shares) // 2]:.0f} % of this machine's measured matrix-multiplication rate (median)")
    return " · ".join(note)
