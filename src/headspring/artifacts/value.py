"""Configuration is a value: frozen, typed, and the same thing in Python, YAML and JSON.

Every config of every room derives from `Value`. Unknown keys are refused; the recipe reader turns pydantic's error
into one line with the nearest valid key and the line of the file.
"""

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen pydantic model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
