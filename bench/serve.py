"""Requests a second of `reasonrl serve math`, asked as OpenRLHF asks: one completion a request.

    python -m bench serve --out bench/results

The server is a process of its own; `--clients` connections ask all the time for `--seconds`, after
a warm-up. Answers are short and as trainers see them: each problem is answered by a group, two
thirds of the answers are integers, the rest fractions, roots, sets, expressions in LaTeX; half of
them are wrong. A pair of answers is verified once (the server remembers it), so `--group` says how
many completions share a problem; every problem is new. Gate: every reply is the score that was
planned, and SIGTERM under load loses no request. What is measured includes this load script, on
the same cores; milliseconds of CPU a request, which other work on the machine changes little, are
given for the server, its workers and the script.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h11
import psutil

from bench.machine import machine


def answers(seed: int, group: int) -> Iterator[tuple[str, str, str, float]]:
    """Without end: (prompt, completion, gold answer, score)."""
    draws = random.Random(seed)
    while True:
        a, b = draws.randint(2, 10**6), draws.randint(2, 97)
        gold, right, wrong = _forms(a, b, draws.randrange(9))
        prompt = f"<|user|>Problem {seed}-{a}-{b}: find the value.<|assistant|>"
        for _ in range(group):
            good = draws.random() < 0.5
            said = draws.choice(right if good else wrong)
            thought = "First we simplify, then we add. " * draws.randint(1, 8)
            yield (
                prompt,
                f"{thought}So the answer is \\boxed{{{said}}}.<|im_end|>",
                gold,
                float(good),
            )


def _forms(a: int, b: int, kind: int) -> tuple[str, list[str], list[str]]:
    """A gold answer, ways to write it, and wrong answers."""
    if kind < 6:
        return f"{a}", [f"{a}"], [f"{a + 1}", f"{-a}", f"{a * 10}"]
    if kind == 6:
        right = [f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}", f"{a}/{b}"]
        return right[0], right, [f"\\frac{{{a + 1}}}{{{b}}}", f"{a + 1}"]
    if kind == 7:
        right = [f"{b}\\sqrt{{{a}}}", f"\\sqrt{{{a * b * b}}}"]
        return right[0], right, [f"{b + 1}\\sqrt{{{a}}}", f"\\sqrt{{{a}}}"]
    right = [f"{b}x + {a}", f"{a} + {b}x"]
    return right[0], right, [f"{b}x - {a}", f"{a}x + {b}"]


def start(port: int = 0) -> tuple[subprocess.Popen[str], int]:
    words = [sys.executable, "-m", "reasonrl.cli", "serve", "math", "--port", str(port)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    line = process.stdout.readline()
    if "127.0.0.1:" not in line:
        raise SystemExit(f"bench serve: the server did not start: {line!r}")
    return process, int(line.split("127.0.0.1:")[1].split()[0])


class Client(threading.Thread):
    """Asks without a pause on one connection until told to stop or refused."""

    def __init__(self, port: int, seed: int, group: int, stop: threading.Event):
        super().__init__(daemon=True)
        self.port, self.stop, self.rows = port, stop, answers(seed, group)
        self.seconds: list[float] = []
        self.ends: list[float] = []
        self.wrong: list[Any] = []
        self.lost = 0

    def run(self) -> None:
        try:
            link = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        except ConnectionRefusedError:
            return
        wire = h11.Connection(h11.CLIENT)
        with link:
            while not self.stop.is_set() and self._one(link, wire):
                pass

    def _one(self, link: socket.socket, wire: h11.Connection) -> bool:
        """One request; whether the connection may be used again."""
        prompt, completion, gold, score = next(self.rows)
        body = {"query": [prompt + completion], "prompts": [prompt], "labels": [gold]}
        data = json.dumps(body).encode()
        head = f"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        began = time.perf_counter()
        try:
            link.sendall(head.encode() + data)
            reply = _reply(link)
        except OSError:
            reply = None
        if reply is None:  # closed before a reply: only an idle connection may be
            self.lost += 1
            return False
        top, found = reply
        self.ends.append(time.perf_counter())
        self.seconds.append(self.ends[-1] - began)
        if b" 200 " not in top or found["rewards"] != [score]:
            self.wrong.append((gold, completion[-60:], found))
        return b"close" not in top.lower()


def _reply(link: socket.socket) -> tuple[bytes, Any] | None:
    data = b""
    while b"\r\n\r\n" not in data:
        part = link.recv(65536)
        if not part:
            return None
        data += part
    top, _, body = data.partition(b"\r\n\r\n")
    length = int(top.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        part = link.recv(65536)
        if not part:
            return None
        body += part
    return top, json.loads(body)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    process, port = start()
    stop = threading.Event()
    clients = [Client(port, i, options.group, stop) for i in range(options.clients)]
    try:
        for client in clients:
            client.start()
        time.sleep(options.warm_up)
        began, used = time.perf_counter(), _cpu(process.pid)
        time.sleep(options.seconds)
        ended, after = time.perf_counter(), _cpu(process.pid)
        process.send_signal(signal.SIGTERM)  # under load: the clients go on asking
        for client in clients:
            client.join(120)
        stop.set()
        said = process.stdout.read() if process.stdout else ""
        status = process.wait(120)
    finally:
        process.kill()
    inside = sorted(
        s
        for client in clients
        for s, end in zip(client.seconds, client.ends, strict=True)
        if began <= end <= ended
    )
    replies = sum(len(client.ends) for client in clients)
    lost = sum(client.lost for client in clients)
    wrong = [w for client in clients for w in client.wrong]
    gate = {
        "replies": replies,
        "wrong": len(wrong),
        "examples": [repr(w) for w in wrong[:3]],
        "lost_in_the_stop": lost,
        "exit_status": status,
        "server_says": said.strip(),
    }
    gate["green"] = not wrong and not lost and status == 0
    gate["green"] = gate["green"] and said.strip() == f"stopped after {replies} requests"
    rate = len(inside) / (ended - began)
    times = {f"p{q}_ms": round(1000 * inside[len(inside) * q // 100], 2) for q in (50, 95, 99)}
    cpu = {name: round(1000 * (after[name] - used[name]) / len(inside), 3) for name in used}
    found = {"requests": len(inside), "requests_per_second": round(rate, 1), **times}
    return found | {"cpu_ms_per_request": cpu, "gate": gate}


def _cpu(pid: int) -> dict[str, float]:
    """Seconds of CPU so far: the server, its workers, this script."""
    server = psutil.Process(pid)
    parts = {"server": [server], "workers": server.children(True), "load": [psutil.Process()]}
    return {
        name: sum(sum(p.cpu_times()[:2]) for p in processes) for name, processes in parts.items()
    }


def main(arguments: Sequence[str]) -> int:
    """0 and a rate behind a green gate; 1 and no rate behind a red one."""
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=__doc__)
    parser.add_argument("--clients", type=int, default=16, help="connections")
    parser.add_argument("--group", type=int, default=8, help="completions of a problem")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    parser.add_argument("--out", type=Path, help="a folder for the raw numbers")
    options = parser.parse_args(arguments)
    report = {"settings": {k: v for k, v in vars(options).items() if k != "out"}}
    report |= {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "machine": machine()}
    found = measure(options)
    green = found["gate"]["green"]
    report |= found if green else {"gate": found["gate"]}
    report["load_after"] = os.getloadavg()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / time.strftime("serve-%Y%m%d-%H%M%S.json")
        path.write_text(json.dumps(report, indent=1) + "\n")
    if not green:
        print(f"red gate, no number: {json.dumps(found['gate'])}")
        return 1
    print(
        f"{found['requests_per_second']} requests/s ({options.clients} clients, groups of"
        f" {options.group}), p50 {found['p50_ms']} ms, p99 {found['p99_ms']} ms; gate green:"
        f" {found['gate']['replies']} replies right, 0 lost in the stop"
    )
    cpu = found["cpu_ms_per_request"]
    print("ms of CPU a request: " + ", ".join(f"{name} {ms}" for name, ms in cpu.items()))
    return 0
