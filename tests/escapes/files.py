"""Attempts on files: read what is outside, change what is outside, leave something behind.

`p` names what the driver planted (driver.py); `won` reports evidence. What SAFE holds succeeds
where nothing is confined, and does no harm there; OTHER needs more rights, or would do harm.
"""

SAFE = {
    "open": "won(open(p.secret).read())",
    "os.open": "won(os.read(os.open(p.secret, 0), 99))",
    "openat below a descriptor": "d = os.open('/', os.O_DIRECTORY)\n"
    "won(os.read(os.open(p.secret[1:], 0, dir_fd=d), 99))",
    "openat2": "how = struct.pack('QQQ', 0, 0, 0)\n"
    "won(os.read(call('openat2', -100, p.secret.encode(), how, 24), 99))",
    "fopen of the C library": "b = ctypes.create_string_buffer(99)\n"
    "libc.fopen.restype = libc.fgets.restype = ctypes.c_void_p\n"
    "h = libc.fopen(p.secret.encode(), b'r')\nassert h, 'no file'\n"
    "libc.fgets(b, 99, ctypes.c_void_p(h))\nwon(b.value)",
    "dots out of the library": "won(open(os.path.dirname(os.__file__) + '/..' * 12 +"
    " p.secret).read())",
    "/proc/self/root": "won(open('/proc/self/root' + p.secret).read())",
    "/proc/self/cwd": "won(open('/proc/self/cwd' + p.secret).read())",
    "/proc of the parent": "won(open(f'/proc/{p.parent}/root{p.secret}').read())",
    "/proc of the real parent": "won(open(f'/proc/{os.getppid()}/root{p.secret}').read())",
    "a path descriptor, opened again": "d = os.open(p.secret, os.O_PATH)\n"
    "won(open(f'/proc/self/fd/{d}').read())",
    "an import": "sys.path.insert(0, p.out)\nimport planted\nwon(planted.TOKEN)",
    "runpy": "import runpy\nwon(runpy.run_path(p.out + '/planted.py')['TOKEN'])",
    "linecache": "import linecache\nwon(linecache.getlines(p.secret)[0])",
    "fileinput": "import fileinput\nwon(next(iter(fileinput.input([p.secret]))))",
    "configparser": "import configparser\nc = configparser.ConfigParser()\n"
    "assert c.read(p.out + '/planted.ini')\nwon(c['a']['token'])",
    "urllib with a file address": "import urllib.request\n"
    "won(urllib.request.urlopen('file://' + p.secret).read())",
    "mmap": "import mmap\nwon(mmap.mmap(os.open(p.secret, 0), 0, prot=1)[:])",
    "a list of names": "won([n for n in os.listdir(p.out) if n.startswith('TOKEN')])",
    "scandir": "won([e.name for e in os.scandir(p.out) if e.name.startswith('TOKEN')])",
    "glob": "import glob\nwon(glob.glob(p.out + '/TOKEN*')[0])",
    "a symbolic link's own target": "won(os.readlink(p.out + '/link'))",
    "an extended attribute": "won(os.listxattr(p.secret) or 'none set, but read')",
    "the users": "won(open('/etc/passwd').read()[:20])",
    "the mounts": "won(open('/proc/self/mountinfo').read()[:60])",
    "its own maps": "won(open('/proc/self/maps').read()[:60])",
    "all processes": "won([n for n in os.listdir('/proc') if n == str(p.victim)][0])",
    "the grader's source": "won(open(p.root + '/reasonrl/rewards/code.py').read()[:40])",
    "a new file": "open(p.out + '/new', 'w').write('x')",
    "an appended line": "open(p.out + '/keep', 'a').write('x')",
    "truncate": "os.truncate(p.out + '/keep', 0)",
    "rename": "os.rename(p.out + '/keep', p.out + '/gone')",
    "rename over another": "os.replace(p.out + '/planted.ini', p.out + '/keep')",
    "renameat2 exchange": "call('renameat2', -100, (p.out + '/keep').encode(), -100,\n"
    "     (p.out + '/planted.ini').encode(), 2)",
    "unlink": "os.unlink(p.out + '/keep')",
    "mkdir": "os.mkdir(p.out + '/folder')",
    "rmdir": "os.rmdir(p.out + '/empty')",
    "rmtree": "import shutil\nshutil.rmtree(p.out)",
    "symlink": "os.symlink(p.secret, p.out + '/new')",
    "hard link": "os.link(p.out + '/keep', p.out + '/new')",
    "fifo": "os.mkfifo(p.out + '/new')",
    "mknod": "os.mknod(p.out + '/new', 0o100600)",
    "chmod": "os.chmod(p.out + '/keep', 0o777)",
    "fchmodat": "call('fchmodat', -100, (p.out + '/keep').encode(), 0o777, 0)",
    "utime": "os.utime(p.out + '/keep', (1, 1))",
    "a nameless file, then linked": "d = os.open(p.out, os.O_TMPFILE | os.O_RDWR, 0o600)\n"
    "os.link(f'/proc/self/fd/{d}', p.out + '/new', src_dir_fd=0)",
    "sqlite": "import sqlite3\nc = sqlite3.connect(p.out + '/new')\n"
    "c.execute('create table t (x)')\nc.commit()",
    "tempfile": "import tempfile\ntempfile.mkdtemp(dir=p.out)",
    "logging": "import logging\nlogging.FileHandler(p.out + '/new').emit(\n"
    "    logging.LogRecord('x', 50, '', 0, 'x', None, None))",
    "bytecode": "import py_compile\npy_compile.compile(os.__file__, cfile=p.out + '/new')",
    "copy_file_range": "os.copy_file_range(os.open(p.secret, 0),\n"
    "     os.open(p.out + '/new', os.O_CREAT | os.O_WRONLY), 9)",
    "sendfile": "os.sendfile(os.open(p.out + '/new', os.O_CREAT | os.O_WRONLY),"
    " os.open(p.secret, 0), 0, 9)",
    "a race of links": "import threading\n"
    "def swap():\n    for _ in range(200):\n        for to in (os.__file__, p.secret):\n"
    "            try:\n                os.symlink(to, p.out + '/t')\n"
    "                os.replace(p.out + '/t', p.out + '/r')\n            except OSError: pass\n"
    "t = threading.Thread(target=swap)\nt.start()\n"
    "for _ in range(2000):\n    try:\n        found = open(p.out + '/r').read(60)\n"
    "    except OSError: continue\n    if 'TOKEN' in found: won(found)\n",
    "something for the next run": "open('/dev/shm/' + p.name, 'w').write('x')\nwon('left')",
    "something in /tmp": "open('/tmp/' + p.name, 'w').write('x')\nwon('left')",
    "chdir and a relative path": "os.chdir(p.out)\nopen('new', 'w').write('x')",
    "fallocate": "os.posix_fallocate(os.open(p.out + '/keep', os.O_WRONLY), 0, 9999)",
}  # fmt: skip

