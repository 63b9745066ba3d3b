"""The sandbox holds what it promises, under each mechanism this machine offers, and shows what it cannot hold without."""

import os
import threading
import time
from pathlib import Path

import pytest

from headspring.artifacts import HeadspringError, UserError, sandbox
from headspring.artifacts.sandbox import MECHANISMS, isolation, run_batch, run_python

AVAILABLE = [mechanism for mechanism in MECHANISMS if not sandbox.holes(mechanism)]


@pytest.fixture(params=MECHANISMS)
def mechanism(request, monkeypatch):
    """Force one mechanism; a kernel without it has nothing to test, and `test_one_mechanism_works` says so."""
    if request.param not in AVAILABLE:
        return None
    monkeypatch.setattr(sandbox, "_mechanism", lambda: request.param)
    return request.param


def test_one_mechanism_works():
    assert AVAILABLE, [sandbox.holes(mechanism) for mechanism in MECHANISMS]
    assert isolation() and "seccomp" in isolation()


def test_programs_run():
    assert run_python("print(6 * 7)").stdout == "42\n"
    assert run_python("import sys; print(input()[::-1]); sys.exit(0)", stdin="abc\n").stdout == "cba\n"
    failed = run_python("print('before')\n1 / 0")
    assert (failed.status, failed.stdout) == ("error", "before\n")
    assert "ZeroDivisionError" in failed.stderr and "sandbox_server" not in failed.stderr
    assert run_python("raise SystemExit(3)").status == "error"
    assert run_python("x = ").status == "error"
    assert run_python("import os; os.abort()").status == "killed"
    assert run_python("print(__name__)").stdout == "__main__\n"


def test_files_outside_are_out_of_reach(mechanism, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    program = f"""
import os
path = {str(secret)!r}
os.symlink(path, "link")
os.mkdir("folder")
def attempt(action):
    try: action(); print("open")
    except OSError: print("closed")
attempt(lambda: open(path).read())
attempt(lambda: open(path, "w"))
attempt(lambda: open("link", "a"))
attempt(lambda: os.unlink(path))
attempt(lambda: os.rename(path, "mine"))
attempt(lambda: os.link(path, "mine"))
attempt(lambda: os.chmod(path, 0))
attempt(lambda: os.utime(path, (0, 0)))
attempt(lambda: os.truncate(path, 0))
attempt(lambda: open("/proc/self/root" + path).read())
attempt(lambda: os.listdir(os.path.dirname(path)))
attempt(lambda: os.chroot("folder"))
"""
    outcome = run_python(program)
    assert outcome.stdout.split() == ["closed"] * 12, outcome
    assert secret.read_text() == "key" and secret.stat().st_mtime > 0
    assert run_python("open('own', 'w').write('x'); print(open('own').read())").stdout == "x\n"


def test_programs_do_not_see_each_other(mechanism):
    outcomes = run_batch(["open('left', 'w').write('x')", "import os; print(os.listdir())"])
    assert outcomes[1].stdout == "[]\n"


def test_no_network_and_no_processes(mechanism):
    attempts = {
        "inet": "import socket; socket.socket()",
        "unix": "import socket; socket.socket(socket.AF_UNIX)",
        "fork": "import os; os.fork()",
        "exec": "import os; os.execv('/bin/true', ['true'])",
        "spawn": "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
        "parent": "import os; os.kill(os.getppid(), 9)",
        "everyone": "import os; os.kill(-1, 9)",
        "group": "import os; os.killpg(0, 9)",
        "escape": "import os; os.setsid()",
        "limit": "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
    }
    for name, outcome in zip(attempts, run_batch(list(attempts.values()))):
        assert outcome.status == "error", (name, outcome)
        assert "Error" in outcome.stderr.splitlines()[-1], (name, outcome)


def test_limits_cannot_be_raised(mechanism):
    code = "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    assert run_python(code).status == "error"


def test_threads_work(mechanism):
    code = "import threading; t = threading.Thread(target=print, args=('hi',)); t.start(); t.join()"
    assert run_python(code).stdout == "hi\n"


def test_secrets_of_the_environment(mechanism, monkeypatch):
    monkeypatch.setenv("API_KEY", "hunter2")
    code = f"""
import os
print(sorted(os.environ))
for pid in ({os.getpid()}, os.getppid(), "self"):
    try: print(open(f"/proc/{{pid}}/environ").read())
    except OSError: print("closed")
"""
    outcome = run_python(code)
    assert outcome.status == "ok" and "hunter2" not in outcome.stdout and "API_KEY" not in outcome.stdout
    assert "hunter2" in Path("/proc/self/environ").read_text() or "API_KEY" in os.environ  # there was something to find


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import os\nos.close(1); os.close(2)\nwhile True: pass", "timeout"),
        ("x = bytearray(10**10)", "memory"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "memory"),
        ("open('big', 'wb').write(bytes(10**8))", "error"),
        ("i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(10**7)); i += 1", "killed or error"),
        ("import os\nwhile True: os.fork()", "error"),
        ("def f(): f()\nf()", "error"),
        ("import os\nfor i in range(1000): os.dup(1)", "error"),
    ],
)
def test_limits(code, status):
    started = time.monotonic()
    assert run_python(code, timeout=2).status in status
    assert time.monotonic() - started < 10


