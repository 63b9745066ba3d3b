"""Text to measure by, and what the parts of a model see while it reads.

The text is the embedded default (the standard library's source and Python's reference), or a file. What GPTQ calibrates on
and what a report scores on are disjoint: a document belongs to one of them by the hash of its name.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from headspring.artifacts import UserError
from headspring.models import kernels
from headspring.models.moe import Experts
from headspring.models.part import Linear
from headspring.models.stack import StackModule
from headspring.text.sources.base import Reading
from headspring.text.sources.python import StandardLibrary, Topics
from headspring.tokenization.tokenizer import Tokenizer

Purpose = Literal["calibration", "held_out"]
LENGTH = 512  # tokens of a row
ROWS_TOGETHER = 8
HELD_OUT = 8  # every so many documents


def embedded_texts(purpose: Purpose) -> Iterator[str]:
    """Documents of the embedded corpus, code and English in turn."""
    sources = (config.read(name, Reading()) for name, config in (("stdlib", StandardLibrary()), ("topics", Topics())))
    for document in chain.from_iterable(zip_longest(*sources)):
        if document is None:
            continue
        place = document.path + document.metadata.get("topic", "")
        held_out = hashlib.blake2b(place.encode("utf-8", "surrogateescape")).digest()[0] % HELD_OUT == 0
        if held_out == (purpose == "held_out"):
            yield document.text


def texts_of(file: str | Path | None, purpose: Purpose) -> Iterator[str]:
    """The texts of a file, its paragraphs, or those of the embedded corpus. Raises `UserError` for a file that is not text."""
    if file is None:
        return embedded_texts(purpose)
    try:
        return iter(Path(file).expanduser().read_text(encoding="utf-8").split("\n\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from error


def token_rows(tokenizer: Tokenizer, texts: Iterator[str], tokens: int, context: int) -> torch.Tensor:
    """(N, T) int64: about `tokens` tokens in rows of `LENGTH` (or the context, or what there is).

    No document gives more than two rows. Raises `UserError` where there is no text."""
    length, stream = min(LENGTH, context, tokens), []
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text in texts:
        stream += (start + tokenizer.encode(text))[: 2 * length]
        if len(stream) >= tokens:
            break
    length = min(length, len(stream))
    if length < 2:
        raise UserError("there is no text to measure by")
    count = len(stream) // length
    return torch.tensor(stream[: count * length]).view(count, length)


# ---- block by block


class _Caught(Exception):
    """Ends a forward pass at its first block."""


def enter(stack: StackModule, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """What the first block is given for tokens (B, T): the stream (B, T, D) and the context that all blocks share."""
    caught: list[Any] = []

    def catch(module: torch.nn.Module, arguments: Any) -> None:
        caught.extend(arguments[:2])
        raise _Caught

    handle = stack.layers[0].register_forward_pre_hook(catch)
    try:
        stack(tokens)
    except _Caught:
        pass
    finally:
        handle.remove()
    return caught[0], caught[1]


def leave(stack: StackModule, x: torch.Tensor) -> torch.Tensor:
    """Hidden states from what the last block gave."""
    return x if stack.norm is None else stack.norm(x)


@contextmanager
def hessians(linears: dict[str, Linear]) -> Iterator[dict[tuple[str, ...], torch.Tensor]]:
    """Inside the block, Σ x xᵀ (I, I) float32 over the inputs of each `Linear`; those that read the same have one, by their
    names."""
    sums: dict[tuple[str, ...], torch.Tensor] = {}
    names = {linear: name for name, linear in linears.items()}

    def see(parts: tuple[Linear, ...], x: torch.Tensor) -> None:
        seen = tuple(names[part] for part in parts if part in names)
        if seen:
            rows = _exact(x.detach().reshape(-1, x.shape[-1]).contiguous())
            sums[seen] = kernels.weight_gradient(rows, rows, sums.get(seen))

    before, Linear.watcher = Linear.watcher, see
    try:
        yield sums
    finally:
        Linear.watcher = before


def _exact(rows: torch.Tensor) -> torch.Tensor:
    """Rows whose products are summed in float32: a sum that is rounded to bfloat16 need not be positive definite."""
    return rows if kernels.use_products(rows, rows.shape[1]) else rows.float()


@dataclass
class Seen:
    """What the experts of a layer were given: Σ x xᵀ (E, I, I) float32 over the rows of each, and how many there were."""

    sums: torch.Tensor
    counts: list[int]


@contextmanager
def expert_hessians(layers: dict[str, Experts]) -> Iterator[dict[tuple[str, ...], Seen]]:
    """Inside the block, what each expert sees, by the names of the parameters that read it: (gate, up) and (out,)."""
    found: dict[tuple[str, ...], Seen] = {}
    prefixes = {experts: prefix for prefix, experts in layers.items()}

    def see(experts: Experts, names: tuple[str, ...], x: torch.Tensor, ends: tuple[int, ...]) -> None:
        if experts not in prefixes:
            return
        count, size, start = len(ends), x.shape[-1], 0
        seen = found.setdefault(
            tuple(f"{prefixes[experts]}.{name}" for name in names), Seen(torch.zeros(count, size, size), [0] * count)
        )
        for expert, end in enumerate(ends):
            rows = _exact(x.detach()[start:end].contiguous())
            if end > start:
                kernels.weight_gradient(rows, rows, seen.sums[expert])
            seen.counts[expert] += int(rows.any(dim=-1).sum())  # fillers are rows of zeros
            start = end

    before, Experts.watcher = Experts.watcher, see
    try:
        yield found
    finally:
        Experts.watcher = before
