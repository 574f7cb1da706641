"""Attempts on the kernel: namespaces, mounts, privileges, and calls that nobody needs for a"
" program."""

SAFE = {
    "a user namespace": "call('unshare', 0x10000000)\nwon('made')",
    "a network namespace": "call('unshare', 0x50000000)\nwon('made')",
    "a mount namespace": "call('unshare', 0x10020000)\nwon('made')",
    "a handle of a file": "b = struct.pack('Ii', 128, 0) + bytes(128)\nm = bytes(4)\n"
    "call('name_to_handle_at', -100, p.secret.encode(), b, m, 0)\nwon('named')",
    "a memory file": "won(os.memfd_create('x'))",
    "shared memory": "i = call('shmget', 0, 4096, 0o1600)\ncall('shmctl', i, 0, 0)\nwon('made')",
    "a semaphore": "i = call('semget', 0, 1, 0o1600)\ncall('semctl', i, 0, 0, 0)\nwon('made')",
    "a message queue": "i = call('msgget', 0, 0o1600)\ncall('msgctl', i, 0, 0)\nwon('made')",
    "watching a folder": "i = call('inotify_init1', 0)\n"
    "won(call('inotify_add_watch', i, p.out.encode(), 0xFFF))",
    "event descriptors": "won(call('eventfd2', 0, 0))",
    "epoll": "import select\nwon(select.epoll())",
    "a size of a disk": "won(os.statvfs('/').f_blocks)",
    "a filter of its own": "import ctypes as c\n"
    "f = c.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0x7FFF0000))\n"
    "h = struct.pack('=HxxxxxxQ', 1, c.addressof(f))\n"
    "assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, h, 0, 0) == 0\nwon('loaded')",
    "locked memory": "call('mlock', ctypes.addressof(ctypes.create_string_buffer(9)), 9)\n"
    "won('locked')",
    "more limits than it has": "import resource\n"
    "h = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (h, h))\nwon('set')",
}  # fmt: skip
_REFUSED = {
    "unshare of everything": "call('unshare', 0x7E020000)",
    "a thread in a mount namespace": "call('clone', 0x00030F00 | 0x20000, 0, 0, 0, 0)",
    "a thread in a user namespace": "call('clone', 0x10010F00, 0, 0, 0, 0)",
    "setns of the parent": "call('setns', call('pidfd_open', p.parent, 0), 0x20000000)",
    "setns by file": "call('setns', os.open(f'/proc/{p.parent}/ns/net', 0), 0)",
    "a mount": "call('mount', b'x', b'/tmp', b'tmpfs', 0, 0)",
    "a bind mount": "call('mount', p.out.encode(), b'/usr', 0, 4096, 0)",
    "a writable remount": "call('mount', 0, b'/', 0, 32 | 4096, 0)",
    "umount": "call('umount2', b'/usr/lib', 2)",
    "pivot_root": "call('pivot_root', b'.', b'.')",
    "chroot": "os.chroot('/usr')",
    "fsopen": "call('fsopen', b'tmpfs', 0)",
    "open_tree": "call('open_tree', -100, b'/', 1)",
    "move_mount": "call('move_mount', -100, b'/usr', -100, b'/lib', 0)",
    "mount_setattr": "call('mount_setattr', -100, b'/', 0x8000, bytes(32), 32)",
    "statmount": "call('statmount', bytes(24), bytes(512), 512, 0)",
    "open_by_handle_at": "h = struct.pack('IiQ', 8, 1, 2)\ncall('open_by_handle_at', 0, h, 0)",
    "io_uring": "call('io_uring_setup', 8, bytes(120))",
    "asynchronous I/O": "call('io_setup', 8, bytes(8))",
    "bpf": "call('bpf', 0, bytes(128), 128)",
    "a loaded program of bpf": "call('bpf', 5, struct.pack('IIQQ', 1, 0, 0, 0) + bytes(96), 120)",
    "perf events": "call('perf_event_open', struct.pack('II', 1, 128) + bytes(120), 0, -1,"
    " -1, 0)",
    "userfaultfd": "call('userfaultfd', 1)",
    "a key": "call('add_key', b'user', b'x', b'y', 1, -5)",
    "a requested key": "call('request_key', b'user', b'x', 0, -5)",
    "keys of the session": "call('keyctl', 0, -3, 1)",
    "secret memory": "call('memfd_secret', 0)",
    "a POSIX queue": "call('mq_open', b'x', 0o102, 0o600, 0)",
    "fanotify": "call('fanotify_init', 0, 0)",
    "a segment table": "call('modify_ldt', 0, bytes(64), 64)",
    "ports of the machine": "call('iopl', 3)",
    "some ports of the machine": "call('ioperm', 0, 4, 1)",
    "a module": "call('init_module', bytes(9), 9, b'')",
    "a module by file": "call('finit_module', 0, b'', 0)",
    "another kernel": "call('kexec_load', 0, 0, 0, 0)",
    "a restart": "call('reboot', 0xFEE1DEAD, 672274793, 0, 0)",
    "a swap file": "call('swapon', b'/dev/null', 0)",
    "accounting": "call('acct', 0)",
    "a host name": "call('sethostname', b'x', 1)",
    "the clock": "call('clock_settime', 0, struct.pack('QQ', 0, 0))",
    "a slewed clock": "call('adjtimex', struct.pack('I', 1) + bytes(204))",
    "the kernel's log": "call('syslog', 3, bytes(9), 9)",
    "quotas": "call('quotactl', 0x800002 << 8, b'/dev/vda', 0, 0)",
    "a key pressed on the terminal": "import fcntl, termios\n"
    "fcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "a text pasted on the console": "import fcntl\nfcntl.ioctl(0, 0x541C, bytes([3, 0]))",
    "its terminal given up": "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCNOTTY)",
    "user 0": "os.setuid(0)",
    "all three users": "call('setresuid', 0, 0, 0)",
    "the file system's user": "assert call('setfsuid', 0) == 0 and call('setfsuid', 0) == 0",
    "groups": "os.setgroups([0])",
    "capabilities": "call('capset', struct.pack('Ii', 0x20080522, 0), struct.pack('6I',"
    " *[0xFFFFFFFF] * 6))",
    "ambient capabilities": "assert libc.prctl(47, 2, 21, 0, 0) == 0",
    "no filter any more": "assert libc.prctl(22, 0, 0, 0, 0) == 0",
    "new privileges again": "assert libc.prctl(38, 0, 0, 0, 0) == 0",
    "where its memory lies": "assert libc.prctl(35, 1, 4096, 0, 0) == 0",
    "speculation": "assert libc.prctl(53, 0, 2, 0, 0) == 0",
    "a processor to itself": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "a better priority": "os.setpriority(0, 0, -20)",
    "pages of the victim": "call('move_pages', p.victim, 0, 0, 0, 0, 0)",
    "pages moved": "call('migrate_pages', p.victim, 8, struct.pack('Q', 1), struct.pack('Q', 1))",
    "a pipe into memory": "call('vmsplice', 1, struct.pack('QQ', p.address, 8), 1, 0)",
    "splice": "call('splice', 0, 0, 1, 0, 9, 0)",
    "an old cookie": "call('lookup_dcookie', 1, bytes(99), 99)",
    "another rule of Landlock": "call('landlock_create_ruleset', struct.pack('Q', 1), 8, 0)",
}  # fmt: skip
OTHER = {name: f"{body}\nwon('it was done')" for name, body in _REFUSED.items()}
