"""Whether to compile: decided by a measurement in this very run, never by hope.

The rule. Compilation is tried only if the rest of the run, at the eager speed just measured, is so long that a gain of
`EXPECTED_GAIN` would repay `EXPECTED_SECONDS`. Then one block is compiled (all blocks share its code), the same batch is
timed both ways, and the faster one is kept. The decision is part of the checkpoint, because the two differ in the last bit.
On a CPU with the native kernels the gain is usually too small for a run of minutes; on a GPU it usually pays.
"""

import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from headspring.models.model import ModelModule

EXPECTED_SECONDS = 60.0
EXPECTED_GAIN = 0.10
MEASURED_STEPS = 3


def worth_trying(remaining_seconds: float) -> bool:
    """Whether a gain of `EXPECTED_GAIN` on what is left would repay the compilation."""
    has_compiler = torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")
    return bool(has_compiler) and remaining_seconds * EXPECTED_GAIN > EXPECTED_SECONDS


def compile_blocks(model: ModelModule) -> None:
    """Compile every block in place, forward and backward."""
    for block in model.blocks():
        block.compile(dynamic=False)


def undo(model: ModelModule) -> None:
    """Run every block eagerly again."""
    for block in model.blocks():
        block._compiled_call_impl = None


def faster_compiled(model: ModelModule, work: Callable[[], Any]) -> bool:
    """Time `work` (forward and backward of one batch) both ways; leave the model in the faster one. True: compiled."""
    eager = _best_time(work)
    compile_blocks(model)
    try:
        work()
        compiled = _best_time(work)
    except Exception:  # a compiler that fails is a compiler that does not pay
        compiled = float("inf")
    if compiled >= eager:
        undo(model)
    return compiled < eager


def _best_time(work: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(MEASURED_STEPS):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
