"""Keep freed memory for the next step instead of giving it back to the system.

torch has no caching allocator on the CPU. glibc returns every large block to the kernel when it is freed, and the kernel
zeroes each page again when it is next touched: in a training step that is gigabytes of page faults. Two `mallopt` settings
keep such blocks in the heap while a run lasts, and the heap is asked to consist of huge pages, so that the processor finds
an address without walking through its tables. The price: the process holds its peak memory until the run ends.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP = 1 << 30  # bytes
MADV_HUGEPAGE = 14
HUGE = 2 << 20  # bytes
USUAL = 32 << 20  # bytes: the most that glibc's own moving threshold reaches


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Inside the block glibc keeps freed blocks of up to a gigabyte; at its end they go back to the system."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _set_thresholds(libc, KEEP)
    _prefer_huge_pages(libc)
    try:
        yield
    finally:
        _set_thresholds(libc, USUAL)
        libc.malloc_trim(0)


def _set_thresholds(libc: ctypes.CDLL, limit: int) -> None:
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(parameter, limit)


def _prefer_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap by what a run may keep, mark that stretch, and free it again: no page of it is touched here.

    Only advice: where the system has no huge pages, or not enough address space, nothing changes.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = KEEP - HUGE
    block = libc.malloc(size)
    if block:
        start = -(-block // HUGE) * HUGE
        libc.madvise(start, block + size - start, MADV_HUGEPAGE)
        libc.free(block)
