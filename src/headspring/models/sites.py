"""Sites: the named places in a model's forward pass that can be looked at or changed.

    embed · layers.i.residual.{pre,mid,post} · layers.i.mixer.{q,k,v,pattern,heads,out} · layers.i.mlp.{gate,act,out} · final

`attention` is an alias of `mixer` where the mixer is attention. Nothing is recomputed and no hook is installed while
nobody looks: a module's `tap` is None then. Shapes: residual, out, embed, final (B, T, D); q, k, v, heads (B, T, H, C)
with queries and keys as attention sees them (normalised and rotated); pattern (B, H, T, S); gate, act (B, T, F).
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from headspring.artifacts.errors import UserError
from headspring.models.part import PartModule

Edit = Callable[[torch.Tensor], torch.Tensor]


class Sites:
    """The sites of one model. `owners` maps a prefix ("layers.0.mixer") to the module that has them."""

    def __init__(self, owners: Mapping[str, tuple[PartModule, tuple[str, ...]]]):
        self._owners = dict(owners)
        self._places = {self._join(prefix, name): (prefix, name) for prefix, (_, names) in owners.items() for name in names}
        self.names = tuple(self._places)
        # Those that only the readable path forms: looking at them may change last bits.
        self.plain = {self._join(prefix, name) for prefix, (module, _) in owners.items() for name in module.plain_sites}

    @staticmethod
    def _join(prefix: str, name: str) -> str:
        return f"{prefix}.{name}" if prefix else name

    def resolve(self, name: str) -> str:
        """The canonical name, with aliases replaced. Raises `UserError` with the nearest name for an unknown one."""
        canonical = name.replace(".attention.", ".mixer.")
        if canonical not in self.names:
            near = difflib.get_close_matches(canonical, self.names, 1)
            raise UserError(f"no site named {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return canonical

    @contextmanager
    def capture(self, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Inside the block, every forward pass stores the activation of each named site under the name as given."""
        wanted = {self.resolve(name): name for name in names}
        seen: dict[str, torch.Tensor] = {}

        def look(site: str, value: torch.Tensor) -> torch.Tensor:
            seen[wanted[site]] = value
            return value

        with self.tapped(wanted, look):
            yield seen

    @contextmanager
    def edit(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Inside the block, each named site's activation is replaced by what its function makes of it."""
        functions = {self.resolve(name): function for name, function in edits.items()}
        with self.tapped(functions, lambda site, value: functions[site](value)):
            yield

    @contextmanager
    def tapped(self, sites: Iterable[str], see: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Inside the block, each of `sites` (canonical names) goes on with what `see(site, value)` gives. The taps that are
        there already come first; modules without one of the sites are not touched."""
        mine: dict[str, dict[str, str]] = {}
        for site in sites:
            prefix, name = self._places[site]
            mine.setdefault(prefix, {})[name] = site
        before = []
        for prefix, names in mine.items():
            module, _ = self._owners[prefix]
            before.append((module, module.tap, module.watched))
            module.tap = _chain(module.tap, names, see)
            module.watched |= set(names)
        try:
            yield
        finally:
            for module, tap, watched in reversed(before):
                module.tap, module.watched = tap, watched


def _chain(first: Callable | None, mine: Mapping[str, str], see: Callable) -> Callable:
    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        if first is not None:
            value = first(name, value)
        return see(mine[name], value) if name in mine else value

    return tap