def test_output_is_bounded():
    outcome = run_python("print('x' * 10**7)", output_bytes=1000)
    assert outcome.status == "ok" and len(outcome.stdout) == 1000
    assert run_python("while True: print('x' * 1000)", timeout=0.5).status == "timeout"
    assert run_python("import sys; sys.stdout.buffer.write(b'\\xff')").stdout == "\ufffd"


def test_grandchildren_die_even_without_isolation(monkeypatch, tmp_path):
    """Unsafe mode allows processes; none of them outlives the program, not even one that left the group."""
    monkeypatch.setattr(sandbox, "_mechanism", lambda: None)
    marks = [tmp_path / name for name in ("child", "session")]
    code = f"""
import os, time
for path, leave in {[(str(mark), i == 1) for i, mark in enumerate(marks)]!r}:
    if os.fork() == 0:
        if leave: os.setsid()
        open(path, "w").write(str(os.getpid()))
        time.sleep(60)
while not all(os.path.exists(p) and open(p).read() for p in {[str(mark) for mark in marks]!r}): time.sleep(0.01)
"""
    assert run_python(code, unsafe=True).status == "ok"
    for mark in marks:
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.read_text()), 0)


def test_refuses_without_isolation(monkeypatch):
    monkeypatch.setattr(sandbox, "_mechanism", lambda: None)
    with pytest.raises(UserError, match="--unsafe-execution"):
        run_python("print(1)")
    assert run_python("print(1)", unsafe=True).stdout == "1\n"


def test_the_probe_finds_holes(monkeypatch):
    """Control: with one rule taken out of the filter, the probe says what is open."""
    source = Path(sandbox.sandbox_server.__file__).with_name("isolation.py").read_text()
    weaker = source.replace('"socket": (41, 198), ', "").replace('"socket": (41, 198),', "")
    assert weaker != source
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"headspring-weaker-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "isolation.py").write_text(weaker)
        (folder / "server.py").write_text(Path(sandbox.sandbox_server.__file__).read_text())
        monkeypatch.setattr(sandbox.sandbox_server, "__file__", str(folder / "server.py"))
        assert "open a socket" in sandbox.holes(AVAILABLE[0])
    finally:
        for file in folder.glob("*.py"):
            file.unlink()
        folder.rmdir()


def test_a_mechanism_that_fails_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "_mechanism", lambda: "namespaces")
    monkeypatch.setattr(sandbox, "_environment", lambda: {"PATH": ""})
    outcome = run_batch(["print(1)"])  # control: an ordinary start
    assert outcome[0].stdout == "1\n"
    with pytest.raises(HeadspringError, match="did not start"):
        run_batch(["print(1)"], preload=["no_such_module"])


def test_batches(mechanism):
    programs = [f"print({i})" if i % 3 else "1 / 0" for i in range(40)]
    for workers in (1, 2):
        outcomes = run_batch(programs, workers=workers)
        assert [o.stdout for o in outcomes] == [f"{i}\n" if i % 3 else "" for i in range(40)]
    assert run_batch([]) == []
    assert run_batch(["import sys; print('fractions' in sys.modules)"], preload=["fractions"])[0].stdout == "True\n"


def test_a_lost_server_is_replaced(monkeypatch):
    with sandbox._Server(AVAILABLE[0], ()) as server:
        request = {"timeout": 5.0, "memory_bytes": 1 << 29, "stdin": "", "output_bytes": 100, "code": "print(1)"}
        assert server.run(request).stdout == "1\n"
        killer = threading.Timer(0.2, server._process.kill)
        killer.start()
        assert server.run({**request, "code": "import time; time.sleep(3)"}).status == "killed"
        assert server.run(request).stdout == "1\n"


@pytest.mark.parametrize("options", [{"timeout": 0}, {"memory_bytes": -1}, {"output_bytes": -1}])
def test_bad_options(options):
    with pytest.raises(UserError):
        run_python("print(1)", **options)
