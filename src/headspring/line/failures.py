"""What can go wrong outside our code, as one line each: a full disk, Ctrl-C, a request to stop."""

import errno
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headspring.artifacts.errors import HeadspringError

FULL = "no space left on device"
NOTHING_LEFT = 64 * 1024  # bytes free below which a failed write is taken for a full disk


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether the disk under `folder` being full is behind `error`. Not every library passes the system's error on
    (PyTorch's zip writer raises a bare RuntimeError), so the words and the space left are looked at too."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if FULL in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    try:
        return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(folder).free < NOTHING_LEFT
    except OSError:
        return False


def is_interrupt(error: BaseException) -> bool:
    """Whether somebody asked the run to stop: Ctrl-C, SIGTERM, or the training loop's own `Interrupted`."""
    if isinstance(error.__cause__ or error, KeyboardInterrupt):
        return True
    loop = sys.modules.get("headspring.training.loop")  # raised by it, so imported already
    return loop is not None and isinstance(error, loop.Interrupted)


@contextmanager
def one_line_failures(stage: str, folder: Path, resumes: bool) -> Iterator[None]:
    """Turn a full disk and an interrupt into a `HeadspringError` that says what is kept and how to go on."""
    kept = "go on from its last checkpoint" if resumes else "start this stage again"
    try:
        with _termination():
            yield
    except KeyboardInterrupt as error:
        raise HeadspringError(
            f"{stage}: interrupted; finished stages are kept: run the same command again to {kept}"
        ) from error
    except HeadspringError:
        raise
    except Exception as error:
        if is_disk_full(error, folder):
            raise HeadspringError(
                f"{stage}: the disk under {folder} is full; finished stages are kept: free some space and run the "
                f"same command again to {kept}"
            ) from error
        raise


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM interrupts like Ctrl-C. The training loop puts its own handlers in place of this one while it runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
