"""Attempts on processes: start one, outlive the run, look into another one, harm it."""

PIDFD = "d = call('pidfd_open', p.victim, 0)\n"
SAFE = {
    "fork": "c = os.fork()\nif c == 0: os._exit(0)\nwon(os.waitpid(c, 0))",
    "forkpty": "import pty\nc, _ = pty.fork()\nif c == 0: os._exit(0)\nwon(c)",
    "clone by number": "c = call('clone', 17, 0, 0, 0, 0)\nif c == 0: os._exit(0)\nwon(c)",
    "clone3": "a = struct.pack('11Q', 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)\n"
    "c = call('clone3', a, len(a))\nif c == 0: os._exit(0)\nwon(c)",
    "subprocess": "import subprocess\nwon(subprocess.check_output(['/bin/echo', 'ran']))",
    "a shell": "assert os.system('true') == 0, 'no shell'\nwon('ran')",
    "popen": "found = os.popen('echo ran').read()\nassert found, 'no shell'\nwon(found)",
    "the C library's system": "assert libc.system(b'true') == 0\nwon('ran')",
    "posix_spawn": "won(os.posix_spawn('/bin/true', ['true'], {}))",
    "multiprocessing": "import multiprocessing as m\n"
    "q = m.get_context('fork').Process(target=print)\n"
    "q.start()\nq.join()\nwon(q.exitcode)",
    "a process pool": "import concurrent.futures as c, multiprocessing as m\n"
    "with c.ProcessPoolExecutor(1, m.get_context('fork')) as e:"
    " won(e.submit(os.getpid).result(9))",
    "a program out of memory": "d = os.memfd_create('x')\n"
    "os.write(d, open('/bin/true', 'rb').read())\n"
    "won(os.posix_spawn(f'/proc/self/fd/{d}', ['x'], {}))",
    "a daemon": "c = os.fork()\nif c == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
    "    os.closerange(0, 64)\n    time.sleep(60)\n    os._exit(0)\nwon('left')",
    "the memory of the victim": "for line in open(f'/proc/{p.victim}/maps'):\n"
    "    if '[heap]' in line or '[stack]' in line:\n"
    "        a, b = (int(x, 16) for x in line.split()[0].split('-'))\n"
    "        m = open(f'/proc/{p.victim}/mem', 'rb')\n        m.seek(a)\n"
    "        found = m.read(b - a)\n        at = found.find(b'VICTIM-')\n"
    "        if at >= 0: won(found[at : at + 40])\n",
    "the environment of the victim": "won(open(f'/proc/{p.victim}/environ').read())",
    "the arguments of the victim": "won(open(f'/proc/{p.victim}/cmdline').read()[-60:])",
    "the environment of the parent": "e = open(f'/proc/{p.parent}/environ').read()\n"
    "won(e[e.index('PARENT-') :][:40])",
    "the names of descriptors of the victim": "won(os.readlink(f'/proc/{p.victim}/fd/0'))",
    "what the kernel says of the victim": "won(open(f'/proc/{p.victim}/status').read()[:40])",
    "is the victim there": "os.kill(p.victim, 0)\nwon('it is')",
    "is the victim there, by descriptor": PIDFD + "won(d)",
    "a signal by descriptor": PIDFD + "call('pidfd_send_signal', d, 0, 0, 0)\nwon('sent')",
    "a signal to a thread": "call('tgkill', p.victim, p.victim, 0)\nwon('sent')",
    "a queued signal": "i = struct.pack('iiiiiI', 0, 0, -1, 0, 0, 0) + bytes(104)\n"
    "call('rt_sigqueueinfo', p.victim, 0, i)\nwon('sent')",
    "a signal through a pipe's owner": "import fcntl\nr, w = os.pipe()\n"
    "fcntl.fcntl(r, fcntl.F_SETOWN, p.victim)\nwon(fcntl.fcntl(r, fcntl.F_GETOWN))",
    "the owner of its own channel": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, p.victim)\n"
    "won('owned')",
    "priority of the victim": "os.setpriority(os.PRIO_PROCESS, p.victim, 1)\nwon('set')",
    "limits of the victim": "import resource\n"
    "won(resource.prlimit(p.victim, resource.RLIMIT_NOFILE))",
    "the processors of the victim": "os.sched_setaffinity(p.victim, os.sched_getaffinity(0))\n"
    "won('set')",
    "the session of the victim": "won(os.getsid(p.victim))",
    "another name": "assert libc.prctl(15, b'init', 0, 0, 0) == 0\nwon('renamed')",
    "life after the parent's death": "assert libc.prctl(1, 0, 0, 0, 0) == 0\nwon('undone')",
    "reaper of orphans": "assert libc.prctl(36, 1, 0, 0, 0) == 0\nwon('it is')",
    "open to tracers": "assert libc.prctl(4, 1, 0, 0, 0) == 0\nwon('set')",
    "a personality": "call('personality', 0x0040000)\nwon('no randomised addresses')",
    "a timer": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 60)\nwon('set')",
    "a pipe": "won(os.pipe())",
}  # fmt: skip

