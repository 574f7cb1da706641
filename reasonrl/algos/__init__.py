"""The table of algorithms. Adding one is a file and a line."""

from reasonrl.algos.base import GRPO, Algorithm
from reasonrl.algos.process import Process
from reasonrl.algos.sft import SFT

ALGOS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "process": Process,
    "sft": SFT,
}

__all__ = ["ALGOS", "GRPO", "SFT", "Algorithm", "Process"]
