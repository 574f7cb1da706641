"""Attempts on the network: reach a listener outside (it records what comes), or make a socket."""

HI = "s.send(p.name.encode())\n"
SAFE = {
    "TCP": "import socket\ns = socket.create_connection(('127.0.0.1', p.tcp), 5)\n" + HI,
    "TCP, IPv6 form": "import socket\ns = socket.socket(socket.AF_INET6)\n"
    "s.connect(('::ffff:127.0.0.1', p.tcp))\n" + HI,
    "UDP": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.sendto(p.name.encode(), ('127.0.0.1', p.udp))\nwon('sent')",
    "a Unix socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect(p.unix)\n" + HI,
    "an abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\n"
    "s.connect('\\0' + p.abstract)\n" + HI,
    "by number": "import socket\nd = call('socket', 2, 1, 0)\n"
    "a = struct.pack('=H', 2) + struct.pack('>HI8x', p.tcp, 0x7F000001)\n"
    "call('connect', d, a, 16)\nos.write(d, p.name.encode())",
    "HTTP": "import http.client\nc = http.client.HTTPConnection('127.0.0.1', p.tcp, timeout=5)\n"
    "c.request('GET', '/' + p.name)",
    "urllib": "import urllib.request\n"
    "try: urllib.request.urlopen(f'http://127.0.0.1:{p.tcp}/{p.name}',"
    " timeout=1)\n"
    "except (TimeoutError, ValueError, __import__('http').client.HTTPException): pass",
    "asyncio": "import asyncio\nasync def go():\n"
    "    _, w = await asyncio.open_connection('127.0.0.1', p.tcp)\n"
    "    w.write(p.name.encode())\n    await w.drain()\nasyncio.run(go())",
    "smtplib": "import smtplib\ntry: smtplib.SMTP('127.0.0.1', p.tcp, p.name, 1)\n"
    "except smtplib.SMTPException: won('connected')",
    "a listener of its own": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\n"
    "s.listen()\nwon(s.getsockname())",
    "a listener on a path": "import socket\ns = socket.socket(socket.AF_UNIX)\n"
    "s.bind(p.out + '/new')\nwon('bound')",
    "netlink": "import socket\ns = socket.socket(16, socket.SOCK_RAW, 0)\ns.bind((0, 0))\nwon(s)",
    "a pair": "import socket\nwon(socket.socketpair())",
    "the local syslog": "import socket\nwon(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))",
    "names of interfaces": "import socket\nwon(socket.if_nameindex()[0])",
}  # fmt: skip
OTHER = {
    "a raw socket": "import socket\nwon(socket.socket(2, socket.SOCK_RAW, 1))",
    "packets": "import socket\nwon(socket.socket(17, socket.SOCK_RAW, 0x300))",
    "vsock": "won(call('socket', 40, 1, 0))",
    "the kernel's ciphers": "won(call('socket', 38, 5, 0))",
    "Bluetooth": "won(call('socket', 31, 3, 1))",
    "CAN": "won(call('socket', 29, 3, 1))",
    "key management": "won(call('socket', 15, 3, 2))",
    "a socket of the 32-bit kind": "assert p.machine == 'x86_64'\nimport mmap\n"
    "m = mmap.mmap(-1, 4096, prot=7)\n"  # mov eax 359; mov ebx 2; ecx 1; edx 0; int 0x80; ret
    "m.write(bytes.fromhex('53b867010000bb02000000b901000000ba00000000cd805bc3'))\n"
    "go = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
    "r = go()\nassert r >= 0, r\nwon(r)",
    "a socket of the x32 kind": "r = libc.syscall(0x40000000 | 41, 2, 1, 0)\n"
    "assert r >= 0, r\nwon(r)",
    "a socket that the parent left open": "import socket\nfor d in range(3, 256):\n    try:\n"
    "        s = socket.socket(fileno=d)\n        s.send(p.name.encode())\n"
    "    except OSError: continue\n    won(d)\n",
    "a descriptor of the victim": "d = call('pidfd_open', p.victim, 0)\n"
    "won(call('pidfd_getfd', d, 0, 0))",
}  # fmt: skip
