"""Taps for one step: every sequence's rows go to its own probe.

Only modules that own a named site get a tap, and only for the step; where no sequence of a step carries a probe, nothing is
installed and nothing is called. A site is seen once for the whole row (1, N, …) of sequences side by side, or, where a mixer
reads each sequence by itself, once for each (`Ragged.current` says which).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from headspring.inference.inspection.probe import Probe
from headspring.models.model import ModelModule
from headspring.models.ragged import Ragged


def watching(model: ModelModule, ragged: Ragged, probes: Sequence[Probe | None]):
    """A context in which a forward pass over the sequences of `ragged` shows each of `probes` the rows of its own sequence, and
    goes on with what the probe makes of them. A sequence that runs alone is a `ragged` of one."""
    asked: dict[str, list[int]] = {}
    for number, probe in enumerate(probes):
        for site in () if probe is None else probe.sites:
            asked.setdefault(site, []).append(number)
    return _tapped(model, ragged, probes, asked) if asked else nullcontext()


@contextmanager
def _tapped(model: ModelModule, ragged: Ragged, probes: Sequence[Probe | None], asked: dict[str, list[int]]) -> Iterator[None]:
    def see(site: str, value: torch.Tensor) -> torch.Tensor:
        if ragged.current is not None:
            return _show_one(probes[ragged.current], site, value, _end(ragged, ragged.current))
        if len(probes) == 1:
            return _show_one(probes[0], site, value, _end(ragged, 0))
        changed = value
        for number in asked[site]:
            probe, rows = probes[number], value[0, ragged.spans[number]]
            assert probe is not None
            result = probe.see(site, rows, ragged.past[number])
            if result is not rows:
                changed = value.clone() if changed is value else changed
                changed[0, ragged.spans[number]] = result
        return changed

    with model.sites.tapped(asked, see):
        yield


def _end(ragged: Ragged, number: int) -> int:
    """How many tokens a sequence has after this step."""
    return ragged.past[number] + ragged.counts[number]


def _show_one(probe: Probe | None, site: str, value: torch.Tensor, end: int) -> torch.Tensor:
    """A value (1, T, …) of one sequence. After a rewind a state may read again what it had read: the first row's position
    follows from the last one's."""
    if probe is None or site not in probe.sites:
        return value
    rows = value[0]
    result = probe.see(site, rows, end - len(rows))
    return value if result is rows else result[None]
