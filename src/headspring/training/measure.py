"""What this machine can do: the rate of a large matrix product, the roof that utilisation is measured against."""

import functools
import time

import torch

SIZE = 2048


@functools.cache
def matmul_flops(dtype: torch.dtype, device: str = "cpu", threads: int = 0) -> float:
    """FLOPs per second of a 2048³ product, the best of a few; about a tenth of a second of work.

    `threads` is only part of the cache's key: the rate is that of the threads torch uses now.
    """
    a = torch.randn(SIZE, SIZE, dtype=dtype, device=device)
    b = torch.randn(SIZE, SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * SIZE**3 / best
