"""Where families of models are registered."""

from collections.abc import Callable

from headspring.models.model import Model

FAMILIES: dict[str, Callable[[], Model]] = {}


def family(name: str) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    """Register the decorated function, which gives a tiny model of the family, under `name`."""

    def register(tiny: Callable[[], Model]) -> Callable[[], Model]:
        assert name not in FAMILIES, f"two families named {name!r}"
        FAMILIES[name] = tiny
        return tiny

    return register
