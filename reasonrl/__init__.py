"""reasonrl: process-reward reinforcement learning for reasoning models on a fused, torch-free core.

The public names, found on first use: importing this package runs nothing and loads nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "records": (
        "Batch InputError KernelUnavailable LossOut Message NonFiniteStop Problem Rewards Rollout "
        "Score ScorerDown Step infra scored unscorable"
    ),
    "ops": "linear_logp logp trust_advantage",
    "vocab_parallel": "vocab_parallel_linear_logp",
    "credit": "StepCredit TokenCredit credit_advantage",
    "loss": "LossSpec linear_policy_loss policy_loss",
    "advantage": "group_advantage prime_advantage returns step_expand step_reduce whiten",
    "systems": (
        "dpo_loss implicit_prm_loss implicit_reward libra_reward reasonflux_reward "
        "reasonflux_score reasonflux_step_target trust_reward trust_weight"
    ),
    "choice": "best_of_n",
    "reward_spec": "RewardSpec",
}
_MODULES = "advantage algos loss ops records rewards systems tasks".split()
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"reasonrl.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'reasonrl' has no attribute {name!r}")
    value = getattr(import_module(f"reasonrl.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
