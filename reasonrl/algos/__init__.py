"""The table of algorithms. Adding one is a file and a line."""

from reasonrl.algos.base import GRPO, Algorithm
from reasonrl.algos.dpo import Dpo
from reasonrl.algos.judging import JudgeRL
from reasonrl.algos.libra import Libra
from reasonrl.algos.merf import Merf
from reasonrl.algos.prime import Prime
from reasonrl.algos.process import Process
from reasonrl.algos.reasonflux import ReasonFlux
from reasonrl.algos.sft import SFT
from reasonrl.algos.sophia import Sophia

ALGOS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "process": Process,
    "prime": Prime,
    "reasonflux": ReasonFlux,
    "merf": Merf,
    "libra": Libra,
    "judging": JudgeRL,
    "sophia": Sophia,
    "dpo": Dpo,
    "sft": SFT,
}

__all__ = [
    "ALGOS",
    "GRPO",
    "SFT",
    "Algorithm",
    "Dpo",
    "JudgeRL",
    "Libra",
    "Merf",
    "Prime",
    "Process",
    "ReasonFlux",
    "Sophia",
]
