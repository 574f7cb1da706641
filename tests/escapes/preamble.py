"""What every attempt starts with: `p` (what the driver planted), `won`, `call` a system call."""

import ctypes
import os
import platform
import struct  # noqa: F401
import sys  # noqa: F401
import time  # noqa: F401
import types

p = types.SimpleNamespace(**PLACES)  # noqa: F821  # type: ignore[name-defined]
p.machine = platform.machine()
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
NUMBERS = {
    "socket": (41, 198), "connect": (42, 203), "clone": (56, 220), "vfork": (58, -1),
    "semget": (64, 190), "msgget": (68, 186), "shmget": (29, 194), "shmctl": (31, 195),
    "semctl": (66, 191), "msgctl": (71, 187), "ptrace": (101, 117),
    "syslog": (103, 116), "setresuid": (117, 147), "setfsuid": (122, 151), "capset": (126, 91),
    "rt_sigqueueinfo": (129, 138), "personality": (135, 92), "mlock": (149, 228),
    "modify_ldt": (154, -1), "pivot_root": (155, 41), "adjtimex": (159, 171), "acct": (163, 89),
    "mount": (165, 40), "umount2": (166, 39), "swapon": (167, 224), "reboot": (169, 142),
    "sethostname": (170, 161), "iopl": (172, -1), "ioperm": (173, -1), "init_module": (175, 105),
    "quotactl": (179, 60), "tkill": (200, 130), "io_setup": (206, 0), "lookup_dcookie": (212, 18),
    "clock_settime": (227, 112), "tgkill": (234, 131), "mq_open": (240, 180),
    "kexec_load": (246, 104), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "inotify_add_watch": (254, 27), "migrate_pages": (256, 238),
    "fchmodat": (268, 53), "unshare": (272, 97), "splice": (275, 76), "vmsplice": (278, 75),
    "move_pages": (279, 239), "eventfd2": (290, 19), "inotify_init1": (294, 26),
    "rt_tgsigqueueinfo": (297, 240), "perf_event_open": (298, 241), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "setns": (308, 268),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "finit_module": (313, 273), "renameat2": (316, 276), "bpf": (321, 280),
    "execveat": (322, 281), "userfaultfd": (323, 282), "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "pidfd_open": (434, 434), "clone3": (435, 435), "openat2": (437, 437),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444), "memfd_secret": (447, 447), "statmount": (457, 457),
}  # fmt: skip


def won(evidence):
    raise RuntimeError("WON " + str(evidence)[:120])


def call(name, *arguments):
    number = NUMBERS[name][p.machine != "x86_64"]
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *plain)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
