"""A matrix to the nearest whole numbers: int8 by output or group, int4 by groups with the scale that loses least.

Eight bits are plain: the largest weight becomes ±127. Four bits are too few to give one of them to an
outlier, so that the scale of each group is searched: `SHRINKS` are tried in turn, each cutting off a little more of the
largest weights for a finer grid below them, and for every candidate the values it leads to say which scale (and minimum)
would have been the best for them, by least squares. The grid with the least squared error stays.

Without minimums a grid of sixteen values is lopsided (−8 … 7), so the largest weight is tried at both of its ends.
Scales and minimums are rounded to float16, which is how they are stored; 4 bits in groups of 32 are then 4.5 bits a weight,
5 with minimums.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headspring.models.quantized import SIGNED, UNSIGNED, QuantizedMatrix

SHRINKS = (1.0, 0.93, 0.86, 0.78, 0.7)
HALF = torch.finfo(torch.float16)
CHUNK = 1 << 16  # weights that are worked on together, so that they stay in the cache


@dataclass(frozen=True, eq=False)
class Grid:
    """The sixteen numbers that each of N groups may take: scale (N, 1), and minimum (N, 1) or None; float32."""

    scale: torch.Tensor
    minimum: torch.Tensor | None = None

    def stored(self) -> "Grid":
        """As float16 can say it. A scale is never 0."""
        scale = torch.where(self.scale.abs() < HALF.tiny, HALF.tiny, self.scale)
        return Grid(_in_half(scale), None if self.minimum is None else _in_half(self.minimum))

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (N, group) → the values (N, group), float32."""
        low, high = SIGNED if self.minimum is None else UNSIGNED
        shifted = rows if self.minimum is None else rows - self.minimum
        return (shifted / self.scale).round_().clamp_(low, high)

    def meaning(self, values: torch.Tensor) -> torch.Tensor:
        """values (N, group) → weights."""
        scaled = values * self.scale
        return scaled if self.minimum is None else scaled.add_(self.minimum)

    def instead(self, other: "Grid", where: torch.Tensor) -> "Grid":
        """The other grid for the groups that are marked (N, 1)."""
        scale = torch.where(where, other.scale, self.scale)
        if self.minimum is None or other.minimum is None:
            return Grid(scale)
        return Grid(scale, torch.where(where, other.minimum, self.minimum))


@torch.no_grad()
def round_int8(weight: torch.Tensor, group: int | None = None) -> QuantizedMatrix:
    """weight (O, I): a scale, max|w| / 127, for each output, or for each `group` of its inputs."""
    rows = weight.reshape(-1, group or weight.shape[1])
    values, scales = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows), 1)
    some = max(1, CHUNK // rows.shape[1])
    for wide, whole, scale in zip(rows.split(some), values.split(some), scales.split(some)):
        wide = wide.float()
        torch.div(wide.abs().amax(dim=1, keepdim=True), 127.0, out=scale)
        if group:
            scale.copy_(_in_half(scale * (1 + HALF.eps)))  # rounded to float16, never below what the largest weight needs
        scale.clamp_(min=HALF.tiny if group else torch.finfo(torch.float32).tiny)
        whole.copy_(torch.div(wide, scale).round_().clamp_(-127, 127))
    return QuantizedMatrix(values.view(weight.shape), scales.view(len(weight), -1), None, 8)


@torch.no_grad()
def round_int4(weight: torch.Tensor, group: int, minimum: bool = False) -> QuantizedMatrix:
    """weight (O, I) with `group` a divisor of I: for each group the grid with the least squared error."""
    outputs, inputs = weight.shape
    values, grids = [], []
    for rows in weight.reshape(-1, group).split(max(1, CHUNK // group)):
        rows = rows.float()
        grids.append(best_grid(rows, minimum))
        values.append(grids[-1].nearest(rows).to(torch.int8))
    scales = torch.cat([grid.scale for grid in grids]).view(outputs, -1)
    minimums = torch.cat([grid.minimum for grid in grids if grid.minimum is not None]).view(outputs, -1) if minimum else None
    return QuantizedMatrix(torch.cat(values).view(outputs, inputs), scales, minimums, 4)


def best_grid(rows: torch.Tensor, minimum: bool, importance: torch.Tensor | None = None) -> Grid:
    """For each row (N, group) the grid with the least Σ importance · error²; importance (group,) or None: all alike."""
    best, least = next(_candidates(rows, minimum)).stored(), torch.full((len(rows), 1), torch.inf)
    for candidate in _candidates(rows, minimum):
        for _ in range(2):  # the candidate, then what its values would have liked best
            candidate = candidate.stored()
            values = candidate.nearest(rows)
            errors = candidate.meaning(values).sub_(rows).square_()
            error = (errors if importance is None else errors * importance).sum(dim=1, keepdim=True)
            best, least = best.instead(candidate, error < least), torch.minimum(error, least)
            candidate = _least_squares(rows, values, minimum, importance)
    return best


def _candidates(rows: torch.Tensor, minimum: bool) -> Iterator[Grid]:
    """Grids that reach less and less far."""
    if minimum:
        low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
        for shrink in SHRINKS:
            cut = (high - low) * (1.0 - shrink) / 2
            yield Grid((high - low) * shrink / UNSIGNED[1], low + cut)
        return
    peak = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    for end in SIGNED:
        for shrink in SHRINKS:
            yield Grid(peak * shrink / end)


def _least_squares(rows: torch.Tensor, values: torch.Tensor, minimum: bool, importance: torch.Tensor | None) -> Grid:
    """The grid that is best for these values: the slope, and intercept, of weights over values."""
    share = torch.ones(rows.shape[1]) if importance is None else importance
    if not minimum:
        return Grid((rows * values * share).sum(1, True) / (values.square() * share).sum(1, True).clamp_(min=1e-30))
    total = share.sum().clamp(min=1e-30)
    x, y = (values * share).sum(1, True) / total, (rows * share).sum(1, True) / total
    slope = ((values - x) * (rows - y) * share).sum(1, True) / ((values - x).square() * share).sum(1, True).clamp_(min=1e-30)
    return Grid(slope, y - slope * x)


def _in_half(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.clamp(HALF.min, HALF.max).to(torch.float16).float()
