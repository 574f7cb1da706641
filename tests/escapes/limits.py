"""Attempts on the machine's patience: floods of processes, memory, output, names, time."""

SAFE = {
    "300 threads": "import threading\nthreading.stack_size(65536)\nfor n in range(300):\n"
    "    try:\n"
    "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    "    except RuntimeError: break\nelse: won('300 threads')\n",
    "300 descriptors": "won([os.dup(0) for _ in range(300)][-1])",
    "2 GiB of addresses": "import mmap\nwon(mmap.mmap(-1, 2 << 30))",
    "2 GiB in pieces": "import mmap\nheld = [mmap.mmap(-1, 64 << 20) for _ in range(33)]\n"
    "won(len(held))",
    "2 GiB by malloc": "libc.malloc.restype = ctypes.c_void_p\n"
    "assert libc.malloc(ctypes.c_size_t(2 << 30)), 'none'\nwon('given')",
    "a large file": "with open(p.out + '/new', 'wb') as f: f.truncate(1 << 30)",
    "a thousand files": "for n in range(1000): open(f'{p.out}/{n}', 'w')",
    "many folders deep": "os.chdir(p.out)\nfor n in range(200):\n    os.mkdir('d')\n"
    "    os.chdir('d')",
}  # fmt: skip
OTHER = {
    "a fork bomb": "made = 0\nwhile made < 500:\n    if os.fork() == 0: time.sleep(60)\n"
    "    made += 1\nwon(made)",
    "a bomb of clones": "made = 0\nwhile made < 500:\n"
    "    if call('clone', 17, 0, 0, 0, 0) == 0: time.sleep(60)\n    made += 1\nwon(made)",
    "a list without end": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "a string without end": "x = 'ab'\nwhile True: x += x",
    "a large set": "return len({*range(1 << 28)})",
    "nested tuples": "x = ()\nwhile True: x = (x, x, list(range(1000)))",
    "a bomb of zlib": "import zlib\nx = zlib.compress(bytes(1 << 26))\n"
    "x = zlib.decompress(x) * 64\nreturn len(x)",
    "depth in C": "sys.setrecursionlimit(1 << 30)\nx = []\nfor _ in range(1 << 20): x = [x]\n"
    "return repr(x)",
    "an answer of 64 MiB": "return 'x' * (1 << 26)",
    "an answer of many": "return [[]] * (1 << 20)",
    "a number of 10 million digits": "return 1 << (1 << 25)",
    "a flood of standard output": "for _ in range(300): os.write(1, b'x' * (1 << 20))\nreturn 1",
    "a flood of standard error": "for _ in range(300): os.write(2, b'x' * (1 << 20))\nreturn 1",
    "a flood of lines to the channel": "while True:\n    for d in range(3, 9):\n        try:\n"
    "            os.write(d, b'[]\\n' * 9999)\n        except OSError: pass\n",
    "a line without end to the channel": "while True:\n    for d in range(3, 9):\n        try:\n"
    "            os.write(d, b'[' * 65536)\n        except OSError: pass\n",
    "a bottomless iterator": "import itertools\nreturn itertools.count()",
    "a name for everything": "def f(*_): return 1\n"
    "globals().update({f'x{i}': i for i in range(300_000)})",
}  # fmt: skip
# these never end by themselves: a second of time each
ENDLESS = {
    "a loop": "while True: pass",
    "depth": "sys.setrecursionlimit(1 << 30)\ndef g(): return g()\nreturn g()",
    "a sleep": "time.sleep(1 << 20)",
    "a power": "return 10 ** 10 ** 9",
    "a pattern": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "a lock": "import threading\nx = threading.Lock()\nx.acquire()\nx.acquire()",
    "a signal that stops it": "import signal\nsignal.raise_signal(signal.SIGSTOP)\n"
    "time.sleep(99)",
    "its own input": "while True: os.read(0, 1) or time.sleep(1)",
    "a loop that nothing interrupts": "while True:\n    try:\n        while True: pass\n"
    "    except BaseException: pass\n",
    "at import": "def f(*_): return 1\nwhile True: pass",
    "on all processors": "import threading, hashlib\ndef burn():\n"
    "    while True: hashlib.pbkdf2_hmac('sha256', b'x', b'y', 1 << 22)\n"
    "for _ in range(8): threading.Thread(target=burn, daemon=True).start()\nburn()",
}  # fmt: skip