OTHER = {
    "a session of its own": "os.setsid()\nwon('made')",
    "execve": "os.execv('/bin/sh', ['sh', '-c', f'echo x > {p.out}/new'])",
    "execveat": "call('execveat', -100, b'/bin/true', 0, 0, 0)\nwon('ran')",
    "vfork": "call('vfork')\nwon('it did')",
    "fork in C": "c = libc.fork()\nassert c >= 0, c\nif c == 0: os._exit(0)\nwon(c)",
    "a set-user-id program": "os.execv('/bin/su', ['su', '-c', f'touch {p.out}/new'])",
    "ptrace attach": "call('ptrace', 16, p.victim, 0, 0)\nwon('attached')",
    "ptrace seize": "call('ptrace', 0x4206, p.victim, 0, 0)\nwon('seized')",
    "ptrace of the parent": "call('ptrace', 16, p.parent, 0, 0)\nwon('attached')",
    "traced by whom it likes": "call('ptrace', 0, 0, 0, 0)\nwon('traced')",
    "process_vm_readv": "b = ctypes.create_string_buffer(8)\n"
    "v = struct.pack('QQ', ctypes.addressof(b), 8)\n"
    "call('process_vm_readv', p.victim, v, 1, struct.pack('QQ', p.address, 8), 1, 0)\nwon(b.raw)",
    "process_vm_writev": "b = ctypes.create_string_buffer(b'changed!')\n"
    "v = struct.pack('QQ', ctypes.addressof(b), 8)\n"
    "call('process_vm_writev', p.victim, v, 1, struct.pack('QQ', p.address, 8), 1, 0)\n"
    "won('written')",
    "process_madvise": PIDFD + "call('process_madvise', d, struct.pack('QQ', p.address,"
    " 4096), 1, 20, 0)\nwon(1)",
    "kcmp": "won(call('kcmp', p.parent, p.victim, 0, 0, 0))",
    "kill of the victim": "os.kill(p.victim, 9)",
    "kill of the parent": "os.kill(p.parent, 9)",
    "kill of the real parent": "os.kill(os.getppid(), 9)",
    "kill of everybody": "os.kill(-1, 9)",
    "kill of the group": "os.killpg(0, 9)",
    "kill of process 1": "os.kill(1, 9)\nwon('sent')",
    "a stop of the victim": "os.kill(p.victim, 19)",
    "a stop of the parent": "os.kill(p.parent, 19)",
    "tkill": "call('tkill', p.victim, 9)",
    "tgkill": "call('tgkill', p.victim, p.victim, 9)",
    "rt_tgsigqueueinfo": "i = struct.pack('iiiiiI', 9, 0, -1, 0, 0, 0) + bytes(104)\n"
    "call('rt_tgsigqueueinfo', p.victim, p.victim, 9, i)",
    "kill by descriptor": PIDFD + "call('pidfd_send_signal', d, 9, 0, 0)",
    "SIGIO through the owner of its input": "import fcntl\n"
    "fcntl.fcntl(0, fcntl.F_SETOWN, p.victim)\nfcntl.fcntl(0, 10, 9)\n"
    "fcntl.fcntl(0, fcntl.F_SETFL, 0o20000)",
    "a daemon in a thread": "import threading\n"
    "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    "os.close(0)\nos.close(1)\nos._exit(0)",
    "deaf to signals": "import signal\nfor s in range(1, 65):\n"
    "    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nos.closerange(0, 64)\nwhile True: time.sleep(1)",
    "a file at exit": "import atexit\natexit.register(lambda: open(p.out + '/new', 'w'))\n"
    "sys.exit(0)",
    "a job of cron": "open('/var/spool/cron/crontabs/nobody', 'w').write('* * * * * true')\n"
    "won('set')",
}  # fmt: skip
