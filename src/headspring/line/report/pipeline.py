"""The line as a picture: a box for each stage, an arrow for each input.

Stages that make something stand in a row, in order; stages that measure hang below what they measure. An input from
the stage just before is a straight arrow, one from further back an arc. What an evaluation reads besides its model is
left to the lineage table.
"""

from dataclasses import dataclass

from headspring.line.report import formats
from headspring.line.report.outcomes import outcome
from headspring.line.report.reading import MEASURING_KINDS, RunView, StageView

BOX, GAP, TALL, SMALL, DROP = 160, 26, 84, 60, 18  # widths and heights in pixels


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    height: float
    name: str
    kind: str
    lines: list[str]
    cost: str
    state: str  # "done", "failed" (did not improve its own metric) or "missing"
    width: float = BOX


@dataclass(frozen=True)
class Picture:
    width: float
    height: float
    boxes: list[Box]
    arrows: list[str]


def picture(run: RunView, failed: set[str]) -> Picture:
    """Lay the stages out. `failed` names those that did not improve their own metric."""
    makers = [stage for stage in run.stages if stage.kind not in MEASURING_KINDS]
    column = {stage.name: index for index, stage in enumerate(makers)}
    arcs = [(column[parent], column[stage.name]) for stage in makers for parent in stage.parents if parent in column]
    longest = max((after - before for before, after in arcs), default=1)
    top = 16.0 + (12 * longest if longest > 1 else 0)
    boxes = [_box(stage, column[stage.name] * (BOX + GAP), top, TALL, failed) for stage in makers]
    arrows = [_arrow(before, after, top) for before, after in dict.fromkeys(arcs)]
    below: dict[int, float] = {}
    for stage in (stage for stage in run.stages if stage.kind in MEASURING_KINDS):
        at = _measured(stage, column)
        y = below.get(at, top + TALL) + DROP
        x = at * (BOX + GAP)
        boxes.append(_box(stage, x, y, SMALL, failed))
        arrows.append(f"M{x + BOX / 2},{y - DROP}V{y - 2}")
        below[at] = y + SMALL
    height = max([top + TALL, *below.values()]) + 8
    return Picture(max(len(makers), 1) * (BOX + GAP) - GAP, height, boxes, arrows)


def _measured(stage: StageView, column: dict[str, int]) -> int:
    """The column of the stage that `stage` is about: that of its model, else its latest input."""
    model = stage.model.partition("/")[0]
    return column.get(model, max((column[parent] for parent in stage.parents if parent in column), default=0))


def _box(stage: StageView, x: float, y: float, height: float, failed: set[str]) -> Box:
    state = "missing" if not stage.manifest else "failed" if stage.name in failed else "done"
    seconds = stage.cost.get("seconds")
    memory = stage.cost.get("peak_memory_bytes")
    cost = [formats.seconds(seconds)] if seconds is not None else []
    cost += [formats.byte_count(memory)] if memory and height == TALL else []
    return Box(x, y, height, stage.name, stage.kind, outcome(stage), " · ".join(cost), state)


def _arrow(before: int, after: int, top: float) -> str:
    """An SVG path between two columns' boxes."""
    if after - before == 1:
        y = top + TALL / 2
        return f"M{before * (BOX + GAP) + BOX},{y}H{after * (BOX + GAP) - 2}"
    start, end = before * (BOX + GAP) + 0.62 * BOX, after * (BOX + GAP) + 0.38 * BOX
    lift = top - 2 - 12 * (after - before) * 1.25
    return f"M{start},{top}C{start + 20},{lift} {end - 20},{lift} {end},{top - 2}"
