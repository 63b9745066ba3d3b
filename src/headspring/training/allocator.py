"""Keep freed memory for the next step instead of giving it back to the system.

torch has no caching allocator on the CPU. glibc returns every large block to the kernel when it is freed, and the kernel
zeroes each page again when it is next touched: in a training step that is gigabytes of page faults. Two `mallopt` settings
keep such blocks in the heap while a run lasts. The price: the process holds its peak memory until the run ends.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP = 1 << 30  # bytes
USUAL = 32 << 20  # bytes: the most that glibc's own moving threshold reaches


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Inside the block glibc keeps freed blocks of up to a gigabyte; at its end they go back to the system."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _set_thresholds(libc, KEEP)
    try:
        yield
    finally:
        _set_thresholds(libc, USUAL)
        libc.malloc_trim(0)


def _set_thresholds(libc: ctypes.CDLL, limit: int) -> None:
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(parameter, limit)
