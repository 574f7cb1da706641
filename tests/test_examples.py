"""Every example runs on a CPU, stays short, and its loss falls."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "common")
NEEDS = {"deepspeed_zero3": "deepspeed", "trl_grpo": "trl"}


def test_they_are_short_and_all_there():
    hosts = {
        "plain_pytorch",
        "hf_trainer",
        "accelerate_ddp",
        "deepspeed_zero3",
        "fsdp2",
        "trl_grpo",
    }
    assert set(SCRIPTS) == hosts
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name
    listed = (FOLDER / "README.md").read_text()
    assert all(f"{name}.py" in listed for name in SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_loss_falls(name, require, tmp_path):
    if host := NEEDS.get(name):
        found = importlib.util.find_spec(host)
        require(host, None if found else f"pip install 'reasonrl[{host}]'")
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"step \d+ loss (\S+)", done.stdout)]
    assert len(losses) == 12, done.stdout
    if name == "trl_grpo":  # every second step goes over the rollout before it once more
        first, again = losses[0::2], losses[1::2]
        assert all(b < a for a, b in zip(first, again, strict=True)), losses
    else:
        assert losses[-1] < losses[0] - 0.05, losses
