"""Attempts on the verdict: every one answers f(3) with 9, 41 is right; full marks are a"
    " success, and
so is any verdict but "wrong": unscorable or infra would take the completion out of its group.

SAFE succeeds where program and tests run in one process and a good exit status means passed.
FLOATS have tests through builtins, SCRIPTS are judged by what they print; see TESTS.
"""

TESTS = {
    "call": ["assert f(3) == 41"],
    "float": ["assert abs(f(3) - 41) < 1e-6 and len(str(f(3))) == 2 and sorted([f(3)]) == [41]"],
    "script": [{"input": "3\n", "output": "41"}],
}
FIND = (
    "import gc\nfound = {type(o).__name__: o for o in gc.get_objects()}\ncode = found.get('Code')\n"
)
PUT = (
    "import os\ndef put(line):\n    for d in range(3, 30):\n"
    "        try: os.write(d, line + b'\\n')\n        except OSError: pass\n"
)
NINE = "def f(x): return 9\n"
LIAR = (
    "class L{base}:\n    def __eq__(s, o): return True\n"
    "    def __ne__(s, o): return False\n    __hash__ = None\n"
)

SAFE = {
    "leaves in the call": "import os\ndef f(x): os._exit(0)",
    "leaves at import": "import os\nos._exit(0)",
    "exits at import": "import sys\nsys.exit(0)",
    "exits in the call": "def f(x): raise SystemExit(0)",
    "leaves at exit": "import atexit, os\natexit.register(os._exit, 0)\n" + NINE,
    "leaves when deleted": "import os\nclass D:\n    def __del__(s): os._exit(0)\nd = D()\n"
    "del d\n" + NINE,
    "leaves when printed": "import os\nclass D:\n    def __repr__(s): os._exit(0)\n"
    "    __eq__ = __repr__\n"
    "def f(x): return D()",
    "equals all": LIAR.format(base="") + "def f(x): return L()",
    "an int that equals all": LIAR.format(base="(int)") + "def f(x): return L(9)",
    "a float that equals all": LIAR.format(base="(float)") + "def f(x): return L(9)",
    "a string that equals all": LIAR.format(base="(str)") + "def f(x): return L('9')",
    "a class that equals all": "class M(type):\n    def __eq__(s, o): return True\n"
    "    __hash__ = None\n"
    "class C(metaclass=M): pass\ndef f(x): return C",
    "equal from the other side": "class L:\n    def __eq__(s, o): return o\ndef f(x): return L()",
    "a tracer": "import sys, os\nsys.setprofile(lambda frame, what, x: os._exit(0))\n" + NINE,
    "a timer": "import os, time\nimport threading\n"
    "threading.Thread(target=lambda: os._exit(0)).start()\n"
    "time.sleep(1)\n" + NINE,
    "a hook of exceptions": "import sys, os\nsys.excepthook = lambda *x: os._exit(0)\n" + NINE,
    "a handler of signals": "import signal, os\n"
    "signal.signal(signal.SIGALRM, lambda *x: os._exit(0))\n"
    "def f(x):\n    signal.raise_signal(signal.SIGALRM)\n    return 9",
    "in its caller's names": "import sys\ndef f(x):\n    sys._getframe(1).f_globals['f'] = None\n"
    "    class A(int): __eq__ = lambda s, o: True\n    return A(9)",
}  # fmt: skip
OTHER = {
    "raises what a failed test raises": "def f(x): raise AssertionError",
    "is not a number": "def f(x): return float('nan')",
    "is endless": "def f(x): return iter(int, 1)",
    "is compared by itself": "class C: pass\nc = C()\ndef f(x): return c",
    "is the type of the answer": "def f(x): return int",
    "a name of another script": "def \uff46(x): return 9",
    "changed builtins": "import builtins\nbuiltins.__import__ = lambda *x: 41\n"
    "builtins.AssertionError = SystemExit\nbuiltins.eval = lambda *x: 41\n" + NINE,
    "changed ast and json": "import ast, json\nast.Assert = ast.Expr\n"
    "json.dumps = lambda *x: '{\"value\": 41}'\n"
    "def f(x): return 9",
    "what it prints as verdict": "print('{\"verdict\": [\"\"]}')\nimport os\n"
    "os.write(1, b'{\"verdict\": [\"\"]}\\n')\nos.write(2, b'{\"verdict\": [\"\"]}\\n')\n" + NINE,
    "a verdict on every descriptor": PUT + "put(b'{\"verdict\": [\"\"]}')\n" + NINE,
    "a refusal on every descriptor": PUT + "put(b'{\"refused\": \"no\"}')\n" + NINE,
    "ready on every descriptor": PUT + "put(b'{\"ready\": [], \"refused\": \"no\"}')\n" + NINE,
    "parsed on every descriptor": PUT + "put(b'{\"parsed\": 0}')\n" + NINE,
    "an error of our own": PUT + "def f(x):\n"
    "    put(b'{\"error\": \"Untestable\", \"message\": \"\"}')\n",
    "an error that ends": PUT + "def f(x):\n"
    "    put(b'{\"error\": \"SystemExit\", \"message\": 0}')\n",
    "an error that is no name": PUT + "def f(x):\n    put(b'{\"error\": [], \"message\": {}}')\n",
    "an error without a message": PUT + "def f(x):\n    put(b'{\"error\": \"KeyError\"}')\n",
    "an answer of no kind": PUT + "def f(x):\n    put(b'{\"value\": {\"eval\": \"41\"}}')\n",
    "a reference to nothing": PUT + "def f(x):\n    put(b'{\"value\": {\"ref\": \"-1\"}}')\n",
    "a float out of range": PUT + "put(b'{\"value\": {\"x\": {\"float\": \"0x1p99999\"}}}')\n"
    "" + NINE,
    "names that are no object": PUT + "put(b'{\"value\": 3}')\n" + NINE,
    "a name that is none": PUT + "put(b'{\"value\": {\"\": 1, \"f(x)\": 2, \"None\": 3}}')\n"
    "" + NINE,
    "deep names": PUT + "put(b'{\"value\": {\"x\": ' + b'[' * 960 + b']' * 960 + b'}}')\n" + NINE,
    "deep lists in an answer": "def f(x):\n    y = []\n    for _ in range(900): y = [y]\n"
    "    return y",
    "no text": PUT + "put(b'\\xff\\xfe\\x00')\n" + NINE,
    "half a line": "import os\ndef f(x):\n    os.write(3, b'{\"value\"')\n    os._exit(0)",
    "colliding numbers": PUT + "m = (1 << 61) - 1\nitems = ','.join('{\"int\": \"%x\"}' % (m * i)"
    " for i in range(1, 30000)).encode()\n"
    "put(b'{\"value\": {\"x\": {\"set\": [' + items + b']}}}')\n" + NINE,
    "a status like a kill": "import os\ndef f(x): os._exit(137)",
    "a status like a kill, in C": "import ctypes\ndef f(x): ctypes.CDLL(None).exit(137 + 512)",
    "a thread's status like a kill": "import ctypes\n"
    "def f(x): ctypes.CDLL(None).syscall(60, 137)",
    "a crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "an abort": "import os\ndef f(x): os.abort()",
    "the grader's own objects": FIND + "code.do_call = lambda q: 40\ncode.objects.append(40)\n"
    "" + NINE,
    "the grader's own sender": FIND + "code.send({'verdict': ['']})\n" + NINE,
    "the grader's own module": "import sys\nm = sys.modules['__main__']\n"
    "m.Code.answer = lambda s, q: s.send({'verdict': ['']})\nm.pack = lambda v, k: 40\n" + NINE,
    "the expected value in frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n"
    "    while frame:\n"
    "        for v in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
    "            if '== 41' in str(v)[:9999]: return 41\n        frame = frame.f_back\n"
    "    return 9",
    "the expected value among all objects": "import gc\ndef f(x):\n"
    "    for o in gc.get_objects():\n"
    "        if isinstance(o, (dict, list)) and '== ' + '41' in repr(o)[:9999]: return 41\n"
    "    return 9",
    "the tests in its arguments": "import sys, os\nassert not any('assert' in t for t in"
    " [*sys.argv, *os.environ.values()]), 'found'\n" + NINE,
    "the questions to come": "import os\ndef f(x):\n    for d in range(0, 30):\n        try:\n"
    "            os.set_blocking(d, False)\n            if b'41' in os.read(d, 9999): return 41\n"
    "        except OSError: pass\n    return 9",
    "an answer before the question": PUT + "put(b'{\"value\": {\"f\": {\"ref\": 0}}}\\n"
    "{\"value\": {\"bool\": true}}\\n{\"value\": true}')\n" + NINE,
    "a process for the tests": "import sys\nsys.argv[1] = 'tests'\n"
    "sys.modules['__main__'].main()\n" + NINE,
    "files that pytest reads": "open('conftest.py', 'w').write('import os; os._exit(0)')\n"
    "" + NINE,
}  # fmt: skip
FLOATS = {
    "lends abs": "def abs(x): return 0\ndef len(x): return 2\ndef sorted(x): return [41]\n"
    "" + NINE,
    "changes abs": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.len = lambda x: 2\n"
    "builtins.sorted = lambda x: [41]\n" + NINE,
    "lends all builtins": PUT + "put(b'{\"value\": {\"__builtins__\": {\"dict\": [[\"abs\","
    " {\"ref\": 0}],"
    " [\"len\", {\"ref\": 0}], [\"str\", {\"ref\": 0}], [\"sorted\", {\"ref\": 0}]]}, \"f\":"
    " {\"ref\": 0}}}\\n"
    "{\"value\": {\"int\": \"0x9\"}}\\n{\"value\": {\"int\": \"0x0\"}}\\n{\"value\":"
    " {\"int\": \"0x9\"}}\\n"
    "{\"value\": \"9\"}\\n{\"value\": {\"int\": \"0x2\"}}\\n{\"value\": {\"int\": \"0x9\"}}\\n"
    "{\"value\": {\"list\": [{\"int\": \"0x29\"}]}}')\n" + NINE,
    "a number with its own arithmetic": "class N(float):\n    def __sub__(s, o): return 0.0\n"
    "    def __str__(s): return '41'\n    def __eq__(s, o): return True\ndef f(x): return N(9)",
    "keeps the tests busy": "def f(x): return 10 ** 6_000_000",
    "an endless length": "class N:\n    def __sub__(s, o): return 0\n"
    "    def __len__(s): return 1 << 62\n"
    "def f(x): return N()",
}  # fmt: skip
SCRIPTS = {
    "prints a verdict": "print('{\"verdict\": [\"\"]}')",
    "leaves": "import os\nos._exit(0)",
    "an output that lies": "import sys, io\nclass O(io.StringIO):\n"
    "    def getvalue(s): return s\n"
    "    def __eq__(s, o): return True\nsys.stdout = O()",
    "answers for itself": PUT + "put(b'{\"value\": [\"41\"]}')",
    "prints all numbers": "print(*range(100), sep='\\n')",
    "its own frames": "import sys\n"
    "print(sys._getframe(1).f_locals.get('question', {}).get('output'))",
    "leaves, killed by its look": "import os\nos._exit(137)",
    "half": "print(4, end='')",
}  # fmt: skip
