"""The doctor tries what is installed, and tells missing from broken."""

from __future__ import annotations

import pytest

from reasonrl import doctor
from reasonrl.cli import main
from reasonrl.doctor import Absent, Line, examine, verdict


def test_what_is_installed_here_works(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = {line[:15].strip(): line for line in out.splitlines()}
    assert (
        " ok " in lines["native kernels"] and "agrees with the reference" in lines["native kernels"]
    )
    assert "two steps trained" in lines["trl"] and " ok " in lines["trl"]
    assert " ok " in lines["maths verifier"] and " ok " in lines["linear_logp"]
    assert out.splitlines()[-1].startswith("everything installed works")


def test_broken_is_not_missing(monkeypatch, capsys):
    def absent():
        raise Absent("pip install it")

    def wrong():
        raise TypeError("forward() got an unexpected keyword argument 'x'\nmore")

    monkeypatch.setattr(doctor, "CHECKS", (("a", lambda: "1.0"), ("b", absent), ("c", wrong)))
    assert examine() == [
        Line("a", "ok", "1.0"),
        Line("b", "missing", "pip install it"),
        Line("c", "broken", "TypeError: forward() got an unexpected keyword argument 'x'"),
    ]
    assert verdict(examine()) == "broken: c"
    assert main(["doctor"]) == 1
    assert "broken: c" in capsys.readouterr().out


def test_a_kernel_that_differs_is_broken(monkeypatch):
    real = doctor.policy_loss

    def off(logp, *args, impl, **more):
        scale = 2.0 if impl == "native" else 1.0
        return real(logp * scale, *args, impl="reference", **more)

    monkeypatch.setattr(doctor, "policy_loss", off)
    with pytest.raises(RuntimeError, match="its gradient differs from the reference"):
        doctor._kernel("native")
