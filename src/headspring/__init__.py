"""Headspring: a language-model laboratory, from raw text to an assistant that answers, and back.

import headspring as hs
run = hs.run("recipes/quickstart.yaml", overrides={"pretrain.steps": 200})
lm = hs.load("runs/quickstart")

Names are imported when they are first used, so that `import headspring` loads neither torch nor any stage.
"""

import os
from typing import TYPE_CHECKING, Any

# Threads that wait spin briefly, then sleep. Left to itself, libgomp spins much longer, which on a
# machine with anything else to do keeps a thread's partner off the core (docs/LOG.md). Read when torch loads the library.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from headspring.artifacts import HeadspringError as HeadspringError
    from headspring.artifacts import UserError as UserError
    from headspring.artifacts import Value as Value
    from headspring.inference.language_model import LanguageModel as LanguageModel
    from headspring.line.run import Run as Run
    from headspring.line.run import run as run

    load = LanguageModel.load

_HOMES = {
    "run": "headspring.line.run",
    "Run": "headspring.line.run",
    "LanguageModel": "headspring.inference.language_model",
    "Value": "headspring.artifacts",
    "UserError": "headspring.artifacts",
    "HeadspringError": "headspring.artifacts",
}

__all__ = [*_HOMES, "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("headspring")
    if name == "load":
        return __getattr__("LanguageModel").load
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'headspring' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
