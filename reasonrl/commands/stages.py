"""SophiaVL-R1's stages (arXiv 2505.17018 section 3), each an ordinary run of the one loop:

    OUT/trm-data   plain GRPO; what it thought, scored and balanced: pairs.jsonl
    OUT/trm        supervised learning of those scores, from where the data run began RL
    OUT            Trust-GRPO from there, with the thinking reward model of OUT/trm

A stage that is complete is passed over, a torn one goes on where it stopped. Sizes that the recipe
does not name follow from those it does: the data run takes a third of `steps` with many more
prompts each, since a reward model that must look needs pictures more than completions; it learns
for five times `steps`, at the cold start's rate. What a stage changes is in its config.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrl import checkpoint, models, progress
from reasonrl import config as configs
from reasonrl.algos.sophia import find_scorer
from reasonrl.config import Config
from reasonrl.records import InputError
from reasonrl.rewards.thinking import REPLY
from reasonrl.tasks import make_task
from reasonrl.thinking_data import balanced, logged, write
from reasonrl.train import train

STAGES = ("trm-data", "trm", "rl")
PAIRS = "pairs.jsonl"
PROMPTS = 8  # times the recipe's, in a step of the data run


@dataclass(frozen=True)
class Pipeline:
    """One recipe of `algorithm: sophia` and the folder of its stages."""

    config: Config
    out: Path
    overrides: Sequence[str] = ()  # of the stage that is asked for, on top of what it derives
    annotator: str = "rule"  # who scores the data run's thinking: rule, a folder, http://.../v1
    annotator_model: str = ""
    quiet: bool = False
    say: Callable[[str], None] = print

    def run(self, stage: str | None, resume: bool) -> bool:
        """One stage, or all of them in order; False when it was asked to stop on the way."""
        if stage is not None and stage not in STAGES:
            raise InputError(f"--stage: expected one of {', '.join(STAGES)}, got {stage!r}")
        steps: dict[str, Callable[[bool], bool]] = {
            "trm-data": self._data,
            "trm": self._reward_model,
            "rl": self._policy,
        }
        return all(steps[name](resume) for name in ([stage] if stage else STAGES))

    def _data(self, resume: bool) -> bool:
        folder = self.out / "trm-data"
        config = self._derived(
            algorithm="grpo",
            algo={},
            steps=max(1, self.config.steps // 3),
            prompts_per_step=PROMPTS * self.config.prompts_per_step,
            eval_problems=0,
            save={"every": 0, "keep": 2},
            log=self.config.log.model_dump() | {"completions_every": 1},
        )
        task = make_task(config.task, seed=config.seed, **config.task_options)
        whole = bool(self.config.algo.get("whole_response", False))
        scorer = find_scorer(
            self.annotator, task, server_model=self.annotator_model, whole_response=whole
        )
        if not self._train(config, folder, resume):
            return False
        if (folder / PAIRS).is_file():
            return True
        with progress.shown(self.quiet):
            rule = self.annotator == "rule"
            found = logged(folder, task, scorer, whole_response=whole, reviewed=rule)
        kept = balanced(found.pairs, seed=config.seed)
        words = models.load(self._start()[0], **self._start()[1]).tokenizer
        write(kept, folder, words)
        self.say(
            f"{folder / PAIRS}: {len(kept)} of {len(found.pairs)} scored completions, as many of"
            f" every score; {found.unscored} could not be scored"
        )
        return True

    def _reward_model(self, resume: bool) -> bool:
        data = self.out / "trm-data" / PAIRS
        if not data.is_file():
            raise InputError(f"{data}: not there yet; --stage trm-data makes it")
        name, options = self._start()
        config = self._derived(
            model=name,
            model_options=options,
            task=str(data),
            task_options={},
            algorithm="sft",
            algo={},
            loss={"name": "reinforce"},
            cold_start_steps=0,
            steps=max(1, 5 * self.config.steps),
            group=1,
            prompts_per_step=self.config.cold_start.batch,
            learning_rate=self.config.cold_start.learning_rate,
            max_completion_length=REPLY,
            optim=self.config.optim.model_dump() | {"warmup": 20, "schedule": "linear"},
            filter={},
            updates=1,
            log=self.config.log.model_dump() | {"completions_every": 0},
        )
        return self._train(config, self.out / "trm", resume)

    def _policy(self, resume: bool) -> bool:
        made = checkpoint.latest_verified(self.out / "trm", clean=False)
        scorer = self.config.algo.get("scorer") or (made and str(made))
        if not scorer:
            raise InputError(f"{self.out / 'trm'}: no reward model yet; --stage trm makes it")
        name, options = self._start()
        fresh = {} if name == self.config.model else {"cold_start_steps": 0}
        config = self._derived(
            model=name,
            model_options=options,
            algo=self.config.algo | {"scorer": scorer},
            **fresh,
        )
        return self._train(config, self.out, resume)

    def _start(self) -> tuple[str, dict[str, Any]]:
        """The model that both reward model and policy begin with, and its options: the data run's
        after its cold start, where it had one."""
        warm = self.out / "trm-data" / "checkpoint-0"
        if not warm.is_dir():
            return self.config.model, self.config.model_options
        kept = {k: v for k, v in self.config.model_options.items() if k == "vision_tower"}
        return str(warm), kept

    def _derived(self, **values: Any) -> Config:
        return configs.changed(self.config, self.overrides, **values)

    def _train(self, config: Config, folder: Path, resume: bool) -> bool:
        going = resume and bool(checkpoint.checkpoints(folder))
        self.say(f"stage in {folder}")
        return train(config, folder, resume=going, quiet=self.quiet)
