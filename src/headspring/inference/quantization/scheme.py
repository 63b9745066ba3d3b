"""How weights become whole numbers, as a value; and by name, as a user says it.

    int8          8 bits, a scale for each output
    int8-32       8 bits, a scale for each group of 32 inputs (or 64, 128)
    int4          4 bits, a scale for each group of 32 inputs, rounded to the nearest
    int4-gptq     the same grid, rounded so that the outputs on real text stay (GPTQ, arXiv 2210.17323)
    int4-64       groups of 64; int4-gptq-128 and so on

Where weights have groups, so have the activations that they meet: a row of numbers with a few large ones among them, as
trained transformers have, then loses its precision in one group and not everywhere.
"""

import re
from typing import Literal

from pydantic import Field, model_validator

from headspring.artifacts import UserError
from headspring.artifacts.value import Value

Method = Literal["int8", "int4", "int4-gptq"]
NAMES = "int8, int4 or int4-gptq, or one with a group of 32, 64 or 128 inputs as in int4-gptq-64"
_NAME = re.compile(r"(int8|int4(?:-gptq)?)(?:-(32|64|128))?")
SIZES = (128, 64, 32, 16)


class Quantization(Value):
    """`group` inputs share a scale, and a minimum where `minimum` (4 bits only). None: all inputs of an output in 8 bits, 32 in
    4. A matrix whose inputs the group does not divide takes the next smaller of 128, 64, 32, 16 that does.

    GPTQ reads `tokens` tokens of `calibration` (a text file; None: the embedded corpus)."""

    method: Method = "int8"
    group: Literal[32, 64, 128] | None = None
    minimum: bool = False
    calibration: str | None = None
    tokens: int = Field(16_384, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "Quantization":
        if self.minimum and self.method == "int8":
            raise ValueError("minimum is for 4 bits: int8 has as many values on both sides of 0")
        if self.method != "int4-gptq" and (self.calibration is not None or "tokens" in self.model_fields_set):
            raise ValueError(f"calibration is what int4-gptq reads; {self.method} rounds without any text")
        return self

    @property
    def bits(self) -> int:
        return 8 if self.method == "int8" else 4

    @property
    def name(self) -> str:
        """As `of` reads it; a minimum is said too."""
        return f"{self.method}{f'-{self.group}' if self.group else ''}{' with minimums' if self.minimum else ''}"

    def group_for(self, inputs: int) -> int | None:
        """The group of a matrix with so many inputs; None where it has one scale for each output."""
        most = self.group or (None if self.bits == 8 else 32)
        return None if most is None else next((size for size in SIZES if size <= most and inputs % size == 0), None)

    @staticmethod
    def of(name: "str | Quantization") -> "Quantization":
        """Raises `UserError` for a name that means nothing."""
        if isinstance(name, Quantization):
            return name
        found = _NAME.fullmatch(name)
        if found is None:
            raise UserError(f"quantize={name!r} is unknown; use {NAMES}; or keep, for the blocks of a .gguf file")
        return Quantization(method=found[1], group=int(found[2]) if found[2] else None)
