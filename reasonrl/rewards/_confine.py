"""What a process does to itself before it runs text that must not be trusted; no root needed.

Three layers, each checked from inside. Resource limits: memory, CPU, threads, no file may grow.
Files: what bubblewrap built around this process, or Landlock; nothing can be opened but Python's
own library, for reading. Seccomp: a list of the system calls that plain Python needs; every other
one, processes and sockets among them, is refused with EPERM. Outside bubblewrap, new user, network,
IPC and UTS namespaces come on top where the host allows them. It dies with its parent. Run by path
in the child; standard library only. `confine` raises RuntimeError naming the layer that is missing.
Left out: under Landlock the names and sizes of files elsewhere can be seen; only contents cannot.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

SYSCALLS = {
    # name: (x86-64, aarch64); -1 where the architecture has no such call
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "stat": (4, -1), "lstat": (6, -1), "open": (2, -1), "openat": (257, 56),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, -1), "faccessat": (269, 48),
    "getdents64": (217, 61), "getcwd": (79, 17),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "poll": (7, -1), "ppoll": (271, 73),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "futex": (202, 98), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "getpid": (39, 172),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "getrandom": (318, 278), "uname": (63, 160),
    "set_robust_list": (273, 99), "rseq": (334, 293), "getrusage": (98, 165), "times": (100, 153),
    "dup": (32, 23), "set_tid_address": (218, 96), "membarrier": (324, 283),
}  # fmt: skip
# these only with some arguments
EXITS, FCNTL = ((60, 93), (231, 94)), (72, 25)
CLONE, CLONE3 = (56, 220), (435, 435)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
CLONE_THREAD = 0x00010000
NEW = 0x7E020080  # clone's flags for new namespaces
DESCRIPTORS = (
    0,
    1,
    2,
    3,
    4,
    1030,
)  # fcntl: duplicates and flags; not owners, signals, leases, locks
SIGKILL = 137  # the exit status that looks like a kill from outside
THREADS = 64  # of one process, counted in its own user namespace; not enforced for root
NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x04000000  # user, net, ipc, uts
ALLOW, REFUSE, ABSENT, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
READ = 0x4 | 0x8  # Landlock: read a file, list a folder


def confine(memory: int, cpu: int, box: str, parent: int) -> list[str]:
    """Confine this process for good; the layers that hold."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    _limits(memory, cpu)
    layers, apart = ["limits"], "bubblewrap"
    if box == "bubblewrap":
        _boxed()
    else:
        if libc.prctl(1, 9, 0, 0, 0) != 0 or os.getppid() != parent:
            raise RuntimeError("it would outlive its parent")
        apart = "namespaces" if libc.unshare(NAMESPACES) == 0 else ""
    layers += [apart] if apart else []
    most = THREADS if apart else 4 * THREADS + _running()
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # no new privileges
        raise RuntimeError("no_new_privs could not be set")
    _no_capabilities(libc)
    if box != "bubblewrap":
        _landlock(libc)
        layers.append("landlock")
    _seccomp(libc)
    _check()
    return [*layers, "seccomp"]


def _running() -> int:
    """Threads of this user: where there is no namespace, the limit on them counts all."""
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it has just ended
    return count


def _boxed() -> None:
    """Whether this is the inside of bubblewrap: a process table and a read-only root of its own."""
    if os.getppid() != 1 or os.getpid() > 9:
        raise RuntimeError("bubblewrap made no process namespace")
    if not os.statvfs("/").f_flag & os.ST_RDONLY or os.path.exists("/proc/self"):
        raise RuntimeError("bubblewrap made no file system")


def _no_capabilities(libc) -> None:
    number = 126 if platform.machine() == "x86_64" else 91
    if libc.syscall(number, struct.pack("=Ii", 0x20080522, 0), bytes(24)) != 0:
        raise RuntimeError("the capabilities could not be dropped")


def _limits(memory: int, cpu: int) -> None:
    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # of CPU time only the soft one, which sends SIGXCPU: a SIGKILL has to be somebody else's
        pair = (value, hard if kind == resource.RLIMIT_CPU else value)
        resource.setrlimit(kind, pair)
        if resource.getrlimit(kind) != pair:
            raise RuntimeError("a resource limit did not take effect")


def _landlock(libc) -> None:
    """Only Python's library can be read; nothing can be written, made, removed or run."""
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        raise RuntimeError("this kernel has no Landlock")
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    fields = [rights] + ([3] if abi >= 4 else []) + ([3] if abi >= 6 else [])
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = libc.syscall(444, attributes, len(attributes), 0)
    if ruleset < 0:
        raise RuntimeError("Landlock made no ruleset")
    library = os.path.join(sys.base_prefix, "lib")
    for place in (library, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"):
        if os.path.isdir(place):
            folder = os.open(place, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", READ, folder)
            if libc.syscall(445, ruleset, 1, rule, 0) != 0:
                raise RuntimeError(f"Landlock took no rule for {place}")
            os.close(folder)
    if libc.syscall(446, ruleset, 0) != 0:
        raise RuntimeError("Landlock did not take effect")
    os.close(ruleset)


def _seccomp(libc) -> None:
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise RuntimeError(f"no system call list for {machine}")
    column, audit = ARCHITECTURES[machine]

    def returns(action: int) -> bytes:
        return struct.pack("=HBBI", 0x06, 0, 0, action)

    def load(offset: int) -> bytes:
        return struct.pack("=HBBI", 0x20, 0, 0, offset)

    def unless(value: int, skip: int) -> bytes:
        """Skip so many instructions where the value loaded is another one."""
        return struct.pack("=HBBI", 0x15, 0, skip, value)

    def masked(bits: int) -> bytes:
        return struct.pack("=HBBI", 0x54, 0, 0, bits)

    def if_any(bits: int, yes: int, no: int) -> bytes:
        return struct.pack("=HBBI", 0x45, yes, no, bits)

    program = [load(4), unless(audit, 1), struct.pack("=HBBI", 0x05, 0, 0, 1), returns(KILL)]
    program += [load(0)]
    for numbers in SYSCALLS.values():
        if numbers[column] >= 0:
            program += [unless(numbers[column], 1), returns(ALLOW)]
    for number in EXITS:  # not with the status of one who was killed
        program += [unless(number[column], 5), load(16), masked(0xFF)]
        program += [unless(SIGKILL, 1), returns(KILL), returns(ALLOW)]
    program += [unless(FCNTL[column], 2 + 2 * len(DESCRIPTORS)), load(24)]
    for command in DESCRIPTORS:
        program += [unless(command, 1), returns(ALLOW)]
    program += [returns(REFUSE)]
    program += [unless(CLONE3[column], 1), returns(ABSENT)]  # glibc then uses clone
    program += [unless(CLONE[column], 5), load(16), if_any(NEW, 2, 0)]
    program += [if_any(CLONE_THREAD, 0, 1), returns(ALLOW), returns(REFUSE)]
    program += [returns(REFUSE)]
    code = b"".join(program)
    held = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(held))
    if libc.prctl(22, 2, header, 0, 0) != 0:
        raise RuntimeError("seccomp took no filter")


def _check() -> None:
    """A layer that only seems to hold is none."""
    for name, attempt in (
        ("seccomp", os.fork),
        ("Landlock", lambda: os.close(os.open("/etc/passwd", os.O_RDONLY))),
    ):
        try:
            made = attempt()
        except OSError:
            continue
        if made == 0 and name == "seccomp":
            os._exit(1)
        raise RuntimeError(f"{name} did not take effect")
