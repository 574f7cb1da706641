"""The process that runs a model's code, or the tests of it: confined, one JSON object a line.

Run by path (`code.py` starts and kills it) as `code` or as `tests`; the two never share a process.
`code` executes the completion and then answers: a call of one of its names, a look at an object it
gave away, or a whole run with standard input. `tests` executes the tests; the completion's names
stand there as proxies whose every use is a question to the other process, passed on by the parent.
So what crosses is values, and the verdict is computed where the completion never was. Objects that
are no plain values cross as numbered references; two references are equal only if identical.
"""

from __future__ import annotations

import ast
import builtins
import io
import itertools
import json
import os
import sys

LINE = 1 << 22  # characters of one message, at most
ITEMS = 100_000  # of an iteration over a reference


def main() -> None:
    kind, memory, cpu, box, parent = sys.argv[1:6]
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, here)
    import _confine

    sys.path.remove(here)
    channel = os.fdopen(os.dup(1), "w", encoding="ascii")
    questions = os.fdopen(os.dup(0), "r", encoding="ascii")
    os.dup2(2, 1)  # standard error leads nowhere, and so does the rest from here
    os.dup2(2, 0)

    def send(message: dict) -> None:
        text = json.dumps(message)
        if len(text) > LINE:
            text = json.dumps({"error": "ValueError", "message": "the value is too large"})
        channel.write(text + "\n")
        channel.flush()

    try:
        layers = _confine.confine(int(memory), int(cpu), box, int(parent))
    except (RuntimeError, OSError, ValueError) as error:
        send({"refused": str(error)})
        return
    send({"ready": layers})
    serve = Code(send).answer if kind == "code" else Tests(send, questions).run
    for line in questions:
        serve(json.loads(line))


def pack(value, keep) -> object:
    """A plain value as JSON; anything else through `keep`, which numbers it."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return {"int": hex(value)}
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [pack(item, keep) for item in value]}
    if kind is dict:
        return {"dict": [[pack(k, keep), pack(v, keep)] for k, v in value.items()]}
    return keep(value)


def unpack(packed, find) -> object:
    """The value behind `pack`; references through `find`."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(content)
    if kind == "dict":
        return {unpack(k, find): unpack(v, find) for k, v in content}
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(unpack(item, find) for item in content)
    return find(packed)


