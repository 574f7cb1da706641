"""Memory that a learning process frees stays with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from accelerate import Accelerator

from reasonrl import config as configs
from reasonrl import heap, models
from reasonrl.update import Learner

CODE = """
import torch
from bench.machine import resident
from reasonrl import heap
print(heap.keep())
before = resident()
x = torch.ones(1 << 25)  # 128 MiB: alone it would stand alone, and go
large = resident()
del x
print(large - before, resident() - before)
"""


def freed(**environment: str) -> tuple[bool, int, int]:
    """What `keep` said, MiB with a large tensor, and without it again."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(heap.OWN)} | environment
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True
    )
    said, sizes = done.stdout.splitlines()[-2:]
    held, left = map(int, sizes.split())
    return said == "True", held, left


@pytest.fixture(scope="module")
def glibc(require):
    require("glibc", None if freed()[0] else "no mallopt in this C library")


def test_what_is_freed_stays(glibc):
    kept, held, left = freed()
    assert kept and held > 100 and left > 100


def test_whoever_sets_the_heap_has_the_last_word(glibc):
    kept, held, left = freed(MALLOC_ARENA_MAX="4")
    assert not kept and held > 100 and left < 30


def test_another_c_library_has_its_own_ways(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep()


@pytest.mark.parametrize("device, times", [("cpu", 1), ("cuda", 0)])
def test_a_learner_on_a_cpu_asks_for_it(monkeypatch, device, times):
    asked = []
    monkeypatch.setattr(heap, "keep", lambda: asked.append(1))
    policy = models.load("tiny", dtype="fp32", width=32, layers=1)
    kind = type("Device", (), {"type": device})()
    monkeypatch.setattr(type(policy), "device", property(lambda self: kind))
    Learner(policy, configs.load("tiny"), Accelerator(cpu=True))
    assert len(asked) == times
