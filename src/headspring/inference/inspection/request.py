"""What a request may ask to see and to change, as values that are the same in Python and in JSON.

Numbers come as a (nested) list, a tensor, or base64 of little-endian float32, and are kept as the last of these: it is exact,
cannot be changed, and takes a fifth of a list's room. Positions count tokens from the prompt's first; negative ones count back
from the end of the prompt, so that −1 is its last token.
"""

import base64
import binascii
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from headspring.artifacts import UserError, Value

MOST = 256  # sites, edits or readings of one kind in a request


def packed(numbers: Any) -> str:
    """Base64 of the numbers as float32. Raises `ValueError` for what is not numbers, or not finite in float32."""
    if isinstance(numbers, str):
        try:
            raw = base64.b64decode(numbers, validate=True)
        except binascii.Error:
            raise ValueError("numbers in a string are base64 of little-endian float32") from None
        if len(raw) % 4:
            raise ValueError(f"{len(raw)} bytes are no whole number of float32")
        flat = np.frombuffer(raw, "<f4")
    else:
        try:
            listed = numbers.detach().float().cpu().numpy() if isinstance(numbers, torch.Tensor) else numbers
            with np.errstate(over="ignore"):
                flat = np.asarray(listed, dtype="<f4").reshape(-1)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("must be numbers: a list, or base64 of little-endian float32") from None
    if not np.isfinite(flat).all():
        raise ValueError("must be finite numbers of float32")
    return base64.b64encode(flat.tobytes()).decode()


def unpacked(numbers: str) -> torch.Tensor:
    """(n,) float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(numbers), "<f4").astype(np.float32))


Numbers = Annotated[str, BeforeValidator(packed)]


class Lens(Value):
    """The `top` most likely next tokens as `sites` of the residual stream already suggest them: the model's last norm and head
    are applied there (the logit lens). A number n stands for `layers.n.residual.post`."""

    sites: tuple[str | int, ...] = Field(min_length=1, max_length=MOST)
    top: int = Field(5, ge=1)


class Steer(Value):
    """Add `scale` · `vector` to the site at every token from `start` on (activation addition, arXiv 2308.10248)."""

    site: str
    vector: Numbers
    scale: float = 1.0
    start: int = 0


class Patch(Value):
    """Put `values` at `positions`: a row of the site for each, or one row for all of them (arXiv 2202.05262)."""

    site: str
    positions: tuple[int, ...] = Field(min_length=1)
    values: Numbers


class Ablate(Value):
    """Take away what the site holds in `heads`, `channels` and at `positions`, of each all where it is not given. What comes in
    its place is zero, or `mean`: a row of the site, such as its mean over some corpus."""

    site: str
    heads: tuple[int, ...] | None = Field(None, min_length=1)
    channels: tuple[int, ...] | None = Field(None, min_length=1)
    positions: tuple[int, ...] | None = Field(None, min_length=1)
    mean: Numbers | None = None


class Inspection(Value):
    """Everything that one request asks for. At a site patches come first, then ablations, then steering; what is captured, and
    what a lens reads, is the result."""

    capture: tuple[str, ...] = Field((), max_length=MOST)
    lens: Lens | None = None
    patch: tuple[Patch, ...] = Field((), max_length=MOST)
    ablate: tuple[Ablate, ...] = Field((), max_length=MOST)
    steer: tuple[Steer, ...] = Field((), max_length=MOST)

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not (self.capture or self.lens or self.edits):
            raise ValueError("an inspection names something to capture, lens, patch, ablate or steer")
        return self

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """The inspection with these fields; one clear `UserError` for an unknown or impossible one."""
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "inspection"
            raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None

    @property
    def edits(self) -> tuple[Patch | Ablate | Steer, ...]:
        """What changes the model's computation, in the order in which it acts."""
        return self.patch + self.ablate + self.steer

    @property
    def looks(self) -> bool:
        """Whether something is to be seen."""
        return bool(self.capture) or self.lens is not None
