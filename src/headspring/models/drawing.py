"""A model as a person would draw it: its parts with shapes, parameters and FLOPs per token; equal layers drawn once."""

from headspring.models.part import Cost


def draw(cost: Cost) -> str:
    """A text table of the ledger."""
    rows: list[tuple[str, ...]] = [("part", "shape", "parameters", "FLOPs/token", "state B/token", "state B")]
    _rows(cost, 0, rows)
    if not cost.fixed_state_bytes:  # no part has a memory that does not grow
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths[:2]))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:]))
        lines.append(f"{left}  {right}".rstrip())
    if cost.idle_parameters:
        lines.append(f"a token uses {cost.active_parameters:,} of the parameters")
    return "\n".join(lines)


def _rows(cost: Cost, depth: int, rows: list[tuple[str, ...]]) -> None:
    numbers = (cost.parameters, cost.flops, cost.state_bytes, cost.fixed_state_bytes)
    rows.append(("  " * depth + cost.name, cost.shape, *(f"{number:,.0f}" for number in numbers)))
    children = list(cost.children)
    while children:
        first = children.pop(0)
        same = 1
        while children and _shape(children[0]) == _shape(first):
            children.pop(0)
            same += 1
        if same > 1:
            rows.append(("  " * (depth + 1) + f"{same} × the same, each:", "", "", "", "", ""))
        _rows(first, depth + 1, rows)


def _shape(cost: Cost) -> tuple:
    return (cost.parameters, cost.flops, cost.shape, tuple(_shape(child) for child in cost.children)) + (
        () if cost.name.startswith("layers.") else (cost.name,)
    )
