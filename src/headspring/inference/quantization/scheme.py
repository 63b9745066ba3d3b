"""How weights become whole numbers, as a value; and by name, as a user says it.

    int8          8 bits, a scale for each output
    int4          4 bits, a scale for each group of 32 inputs, rounded to the nearest
    int4-gptq     the same grid, rounded so that the outputs on real text stay (GPTQ, arXiv 2210.17323)
    int4-64       groups of 64; int4-gptq-128 and so on
"""

import re
from typing import Literal

from pydantic import Field

from headspring.artifacts import UserError
from headspring.artifacts.value import Value

Method = Literal["int8", "int4", "int4-gptq"]
NAMES = "int8, int4, int4-gptq, or with a group as in int4-gptq-64 (32, 64 or 128)"
_NAME = re.compile(r"(int8|int4(?:-gptq)?)(?:-(32|64|128))?")


class Quantization(Value):
    """`group` inputs share a scale in 4 bits (and a minimum, where `minimum`); a matrix whose inputs it does not divide takes
    the next smaller group that does. GPTQ reads `tokens` tokens of `calibration` (a text file; None: the embedded corpus)."""

    method: Method = "int8"
    group: Literal[32, 64, 128] = 32
    minimum: bool = False
    calibration: str | None = None
    tokens: int = Field(16_384, gt=0)

    @property
    def bits(self) -> int:
        return 8 if self.method == "int8" else 4

    def group_for(self, inputs: int) -> int | None:
        """The group of a matrix with so many inputs, or None where 4 bits do not fit."""
        return next((group for group in (128, 64, 32, 16) if group <= self.group and inputs % group == 0), None)

    @staticmethod
    def of(name: "str | Quantization") -> "Quantization":
        """Raises `UserError` for a name that means nothing."""
        if isinstance(name, Quantization):
            return name
        found = _NAME.fullmatch(name)
        if found is None or (found[1] == "int8" and found[2]):
            raise UserError(f"quantize={name!r} is unknown; use {NAMES}; or keep, for the blocks of a .gguf file")
        return Quantization(method=found[1], group=int(found[2] or 32))  # type: ignore[arg-type]
