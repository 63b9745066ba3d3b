"""Keep freed memory for the next step instead of giving it back to the system.

torch has no caching allocator on the CPU. glibc returns every large block to the kernel when it is freed, and the kernel
zeroes each page again when it is next touched: in a training step that is gigabytes of page faults. Two `mallopt` settings
keep such blocks in the heap. The price: the process holds its peak memory until it ends.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Ask glibc to keep blocks of up to a gigabyte. True where that was possible."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, KEEP) and mallopt(M_TRIM_THRESHOLD, KEEP))
