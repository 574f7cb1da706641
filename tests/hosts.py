"""Where the tests find the other trainers' released code, and which of it ran.

verl is unpacked beside the environment (.ci/venv: `pip install --no-deps --target VENV/hosts`),
because its imports want ray, tensordict and more; what it needs of them here has stand-ins.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import types
from importlib import metadata
from pathlib import Path

FILES = {  # test module -> host: what counts as a host's test in the summary
    "test_trl": "trl",
    "test_trl_prm": "trl",
    "test_trl_trust": "trl",
    "test_trl_merf": "trl",
    "test_openrlhf": "openrlhf",
    "test_verl": "verl",
    "test_verl_rewards": "verl",
}
LOOKALIKES = ("slime", "prime-rl", "nemo-rl", "areal")  # not on the package index


def folder() -> Path:
    return Path(os.environ.get("REASONRL_HOSTS", Path(sys.prefix) / "hosts"))


def version(host: str) -> str | None:
    """Of the released package that the tests use, None where it is not to be had."""
    for place in ([str(folder())], sys.path):
        for found in metadata.distributions(path=place, name=host):
            return found.version
    return None


def line(passed: dict[str, int]) -> str:
    """One line for the end of the test log; passed: tests by module name."""
    counts: dict[str, int] = dict.fromkeys(FILES.values(), 0)
    for module, host in FILES.items():
        counts[host] += passed.get(module, 0)
    ran = [f"{h} {version(h)} ({n} tests)" for h, n in counts.items() if n and version(h)]
    missing = [h for h in counts if not version(h)]
    out = f"hosts that ran: {', '.join(ran) or 'none'} ({len(ran)} of {len(counts)})"
    out += f"; missing: {', '.join(missing)}" if missing else ""
    return f"{out}; by their types only: {', '.join(LOOKALIKES)}"


def verl_module(name: str, monkeypatch) -> types.ModuleType:
    """A released module of verl, imported among stand-ins of what it imports but does not need."""
    monkeypatch.syspath_prepend(str(folder()))
    root = folder() / "verl"
    for package in ("verl", "verl.utils", "verl.experimental", "verl.trainer", "verl.trainer.ppo",
                    "verl.workers", "verl.experimental.reward_loop",
                    "verl.experimental.reward_loop.reward_manager"):  # fmt: skip
        made = types.ModuleType(package)
        made.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, package, made)
    kinds = {
        "omegaconf": ("DictConfig", "OmegaConf"),
        "tensordict": ("TensorDict",),
        "verl": ("DataProto",),
        "verl.trainer.config": ("AlgoConfig",),
        "verl.workers.config": ("ActorConfig",),
    }
    for module, names in kinds.items():
        held = sys.modules["verl"] if module == "verl" else types.ModuleType(module)
        monkeypatch.setitem(sys.modules, module, held)
        for one in names:
            setattr(held, one, type(one, (), {}))
    utils = sys.modules["verl.utils"]
    grouped = importlib.import_module("verl.utils.groupwise")
    utils.as_torch_index, utils.group_mean_std = grouped.as_torch_index, grouped.group_mean_std
    loop = types.ModuleType("verl.utils.ray_utils")
    loop.get_event_loop = asyncio.new_event_loop
    monkeypatch.setitem(sys.modules, "verl.utils.ray_utils", loop)
    return importlib.import_module(name)
