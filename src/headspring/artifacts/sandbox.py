"""Run Python that nobody has read: what a model wrote, or what stands in somebody's docstring.

    run_python("print(2 + 2)")            -> Outcome(status="ok", stdout="4\\n", ...)
    run_batch(["1 / 0", "while True: 0"]) -> [Outcome("error", ...), Outcome("timeout", ...)]

How it works: a server process (`sandbox_server.py`, started with `python -I` and an environment of our choosing)
forks once a program, about 5 ms each. The fork is its own process group with limits on wall time, processor time,
address space, file size, written bytes and open files; it reads the interpreter and the system's libraries, writes
only its own temporary folder, and has no network, no other process and no signal to send (`isolation.py` says how).

`isolation()` does not trust a version number: it runs a program that tries to break out and reports what was stopped.
Where that fails, nothing runs unless the caller says `unsafe=True` (`--unsafe-execution`); limits and the clean
environment hold even then.

What it gives up: programs cannot start processes or executables (`fork` fails as at a process limit of one; threads
work), `chmod` and `utime` fail, and the kernel is shared. Programs of one batch do not see each other's files. Result
streams belong to the program, so a program can print what it likes: a caller that counts successes must ask for
something the program cannot know beforehand (see `evaluation/execution.py`).
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

from headspring.artifacts import sandbox_server
from headspring.artifacts.errors import HeadspringError, UserError
from headspring.artifacts.progress import track

Status = Literal["ok", "error", "timeout", "memory", "killed"]
MECHANISMS = ("landlock", "namespaces")  # in the order of preference
MEMORY_BYTES = 512 << 20
OUTPUT_BYTES = 64 << 10
GRACE_SECONDS = 10.0  # what the server may need beyond a program's own limit before it is given up


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `status`: "ok" exit code 0; "error" another one (an exception); "timeout" wall or processor
    time; "memory" an uncaught MemoryError; "killed" a signal, or more written than allowed.
    `stdout` and `stderr` are cut at `output_bytes`; `seconds` is wall time."""

    status: Status
    stdout: str
    stderr: str
    seconds: float


def run_python(
    code: str,
    *,
    timeout: float = 5.0,
    memory_bytes: int = MEMORY_BYTES,
    stdin: str = "",
    unsafe: bool = False,
    output_bytes: int = OUTPUT_BYTES,
) -> Outcome:
    """Run one program; see `run_batch`."""
    options = {"timeout": timeout, "memory_bytes": memory_bytes, "unsafe": unsafe, "output_bytes": output_bytes}
    return run_batch([code], stdin=stdin, **options)[0]  # type: ignore[arg-type]


def run_batch(
    programs: Sequence[str],
    *,
    timeout: float = 5.0,
    memory_bytes: int = MEMORY_BYTES,
    stdin: str = "",
    unsafe: bool = False,
    output_bytes: int = OUTPUT_BYTES,
    preload: Sequence[str] = (),
    workers: int = 1,
    description: str = "running programs",
) -> list[Outcome]:
    """Run each program on its own and return the outcomes in order.

    timeout: seconds of wall time for each. memory_bytes: address space for each. output_bytes: kept of each stream.
    preload: modules that the server imports once, so that programs which import them start faster.
    workers: servers side by side. Raises `UserError` where this machine offers no isolation and `unsafe` is not set.
    """
    if timeout <= 0 or memory_bytes <= 0 or output_bytes < 0 or workers < 1:
        raise UserError("sandbox: timeout, memory_bytes and workers must be positive, output_bytes not negative")
    if not programs:
        return []
    mechanism = _mechanism()
    if mechanism is None and not unsafe:
        raise UserError(
            "this machine offers no isolation for untrusted code (Landlock ABI 3 or user namespaces, and seccomp); "
            "allow it to run without with --unsafe-execution (unsafe=True)"
        )
    request = {"timeout": timeout, "memory_bytes": memory_bytes, "stdin": stdin, "output_bytes": output_bytes}
    requests = [{**request, "code": code} for code in programs]
    return _run_all(requests, mechanism or "none", preload, min(workers, len(programs)), description)


@cache
def isolation() -> str | None:
    """What is enforced here, verified by trying to break out; None where nothing can be."""
    mechanism = _mechanism()
    if mechanism is None:
        return None
    files = {
        "landlock": "Landlock: files read-only outside a temporary folder, home and project unreadable",
        "namespaces": "namespaces: a read-only root without home and project, an empty network, a temporary folder",
    }
    return f"{files[mechanism]}; seccomp: no sockets, processes or signals; no capabilities; resource limits"


@cache
def _mechanism() -> str | None:
    """The first mechanism whose probe could not break out."""
    if sys.platform != "linux":
        return None
    return next((mechanism for mechanism in MECHANISMS if not holes(mechanism)), None)


