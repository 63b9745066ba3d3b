"""What an engine may use: memory, sequences at a time, tokens a step, places in its queue."""

from typing import Any, Literal, Self

import psutil
import torch
from pydantic import Field, ValidationError, model_validator

from headspring.artifacts import UserError, Value
from headspring.inference.sampling_params import explain
from headspring.inference.speculation import Speculation

LARGEST_DEFAULT = 2**30  # bytes of pages where nobody says otherwise


class QueueFull(UserError):
    """The engine has as many jobs waiting as its queue may hold; try again later."""


class EngineConfig(Value):
    """How much an engine takes on. Invalid values raise pydantic's `ValidationError`."""

    memory: int | None = Field(
        None, gt=0, description="bytes for pages; by default at most 1 GiB and a quarter of what is free"
    )
    max_sequences: int = Field(64, ge=1, description="answers that run together")
    chunk: int = Field(512, ge=1, description="tokens of a step; prompts are read in pieces of at most this many")
    max_queue: int | None = Field(None, ge=1, description="jobs that may wait; one more is refused. None: any number")
    context: int | None = Field(None, ge=2, description="tokens of the longest sequence; by default what the model is made for")
    cache_dtype: Literal["auto", "int8"] = Field(
        "auto", description="int8 halves the bytes of keys and values, with a scale each"
    )
    prefix_sharing: bool = Field(True, description="keep pages of what was read, for prompts that begin alike")
    speculation: Speculation | None = Field(None, description="how tokens are proposed; no token changes by it")
    cuda_graphs: bool | None = Field(None, description="replay steps that only write as one launch; by default on CUDA")
    debug: bool = Field(False, description="check the books of the cache after every step")

    @model_validator(mode="after")
    def _a_token_for_each(self) -> Self:
        if self.chunk < self.max_sequences:
            raise ValueError(
                f"a step of chunk={self.chunk} tokens has none for some of max_sequences={self.max_sequences} answers"
            )
        return self

    def captures(self, device: torch.device, side_by_side: bool) -> bool:
        """Whether steps become CUDA graphs. Raises `UserError` where they are wanted and cannot be: the model is not on CUDA,
        or its sequences do not stand `side_by_side` in pages."""
        possible = device.type == "cuda" and side_by_side
        if self.cuda_graphs and not possible:
            why = "keeps more than keys and values in pages" if device.type == "cuda" else f"is on {device.type}"
            raise UserError(f"cuda_graphs=True needs a model of attention on CUDA, and this one {why}; leave it out")
        return possible if self.cuda_graphs is None else self.cuda_graphs

    @classmethod
    def of(cls, **options: Any) -> Self:
        """The config with these options; one clear `UserError` for an unknown or impossible one."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise UserError(explain(error.errors()[0], list(cls.model_fields))) from None


def default_memory(device: torch.device) -> int:
    """Bytes for pages: a quarter of what is free, and at most 1 GiB outside a GPU's own memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return min(LARGEST_DEFAULT, psutil.virtual_memory().available // 4)
