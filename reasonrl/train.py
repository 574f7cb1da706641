"""The loop. A step walks through the five rooms once, in order:

    problems -> prompts, rollout -> score -> advantage -> update of the policy (-> of the reward)

The cold start is the same loop with the algorithm `sft`. A position in a run is (phase, step) and
every draw is made from (seed, phase, step), so a resumed run continues bit for bit on a CPU.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from reasonrl import engine, lora, models, sharded, state, vision
from reasonrl.algos import ALGOS, SFT
from reasonrl.algos.base import Algorithm, Start, make
from reasonrl.canary import with_canaries
from reasonrl.ceiling import Watch
from reasonrl.checkpoint import FULL
from reasonrl.config import Config
from reasonrl.draw import Source
from reasonrl.evaluate import evaluate
from reasonrl.log import RunLog, read_rows, unwritable
from reasonrl.loss import LossSpec
from reasonrl.monitors import measured
from reasonrl.observe import completion_rows, picture_name, step_metrics
from reasonrl.ranks import accelerator, any_rank, named_loss, whole
from reasonrl.records import InputError, ScorerDown
from reasonrl.replay import keeper
from reasonrl.rollout import Sampling
from reasonrl.seen import token_columns
from reasonrl.tasks import make_task
from reasonrl.update import Learner, rate_at
from reasonrl.watchdog import Watchdog

COLD_START = LossSpec.named("reinforce")


class Stop:
    """Inside it SIGINT and SIGTERM ask the run to finish its step; a second one stops at once.

    Outside the main thread signals belong to somebody else and are left alone.
    """

    def __init__(self) -> None:
        self.asked = False
        self.former: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Run:
    """A run being trained: policy, algorithms, learner, log, and where it stands."""

    def __init__(self, config: Config, out: Path, resume: bool, quiet: bool = False):
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.out = config, out
        self.spec = _spec(config)
        if config.algorithm not in ALGOS:
            raise InputError(
                f"algorithm: expected one of {', '.join(ALGOS)}, got {config.algorithm!r}"
            )
        if config.sample.temperature == 0:
            raise InputError("sample.temperature: expected > 0 in training, got 0")
        task = make_task(config.task, seed=config.seed, **config.task_options)
        if config.eval_problems:  # too many: said before the work
            task.problems(config.eval.split, 0, config.eval_problems)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device: expected a usable NVIDIA GPU for cuda, found none")
        server = engine.of(config, out)
        self.accelerator = accelerator(config.device, config.stall)
        sharded.set_up(self.accelerator)
        found = state.find(out, resume, config)
        self.accelerator.wait_for_everyone()  # rank 0 tidies the folder while it looks
        policy = state.policy(config, found and found.path, self.accelerator.device)
        if config.max_completion_length >= policy.context:
            raise InputError(
                f"max_completion_length: {config.max_completion_length} exceeds the model's"
                f" context of {policy.context}, prompt included"
            )
        policy.engine = server
        self.algo = make(ALGOS[config.algorithm], task, policy, config.algo)
        if self.algo.needs_groups and config.group < 2:
            raise InputError(
                f"group: {config.algorithm} needs at least 2 completions, got {config.group}"
            )
        if config.engine.overlap and type(self.algo).rollout is not Algorithm.rollout:
            raise InputError(f"engine.overlap: {config.algorithm} draws no completions")
        if self.algo.needs_loss is not None and config.loss != self.algo.needs_loss:
            wanted = dict(self.algo.needs_loss)
            raise InputError(f"loss: {config.algorithm} needs {wanted}, got {config.loss}")
        self.learner = Learner(policy, config, self.accelerator)
        self.learner.keep = keeper(out, self.learner, lambda: self.step + 1)
        self.cold, self.step, self.tokens = 0, 0, 0  # steps done in each phase, tokens trained on
        self.source = Source(self.algo, self.accelerator, config.filter)
        self.watch, self.fault = Watch(config.ceiling), ""  # why the run cannot go on
        self.found = found
        if found is not None:
            position = state.restore(found, self.learner, self.source)
            self.watch.restore(position.get("ceiling", self.watch.state()))
            self.cold, self.step, self.tokens = (position[k] for k in ("cold", "step", "tokens"))
        self.log = RunLog(out, config, quiet=quiet or not self.main, resume_step=self.step)
        self.saved = (self.cold, self.step) if found is not None else None
        self.begun = False  # RL, in this process

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def train(self) -> bool:
        """All that is left of the run; True when it is complete, False when asked to stop."""
        with Watchdog(self.config.stall, self.out), Stop() as stop:
            try:
                self._train(stop)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise unwritable(Path(error.filename or self.out), error) from None
        done = self.step >= self.config.steps
        if done:
            self._conclude()
        self.log.close(complete=done)
        return done

    def _train(self, stop: Stop) -> None:
        config, sft = self.config, SFT(self.algo.task, self.algo.policy)
        while self.cold < config.cold_start_steps and not self._stopping(stop):
            self._cold_step(sft)
        if self.step == 0 and not self._stopping(stop):
            if config.eval.at_start:
                self._evaluate(0)
            if config.cold_start_steps and config.steps:
                self._save()
        if self.step < config.steps and not self._stopping(stop):
            self._begin()
        while self.step < config.steps and not self._stopping(stop):
            self._step_or_save()
            if self.fault:
                self._save()
                raise ScorerDown(self.fault)
            if config.save.every and self.step % config.save.every == 0:
                self._save()
        if self.saved != (self.cold, self.step):
            self._save()

    def _begin(self) -> None:
        """Set up what RL needs beside the policy: the reference, the learned reward."""
        initial = None
        if self.spec.kl_coef or self.algo.needs_initial:
            initial = self._initial()
        self.learner.reference = initial if self.spec.kl_coef else None
        shared, tokens = bool(self.spec.kl_coef), self.config.batch.tokens
        learned = self.found is not None and self.step > 0
        draw, note = self._sampling(), self.log.note
        start = Start(initial, shared, self.accelerator, tokens, not learned, draw, note)
        self.algo.begin(start)
        if self.found is not None and learned:
            self.algo.restore(self.found.path)
        self.begun = True

    def _stopping(self, stop: Stop) -> bool:
        """Whether any rank was asked to stop: all of them leave after the same step."""
        stop.asked = any_rank(self.accelerator, stop.asked)
        return stop.asked

    def _cold_step(self, sft: SFT) -> None:
        config, start, began = (
            self.config.cold_start,
            self.cold * self.config.cold_start.batch,
            time.time(),
        )
        problems = self.algo.task.problems("sft", start, config.batch)
        with self.log.phase("update"):
            mine = problems[self.accelerator.process_index :: self.accelerator.num_processes]
            rollout = sft.rollout(mine, 1, Sampling(0), 0)
            rewards = sft.score(rollout)
            rate = rate_at(
                self.cold + 1,
                self.config.cold_start_steps,
                config.learning_rate,
                config.warmup,
                config.schedule,
                0.0,
            )
            metrics = self.learner.step(rollout, sft.advantage(rewards, rollout), COLD_START, rate)
        self.cold += 1
        metrics |= {"learning_rate": rate, "step_time": time.time() - began}
        self.log.cold_step(self.cold, self.config.cold_start_steps, metrics)

    def _step(self) -> None:
        config, algo, log, began = self.config, self.algo, self.log, time.time()
        step = self.step + 1
        algo.clock.step, algo.clock.steps = step, config.steps
        how = (config.prompts_per_step, config.group, self._sampling())
        server = algo.policy.engine
        if server is None or server.begun is None or server.kept is None:
            self._sync(config.engine.max_lag)
        with log.phase("rollout"):
            rollout, drawn = self.source.draw(*how, lambda number: self._seed(step, number))
        if server is not None and config.engine.overlap:
            drawn |= {"sampling/lag": float(self.cold + self.step - server.drew)}
            server.begun = None  # a resumed run that asks otherwise has drawn anew
            if step < config.steps:
                self._sync(config.engine.max_lag)
                self.source.ahead(*how, self._seed(step + 1, 0))
        with log.phase("score"):
            rewards = algo.score(rollout)
            advantage = algo.advantage(rewards, rollout)
            rewards = with_canaries(algo, rollout, rewards, config.canary, step)
        rate = rate_at(
            step,
            config.steps,
            config.learning_rate,
            config.optim.warmup,
            config.optim.schedule,
            config.optim.final_scale,
        )
        stored = bool(config.log.completions_every) and step % config.log.completions_every == 0
        tokens = stored and config.log.tokens
        self.learner.watches = tokens and self.accelerator.num_processes == 1
        with log.phase("update"):
            metrics = self.learner.step(rollout, advantage, self.spec, rate, config.updates)
        with log.phase("reward_update"):
            metrics |= algo.update(rollout, rewards)
        vision.forget()
        self.step = step
        shown = whole(self.accelerator, rollout, rewards, advantage)
        rows = completion_rows(step, *shown)
        metrics |= step_metrics(*shown) | drawn | measured(rows)
        self.fault = self.watch.see(shown[1])
        self.tokens += int(metrics["num_tokens"])
        metrics |= {"num_tokens": self.tokens, "learning_rate": rate}
        every = config.eval.every
        if (every and step % every == 0) or step == config.steps:
            metrics |= self._evaluate(step)
        metrics["step_time"] = time.time() - began
        if stored:
            log.completions(
                step, rows | (token_columns(shown[0], self.learner.seen) if tokens else {})
            )
            seen = [i for p in shown[0].problems for i in p.images if not isinstance(i, str)]
            log.pictures({picture_name(image): image for image in seen})
        log.step(step, config.steps, metrics, sample=rollout.text[0] if rollout.text else "")

    def _sync(self, lag: int) -> None:
        """Give the rollout server the weights where its own are more than `lag` updates behind."""
        server, number = self.algo.policy.engine, self.cold + self.step
        if server is None or (server.kept is not None and number - server.kept <= lag):
            return
        with self.log.phase("sync"):
            if server.begun is not None:  # its weights stay until it has drawn, for every rank
                server.begun.work.wait()
            self.accelerator.wait_for_everyone()
            if self.main:
                server.push(self.algo.policy, number)
            server.kept = number
            self.accelerator.wait_for_everyone()

    def _step_or_save(self) -> None:
        """A step; where a judge or verifier stays down, a checkpoint as it was before the step."""
        mark, before = self.source.mark(), self.step
        try:
            self._step()
        except ScorerDown:
            if self.accelerator.num_processes == 1:  # alone: other ranks may not have failed
                if self.step == before:  # else the server was gone for the evaluation behind it
                    self.source.rewind(mark)
                if self.saved != (self.cold, self.step):
                    self._save()
            raise

    def _evaluate(self, step: int) -> dict[str, Any]:
        config = self.config
        if config.eval_problems:
            self._sync(0)
        if not config.eval_problems or not self.main:
            return {}
        limits = (
            config.eval.split,
            config.eval_problems,
            config.max_completion_length,
            config.eval.batch,
        )
        with self.log.phase("eval"):
            metrics, _ = evaluate(self.algo, *limits)
            if type(self.algo).prompt is not Algorithm.prompt:
                own, _ = evaluate(self.algo, *limits, trained_prompt=True)
                for name in ("accuracy", "accuracy_se", "reward"):
                    if f"eval/{name}" in own:
                        metrics[f"eval/trained_prompt/{name}"] = own[f"eval/{name}"]
        self.log.evaluation(step, metrics)
        return metrics

    def _conclude(self) -> None:
        """What the run came to, in one line."""
        rows = read_rows(self.out / "evals.jsonl") if self.main else []
        known = [r for r in rows if r["eval/accuracy"] is not None]
        if len(known) > 1 and known[0]["step"] == 0:
            first, last = (
                f"{100 * r['eval/accuracy']:.1f} % (SE {100 * r['eval/accuracy_se']:.1f})"
                for r in (known[0], known[-1])
            )
            count, split = known[-1]["eval/problems"], self.config.eval.split
            self.log.note(
                f"accuracy on {count} {split} problems, before and after: {first}, {last}"
            )

    def _save(self) -> None:
        with self.log.phase("save"):
            position: dict[str, Any] = {"cold": self.cold, "step": self.step, "tokens": self.tokens}
            position["ceiling"] = self.watch.state()
            algo = self.algo if self.begun else None
            state.save(self.out, self.learner, self.config, position, self.source, algo)
        self.saved = (self.cold, self.step)

    def _initial(self) -> models.Policy:
        """The policy RL started from, kept on disk for a resumed run."""
        if self.step == 0:
            if self.main:
                state.keep_reference(self.out, self.algo.policy)
            return lora.frozen(self.algo.policy)
        return state.reference(self.out, self.config, str(self.accelerator.device))

    def _sampling(self) -> Sampling:
        draw = self.config.sample
        return Sampling(self.config.max_completion_length, draw.temperature, draw.top_p, draw.top_k)

    def _seed(self, step: int, number: int) -> int:
        """The sampling seed of one rollout of a step on this rank."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return ((self.config.seed * 1_000_003 + step) * world + rank) + (number << 40)


def train(config: Config, out: Path, resume: bool = False, quiet: bool = False) -> bool:
    """Run or resume a training run in `out`; True when it reached its last step."""
    with named_loss(out):
        return Run(config, out, resume, quiet).train()


def _spec(config: Config) -> LossSpec:
    fields = dict(config.loss)
    name = fields.pop("name")
    if name == "dr_grpo":
        fields.setdefault("max_length", config.max_completion_length)
    try:
        return LossSpec.named(name, **fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"loss: {error}") from error
