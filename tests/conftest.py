"""Shared by all tests: loud skips, derandomised hypothesis, poisoned memory."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch.utils import _device

# many small tensors: a second thread costs more than it gives; a test that wants two sets them
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("torture", derandomize=False, deadline=None, max_examples=400)
settings.load_profile(os.environ.get("REASONRL_HYPOTHESIS", "ci"))


sys.path.insert(0, str(Path(__file__).parent))  # tests/hosts.py, and scripts that tests start

import hosts  # noqa: E402


def pytest_terminal_summary(terminalreporter) -> None:
    passed = _passed(terminalreporter)
    if any(module in passed for module in hosts.FILES):
        terminalreporter.write_line(hosts.line(passed))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus) -> None:
    """REASONRL_REQUIRE=trl: a run of all tests in which no test of TRL passed is no success."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    needed = "trl" in os.environ.get("REASONRL_REQUIRE", "").split(",")
    worker, some = hasattr(session.config, "workerinput"), session.config.option.file_or_dir
    if worker or some or not needed or reporter is None or session.config.option.collectonly:
        return
    if "test_trl" not in _passed(reporter) and exitstatus == 0:
        print("\nREASONRL_REQUIRE names trl, and no test in test_trl.py passed", file=sys.stderr)
        session.exitstatus = 1


def _passed(reporter) -> dict[str, int]:
    return Counter(Path(r.nodeid.split("::")[0]).stem for r in reporter.stats.get("passed", ()))


@pytest.fixture(scope="session")
def require() -> Callable[[str, str | None], None]:
    """require(tool, reason): go on where reason is None; else skip, or fail by REASONRL_REQUIRE."""

    def check(tool: str, reason: str | None) -> None:
        if reason is None:
            return
        if tool in os.environ.get("REASONRL_REQUIRE", "").split(","):
            pytest.fail(f"REASONRL_REQUIRE names {tool}, which is missing: {reason}")
        pytest.skip(f"SKIPPED: {tool} is missing: {reason}")

    return check


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh float memory holds NaN, so that an element nobody wrote shows itself."""

    def poisoned(make: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            out = make(*args, **kwargs)
            with torch.no_grad():  # torch itself makes an empty leaf here and there
                return out.fill_(torch.nan) if out.is_floating_point() else out

        return wrapped

    # torch remembers for good what `with torch.device` acts on; asked now, these are its own
    _device._device_constructors()
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
