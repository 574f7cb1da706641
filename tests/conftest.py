"""Shared by all tests: loud skips, derandomised hypothesis, poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

# many small tensors: a second thread costs more than it gives; a test that wants two sets them
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("torture", derandomize=False, deadline=None, max_examples=400)
settings.load_profile(os.environ.get("REASONRL_HYPOTHESIS", "ci"))


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
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return wrapped

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