class Code:
    """The completion's side."""

    def __init__(self, send):
        self.send, self.objects = send, []
        self.space = {"__name__": "solution", "__builtins__": builtins}

    def answer(self, question: dict) -> None:
        try:
            reply = {"value": getattr(self, "do_" + question["do"])(question)}
        except BaseException as error:  # whatever the completion raises is its answer
            reply = {"error": type(error).__name__, "message": str(error)[:500]}
        self.send(reply)

    def do_execute(self, question: dict) -> object:
        exec(compile(question["code"], "<completion>", "exec"), self.space)
        public = {k: v for k, v in self.space.items() if not k.startswith("__")}
        return {name: pack(value, self._keep) for name, value in public.items()}

    def do_script(self, question: dict) -> object:
        out = io.StringIO()
        sys.stdin, sys.stdout = io.StringIO(question["stdin"]), out
        self.space["__name__"] = "__main__"
        try:
            exec(compile(question["code"], "<completion>", "exec"), self.space)
        except SystemExit as leaving:  # a script may end itself, with success
            if leaving.code not in (None, 0):
                raise
        return out.getvalue()[: LINE // 8]

    def do_call(self, question: dict) -> object:
        target = self.objects[question["of"]]
        arguments = [unpack(a, self._find) for a in question["args"]]
        named = {k: unpack(v, self._find) for k, v in question["named"].items()}
        return pack(target(*arguments, **named), self._keep)

    def do_look(self, question: dict) -> object:
        target, how = self.objects[question["of"]], question["how"]
        key = unpack(question["key"], self._find)
        if how == "attribute":
            return pack(getattr(target, str(key)), self._keep)
        if how == "item":
            return pack(target[key], self._keep)
        if how == "iterate":
            return pack(list(itertools.islice(target, ITEMS)), self._keep)
        if how == "length":
            return pack(len(target), self._keep)
        return pack(str(target), self._keep)

    def _keep(self, value) -> dict:
        self.objects.append(value)
        return {"ref": len(self.objects) - 1}

    def _find(self, packed: dict) -> object:
        return self.objects[packed["ref"]]


class Remote:
    """An object of the completion, seen from the tests."""

    def __init__(self, ask, number: int):
        self.__dict__.update(_ask=ask, _number=number)

    def __call__(self, *args, **named):
        packed = {k: pack(v, _reference) for k, v in named.items()}
        values = [pack(a, _reference) for a in args]
        return self._ask("call", self._number, args=values, named=packed)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._look("attribute", name)

    def __getitem__(self, key):
        return self._look("item", key)

    def __iter__(self):
        return iter(self._look("iterate"))

    def __len__(self):
        return self._look("length")

    def __str__(self):
        return str(self._look("text"))

    def _look(self, how: str, key=None):
        return self._ask("look", self._number, how=how, key=pack(key, _reference))


class Untestable(Exception):
    """A test does what cannot be done across two processes."""


def _reference(value) -> dict:
    if isinstance(value, Remote):
        return {"ref": value._number}
    raise Untestable(f"it hands over a {type(value).__name__}; only plain values can cross")


class Tests:
    """The tests' side: run once, then the process ends."""

    def __init__(self, send, answers):
        self.send, self.answers = send, answers

    def ask(self, do: str, of: int, **more):
        self.send({"do": do, "of": of, **more})
        answer = json.loads(next(self.answers))
        if "error" in answer:
            kind = getattr(builtins, answer["error"], None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind(answer["message"])
            raise RuntimeError(f"{answer['error']}: {answer['message']}")
        return unpack(answer["value"], self._find)

    def run(self, question: dict) -> None:
        todo = []
        for i, test in enumerate(question["tests"]):
            try:
                todo += [(i + 1, part) for part in parts(test)]
            except (SyntaxError, ValueError) as error:
                self.send({"refused": f"test {i + 1}: {error}"})
                return
        self.send({"parsed": len(todo)})
        space = {"__name__": "tests", "__builtins__": builtins}
        for name, packed in json.loads(next(self.answers))["names"].items():
            if name.isidentifier() and not (name.startswith("__") or hasattr(builtins, name)):
                try:  # a builtin, or all of them, the completion may not lend to the tests
                    space[name] = unpack(packed, self._find)
                except Exception:
                    pass  # forged by the completion: the name stays unknown, its tests fail
        results: list[str | None] = []
        for number, part in todo:
            try:
                results.append(self._one(part, space))
            except Untestable as error:
                self.send({"refused": f"test {number}: {error}"})
                return
        self.send({"verdict": [r for r in results if r is not None]})

    def _one(self, part, space: dict):
        """ "" for passed, or why not; None for a statement that only sets something up."""
        body, counts = part
        try:
            exec(compile(ast.Module(body=[body], type_ignores=[]), "<tests>", "exec"), space)
        except Untestable:
            raise
        except BaseException as error:
            return f"{ast.unparse(body)[:200]} -> {type(error).__name__}: {str(error)[:200]}"
        return "" if counts else None

    def _find(self, packed: dict) -> Remote:
        return Remote(self.ask, packed["ref"])


def parts(test: str):
    """The statements of a test program and which of them count: the asserts, or without any at the
    top the last one, which must then be a call such as `check(f)`."""
    body = ast.parse(test).body
    counts = [isinstance(statement, ast.Assert) for statement in body]
    if not any(counts):
        if not body or not isinstance(body[-1], ast.Expr):
            raise ValueError("it neither asserts anything nor ends with a call")
        counts[-1] = True
    return list(zip(body, counts, strict=True))


if __name__ == "__main__":
    main()
