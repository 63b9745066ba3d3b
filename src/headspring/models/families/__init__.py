"""The families of models that the house is built for, each a tiny model registered once.

`tests/contract/` runs its whole matrix on every entry: a new family is one function in a file of this folder and no new test
code. The numbers are small and odd on purpose, because sizes that are all powers of two and all equal hide transposed
matrices.
"""

import importlib
import pkgutil

from headspring.models.families.registry import FAMILIES, family

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "family"]