def holes(mechanism: str) -> list[str]:
    """What a program could do under `mechanism` that it must not; also names what it could not do but should."""
    with tempfile.TemporaryDirectory(prefix="headspring-probe-") as folder:
        canary = Path(folder) / "canary"
        canary.write_text("secret")
        request = {"timeout": 5.0, "memory_bytes": MEMORY_BYTES, "stdin": "", "output_bytes": OUTPUT_BYTES}
        code = PROBE.format(canary=str(canary), folder=folder, parent=os.getpid())
        try:
            outcome = _run_all([{**request, "code": code}], mechanism, (), 1, "probing")[0]
        except HeadspringError as error:
            return [str(error)]
        try:
            found = json.loads(outcome.stdout)
        except ValueError:
            return [f"the probe ended with {outcome.status}: {outcome.stderr[-300:]}"]
        if canary.read_text() != "secret" or canary.stat().st_mode & 0o777 == 0:
            found.append("the canary changed")
        return found


# Each attempt must raise OSError; "work" must not.
PROBE = """
import json, os, socket, sys
canary, folder, parent = {canary!r}, {folder!r}, {parent}
os.symlink(canary, "link")
beside = sys.prefix + "/headspring-probe"
attempts = {{
    "read a file outside": lambda: open(canary).read(),
    "write a file outside": lambda: open(canary, "w"),
    "write through a link": lambda: open("link", "w"),
    "create a file outside": lambda: open(folder + "/new", "x"),
    "remove a file outside": lambda: os.unlink(canary),
    "move a file outside": lambda: os.rename(canary, folder + "/moved"),
    "truncate a file outside": lambda: os.truncate(canary, 0),
    "change permissions outside": lambda: os.chmod(canary, 0),
    "write beside the interpreter": lambda: (os.mkdir(beside), os.rmdir(beside)),
    "open a socket": lambda: socket.socket(),
    "open a local socket": lambda: socket.socket(socket.AF_UNIX),
    "start a process": lambda: os.fork() or os._exit(0),
    "run an executable": lambda: os.execv(sys.executable, ["python", "-c", ""]),
    "signal the parent": lambda: os.kill(parent, 0),
    "signal the server": lambda: os.kill(os.getppid(), 0),
    "read the parent's environment": lambda: open("/proc/%d/environ" % parent).read(),
}}
holes = []
for name, attempt in attempts.items():
    try:
        attempt()
        holes.append(name)
    except OSError:
        pass
try:
    open("mine", "w").write("x")
    import decimal, fractions, statistics
except OSError as error:
    holes.append("could not work: %s" % error)
print(json.dumps(holes))
"""


def _run_all(
    requests: Sequence[dict[str, Any]], mechanism: str, preload: Sequence[str], workers: int, description: str
) -> list[Outcome]:
    outcomes: list[Outcome | None] = [None] * len(requests)
    pending = iter(track(range(len(requests)), description)) if len(requests) > 1 else iter(range(len(requests)))
    failures: list[BaseException] = []
    lock = threading.Lock()

    def work() -> None:
        try:
            with _Server(mechanism, preload) as server:
                for index in _take(pending, lock):
                    outcomes[index] = server.run(requests[index])
        except BaseException as error:
            failures.append(error)

    if workers == 1:
        work()
    else:
        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return [outcome for outcome in outcomes if outcome is not None]


def _take(pending: Iterator[int], lock: threading.Lock) -> Iterator[int]:
    while True:
        with lock:
            index = next(pending, None)
        if index is None:
            return
        yield index


class _Server:
    """One `sandbox_server.py`, started when needed and again after it was lost."""

    def __init__(self, mechanism: str, preload: Sequence[str]):
        self._mechanism, self._preload = mechanism, preload
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Server":
        self._folder = tempfile.TemporaryDirectory(prefix="headspring-sandbox-", ignore_cleanup_errors=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._folder.cleanup()

    def run(self, request: dict[str, Any]) -> Outcome:
        process = self._process or self._start()
        started = time.monotonic()
        try:
            sandbox_server.write_message(_stream(process.stdin), request)
            answer = _read(_stream(process.stdout), request["timeout"] + GRACE_SECONDS)
        except BrokenPipeError:
            answer = None
        if answer is None:
            self._stop()
            return Outcome("killed", "", "the sandbox's server was lost", time.monotonic() - started)
        if answer["status"] == "setup":
            raise HeadspringError(f"the sandbox could not isolate a program: {answer['stderr'].strip()[-300:]}")
        return Outcome(**answer)

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-I", "-B", sandbox_server.__file__, self._mechanism, self._folder.name]
        self._process = subprocess.Popen(
            [*command, *self._preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )
        if _read(_stream(self._process.stdout), GRACE_SECONDS) is None:
            self._process.kill()
            words = _stream(self._process.stderr).read().decode(errors="replace").strip().splitlines()
            self._stop()
            raise HeadspringError(f"the sandbox did not start: {words[-1] if words else 'no reason given'}")
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _stream(process.stdin).close()  # the server ends when its requests do
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its programs follow: they asked for the parent-death signal
            process.wait()
        for stream in (process.stdout, process.stderr):
            _stream(stream).close()


def _environment() -> dict[str, str]:
    """All that a program may see: no keys, no tokens, no home. One thread for numerical libraries."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC", **threads}


def _read(stream: IO[bytes], seconds: float) -> dict[str, Any] | None:
    """The server's next message; None when it is gone or silent for `seconds`."""
    ready, _, _ = select.select([stream], [], [], seconds)
    return sandbox_server.read_message(stream) if ready else None


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
