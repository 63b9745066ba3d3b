"""The other half of `sandbox.py`: a small interpreter that forks once for every program and reports what it did.

Run as `python -I -B sandbox_server.py MECHANISM FOLDER PRELOAD...`. It reads requests from standard input and writes
answers to standard output, each a 4-byte length and JSON. A program runs in a fork of this process, which has already
paid for starting Python; the fork isolates itself (see `isolation.py`) before the first line of the program runs.
Standard library only: our package is not importable here, and must not be.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import resource
import selectors
import shutil
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from types import CodeType, ModuleType
from typing import IO, Any

MEMORY_EXIT = 91  # how the fork says that MemoryError ended the program
SETUP_EXIT = 92  # how it says that it could not isolate itself, and so ran nothing
OPEN_FILES, FILE_BYTES, FOLDER_BYTES = 64, 16 << 20, 64 << 20
LOOK_SECONDS = 0.05


def read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack("=I", head)
    return json.loads(stream.read(length))


def write_message(stream: IO[bytes], message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    stream.write(struct.pack("=I", len(body)) + body)
    stream.flush()


def serve(mechanism: str, folder: str, preload: list[str], isolation: ModuleType) -> None:
    """Answer requests until standard input ends."""
    answers, requests = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb")
    if sys.platform == "linux":
        isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
        isolation.prctl(isolation.PR_SET_CHILD_SUBREAPER, 1)
    for name in preload:
        importlib.import_module(name)
    if mechanism == "namespaces":
        folder = isolation.enter_namespaces(folder, FOLDER_BYTES)
    write_message(answers, {"ready": True})
    while (request := read_message(requests)) is not None:
        place = os.path.join(folder, str(os.getpid()))  # a server that was lost may have left its own
        os.mkdir(place, 0o700)
        try:
            write_message(answers, run(request, mechanism, place, isolation))
        finally:
            shutil.rmtree(place, ignore_errors=True)


def run(request: dict[str, Any], mechanism: str, place: str, isolation: ModuleType) -> dict[str, Any]:
    """Fork, watch, kill, report."""
    started = time.monotonic()
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _become_program(request, mechanism, place, isolation, out[1], err[1])
        finally:
            os._exit(SETUP_EXIT)
    os.close(out[1])
    os.close(err[1])
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)  # the fork does it too: whoever comes first
    limit = request["output_bytes"]
    reason, outputs = _watch(pid, {"stdout": out[0], "stderr": err[0]}, started + request["timeout"], limit, place)
    _kill_all(pid)
    _, status = os.waitpid(pid, 0)
    _reap_orphans(isolation)
    texts = {name: bytes(data).decode("utf-8", "replace") for name, data in outputs.items()}
    return {"status": reason or _status(status), "seconds": time.monotonic() - started, **texts}


def _watch(pid: int, pipes: dict[str, int], deadline: float, limit: int, place: str) -> tuple[str, dict[str, bytearray]]:
    """Drain both pipes until the program ends ("") or is to be ended ("timeout", "killed" for a full folder)."""
    outputs = {name: bytearray() for name in pipes}
    reason, wait = "", 0.0005
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        while True:
            now = time.monotonic()
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                deadline = min(deadline, now)  # what is in the pipes is read, nothing is waited for
            elif now >= deadline or _folder_bytes(place) > FOLDER_BYTES:
                reason = "timeout" if now >= deadline else "killed"
                break
            if not selector.get_map():
                if deadline <= now:
                    break
                time.sleep(wait)
                wait = min(2 * wait, LOOK_SECONDS)
                continue
            events = selector.select(max(0.0, min(deadline - now, LOOK_SECONDS)))
            if not events and deadline <= now:
                break
            for key, _ in events:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                output = outputs[key.data]
                output += chunk[: limit - len(output)]
    for pipe in pipes.values():
        os.close(pipe)
    return reason, outputs


def _folder_bytes(place: str) -> int:
    total = 0
    for root, _, files in os.walk(place):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def _kill_all(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _reap_orphans(isolation: ModuleType) -> None:
    """End what left the group with setsid: as their subreaper this process has become their parent (Linux)."""
    while True:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
            for child in children.split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _status(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "timeout"
    if code < 0:
        return "killed"
    return {0: "ok", MEMORY_EXIT: "memory", SETUP_EXIT: "setup"}.get(code, "error")


def _become_program(request: dict, mechanism: str, place: str, isolation: ModuleType, out: int, err: int) -> None:
    """In the fork: streams, limits, isolation; then the program, and `os._exit`. Never returns normally."""
    os.setpgid(0, 0)
    with open(os.path.join(place, ".stdin"), "w+b") as stdin:
        stdin.write(request["stdin"].encode("utf-8", "replace"))
        stdin.seek(0)
        os.unlink(stdin.name)
        for source, target in ((stdin.fileno(), 0), (out, 1), (err, 2)):
            os.dup2(source, target)
    os.closerange(3, 4096)
    os.chdir(place)
    os.environ.update(HOME=place, TMPDIR=place)
    try:
        _limit(request["timeout"], request["memory_bytes"])
        if sys.platform == "linux":
            isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
        if mechanism != "none":
            isolation.drop_capabilities()
            if mechanism == "landlock":
                isolation.restrict_files_landlock(place)
            isolation.deny_system_calls()
    except BaseException:
        traceback.print_exc()
        os._exit(SETUP_EXIT)
    os._exit(_execute(request["code"]))


def _limit(timeout: float, memory_bytes: int) -> None:
    seconds = math.ceil(timeout) + 1  # processor time; the wall clock is the server's business
    wanted = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in wanted.items():
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the program goes first


def _execute(code: str) -> int:
    """Run the program as `__main__`; the exit code."""
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.argv = ["program"]
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    exit_code = 0
    try:
        program: CodeType = compile(code, "<program>", "exec", dont_inherit=True)
        exec(program, main.__dict__)
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except MemoryError:
        exit_code = MEMORY_EXIT
    except BaseException as error:
        exit_code = 1
        # The first entry is this file's own frame.
        with contextlib.suppress(BaseException):
            traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    return exit_code & 0xFF


def _load_isolation() -> ModuleType:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "isolation.py")
    spec = importlib.util.spec_from_file_location("isolation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3:], _load_isolation())
