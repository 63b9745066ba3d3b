"""What a stage costs: wall-clock seconds and the peak of this process's resident memory."""

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path


class Meter:
    """Started when made. On Linux the kernel's high-water mark is reset first, so that the peak is this stage's own;
    elsewhere it is the peak of the process so far. Child processes are not counted."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def cost(self, seconds_before: float = 0.0) -> dict[str, float]:
        return {"seconds": round(seconds_before + self.seconds, 3), "peak_memory_bytes": float(peak_memory_bytes())}


def peak_memory_bytes() -> int:
    """The high-water mark of this process's resident memory."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
