"""Linux isolation for one process: Landlock or namespaces for files, seccomp for everything else.

How it works: three kernel features that need no privilege and no package, called through `ctypes`.
- `restrict_files_landlock` (Landlock, kernel ≥ 6.2 for ABI 3): reading only below `readable_paths()`, writing only
  below one folder. Landlock judges the opened object, so a symbolic link does not lead around it.
- `enter_namespaces` (user + mount + network + IPC namespaces): a new root that holds read-only bind mounts of the
  same paths and a small tmpfs as `/tmp`. For kernels without Landlock, or with one too old.
- `deny_system_calls` (seccomp-BPF): no sockets, no new processes, no exec, no signals to others, no changes of
  permissions or times (Landlock does not cover these), no mounts, no io_uring (which would go around the filter).

Why not a container runtime: it would be one more thing to install, needs rights in many CI machines, and starts in
tenths of a second where this takes about a millisecond. What it gives up: the kernel is shared, so a kernel bug is
a way out; CPU caches and the clock are shared; names and sizes of files outside can be seen under Landlock (`stat`
is not covered), their content cannot.

This file is also loaded by `sandbox_server.py` in an interpreter without our package: standard library only.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_MINIMUM_ABI = 3  # before it a file could be truncated through a read-only open
LANDLOCK_READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR; EXECUTE (bit 0) is denied everywhere
LANDLOCK_FILE = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14  # the rights that exist on something that is not a folder
LANDLOCK_RIGHTS = {3: (1 << 15) - 1, 4: (1 << 15) - 1}  # handled rights by ABI; from 5 on also IOCTL_DEV (bit 15)
LANDLOCK_NO_NETWORK = 1 << 0 | 1 << 1  # BIND_TCP, CONNECT_TCP: ABI 4
LANDLOCK_SCOPES = 1 << 0 | 1 << 1  # ABSTRACT_UNIX_SOCKET, SIGNAL: ABI 6

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x08000000, 0x10000000, 0x40000000
CLONE_THREAD = 0x10000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 1 << 12, 1 << 14, 1 << 18, 1 << 1, 1 << 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, AT_RECURSIVE, AT_FDCWD, MNT_DETACH = 1, 2, 0x8000, -100, 2
MOUNT_SETATTR = 442

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 36, 38
SECCOMP_MODE_FILTER = 2
ALLOW, ERRNO = 0x7FFF0000, 0x00050000

# machine → (audit architecture, column in the table below, pivot_root, capset)
MACHINES = {"x86_64": (0xC000003E, 0, 155, 126), "aarch64": (0xC00000B7, 1, 41, 91)}

# name: (x86_64, aarch64); None where the machine has no such call. All of these answer EPERM.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # the network, and io_uring, which could open a socket without a system call of that name
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "io_uring_setup": (425, 425),
    # other programs and other processes
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpgid": (109, 154), "setsid": (112, 157), "setpriority": (141, 140),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # memory and queues shared with other processes of the same user
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # what Landlock leaves open: owners, permissions, times, attributes
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45),
    # mounts, namespaces and the kernel itself
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "personality": (135, 92),
}  # fmt: skip
SELF_ONLY = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}  # allowed when the pid is one's own
CLONE, CLONE3 = (56, 220), 435

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def readable_paths() -> list[str]:
    """What a program may read: the interpreter, its packages, shared libraries, a few harmless devices and facts."""
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))]
    system = ["/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime"]
    facts = ["/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/dev/urandom", "/dev/random", "/dev/zero"]
    paths = {path for name in [*python, *system, *facts] for path in (name, os.path.realpath(name))}
    return sorted(path for path in paths if path != "/" and os.path.exists(path))


def landlock_abi() -> int:
    """The kernel's Landlock version, 0 where there is none."""
    if _libc is None:
        return 0
    return max(0, _libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def restrict_files_landlock(writable: str) -> None:
    """From now on this process reads only `readable_paths()` and writes only below `writable` (and to /dev/null)."""
    abi = landlock_abi()
    if abi < LANDLOCK_MINIMUM_ABI:
        raise OSError(errno.ENOSYS, f"Landlock ABI {abi}, {LANDLOCK_MINIMUM_ABI} is needed")
    rights = LANDLOCK_RIGHTS.get(abi, (1 << 16) - 1)
    # struct landlock_ruleset_attr grew with the ABI; the kernel accepts any shorter one.
    attribute = struct.pack("=QQQ", rights, LANDLOCK_NO_NETWORK, LANDLOCK_SCOPES)
    attribute = attribute[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _call(LANDLOCK_CREATE_RULESET, attribute, ctypes.c_size_t(len(attribute)), 0)
    for path in readable_paths():
        _landlock_allow(ruleset, path, LANDLOCK_READ)
    _landlock_allow(ruleset, "/dev/null", 1 << 1 | 1 << 2)
    _landlock_allow(ruleset, writable, rights & ~1)
    _call(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _landlock_allow(ruleset: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= LANDLOCK_FILE
    _call(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, parent), 0)
    os.close(parent)


def enter_namespaces(folder: str, writable_bytes: int) -> str:
    """Leave the machine's mounts, network and IPC behind; returns the writable folder of the new root.

    `folder` becomes the new root's mount point. Everything there is read-only but a tmpfs of `writable_bytes`."""
    user, group = os.getuid(), os.getgid()
    spaces = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC
    try:
        _check(_libc.unshare(CLONE_NEWUSER | spaces), "unshare")  # type: ignore[union-attr]
    except OSError:
        _check(_libc.unshare(spaces), "unshare")  # type: ignore[union-attr]  # root where user namespaces are off
    else:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("none", folder, "tmpfs", MS_NOSUID | MS_NODEV)
    for path in [*readable_paths(), "/dev/null"]:
        _place(path, folder + path)
    os.makedirs(folder + "/tmp", exist_ok=True)
    os.makedirs(folder + "/.old")
    _call(_machine()[2], os.fsencode(folder), os.fsencode(folder + "/.old"))
    os.chdir("/")
    _check(_libc.umount2(b"/.old", MNT_DETACH), "umount2")  # type: ignore[union-attr]
    os.rmdir("/.old")
    attribute = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    _call(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attribute, ctypes.c_size_t(len(attribute)))
    _mount("none", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={writable_bytes}")
    return "/tmp"


def _place(path: str, target: str) -> None:
    """Show `path` at `target`: a link stays a link, a folder or file is bind-mounted."""
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        open(target, "w").close()
    _mount(path, target, None, MS_BIND | MS_REC)


def drop_capabilities() -> None:
    """Give up every capability for good (root's too), and the chance to gain one through a set-user-id file."""
    for capability in range(64):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # type: ignore[union-attr]  # refused where there is none to drop
    _call(_machine()[3], struct.pack("=Ii", 0x20080522, 0), bytes(24))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def deny_system_calls() -> None:
    """Install the filter for this process; needs `drop_capabilities` first (no_new_privs). Cannot be undone."""
    program = b"".join(_filter(os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _filter(pid: int) -> Iterator[bytes]:
    """The BPF program. Each rule is a comparison that skips its own verdict, so no jump is ever long."""
    load, equal, at_least, any_bit, verdict = 0x20, 0x15, 0x35, 0x45, 0x06

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    architecture, column, _, _ = _machine()
    refuse = op(verdict, ERRNO | errno.EPERM)
    yield op(load, 4) + op(equal, architecture, 1, 0) + refuse  # a foreign calling convention has other numbers
    yield op(load, 0) + op(at_least, 0x40000000, 0, 1) + refuse  # x32 on x86_64
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            yield op(equal, number, 0, 1) + refuse
    # clone3 hides its flags in memory; glibc falls back to clone when it "does not exist".
    yield op(equal, CLONE3, 0, 1) + op(verdict, ERRNO | errno.ENOSYS)
    yield op(equal, CLONE[column], 0, 4) + op(load, 16) + op(any_bit, CLONE_THREAD, 0, 1)
    yield op(verdict, ALLOW) + op(verdict, ERRNO | errno.EAGAIN)  # what a process limit of one answers
    for name, allowed in SELF_ONLY.items():
        yield op(equal, allowed[column], 0, 5) + op(load, 16) + op(equal, pid, 1, 0)
        yield op(equal, 0 if name == "prlimit64" else pid, 0, 1) + op(verdict, ALLOW) + refuse
    yield op(verdict, ALLOW)


def prctl(option: int, value: int, pointer: int = 0) -> None:
    """`prctl(2)`; raises OSError."""
    if _libc is None:
        raise OSError(errno.ENOSYS, "prctl exists on Linux only")
    _check(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_void_p(pointer), 0, 0), "prctl")


def _machine() -> tuple[int, int, int, int]:
    if platform.machine() not in MACHINES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    return MACHINES[platform.machine()]


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])  # type: ignore[union-attr]
    _check(result, f"mount {target}")


def _call(number: int, *arguments: object) -> int:
    if _libc is None:
        raise OSError(errno.ENOSYS, "Linux only")
    return _check(_libc.syscall(number, *arguments), f"system call {number}")


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
