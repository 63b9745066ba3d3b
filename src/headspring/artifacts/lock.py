"""One process at a time in a folder.

An advisory lock (`flock`) on `FOLDER/.lock`, held by the open file: the system drops it when the process ends,
however it ends, so a `kill -9` leaves nothing to clean up. The file's content, the holder's process id, is only for
the message. What it gives up: network file systems without `flock`, where two machines could still meet.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headspring.artifacts.errors import UserError


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, made where it is missing, for the length of the block. Raises `UserError` that names the process which
    has it already, or says why nothing can be written there."""
    import fcntl  # POSIX only

    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); give another --run-dir") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"{folder}: another run (process {holder}) is working here; wait for it or give another --run-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