OTHER = {
    "the passwords": "won(open('/etc/shadow').read())",
    "a descriptor that the parent left open": "for d in range(3, 256):\n    try:\n"
    "        found = os.pread(d, 99, 0)\n    except OSError: continue\n"
    "    if b'TOKEN' in found: won(found)\n",
    "descriptors by /proc/self/fd": "for d in os.listdir('/proc/self/fd'):\n"
    "    try: found = open('/proc/self/fd/' + d).read(99)\n    except OSError: continue\n"
    "    if 'TOKEN' in found: won(found)\n",
    "memory of the machine": "won(os.read(os.open('/dev/mem', 0), 9))",
    "memory of the kernel": "won(open('/proc/kcore', 'rb').read(9))",
    "messages of the kernel": "won(os.read(os.open('/dev/kmsg', 0), 9))",
    "a terminal": "won(os.open('/dev/tty', os.O_RDWR))",
    "a disk": "import glob\n"
    "won([os.open(d, 0) for d in glob.glob('/dev/[svn][dv][am]*') + ['/dev/vda']])",
    "/dev/fuse": "won(os.open('/dev/fuse', os.O_RDWR))",
    "/dev/kvm": "won(os.open('/dev/kvm', os.O_RDWR))",
    "the core pattern": "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true')\n"
    "won('set')",
    "sysrq": "open('/proc/sysrq-trigger', 'w').write('h')\nwon('pressed')",
    "its control group": "import glob\nopen('/sys/fs/cgroup/cgroup.procs', 'w').write('0')\n"
    "won('moved')",
    "a release agent": "open('/sys/fs/cgroup/release_agent', 'w').write('/bin/true')\nwon('set')",
    "a map of user ids": "open('/proc/self/uid_map', 'w').write('0 0 1')\nwon('mapped')",
    "its own memory through /proc": "m = open('/proc/self/mem', 'r+b', 0)\nwon(m)",
    "its out-of-memory score": "open('/proc/self/oom_score_adj', 'w').write('-1000')\nwon('set')",
    "a core dump": "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (-1, -1))\n"
    "os.chdir(p.out)\nos.abort()",
    "Python's own library, changed": "open(os.__file__, 'a').write('#')\nwon('changed')",
    "a start-up file of Python": "open(os.path.dirname(os.__file__) + '/sitecustomize.py',"
    " 'w')\nwon('made')",
    "an attribute of a file": "os.setxattr(p.out + '/keep', 'user.x', b'x')\nwon('set')",
    "a change of root, then dots": "os.mkdir('/x')\nos.chroot('/x')\nwon(os.listdir('../../..'))",
}  # fmt: skip
