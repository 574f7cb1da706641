"""One optimiser step: packed micro-batches through the policy, the loss, the gradient, AdamW.

The divisor of the loss is counted over the whole step and all ranks before the first backward, so
micro-batches, gradient accumulation and data parallelism give the single-batch gradient. Rows whose
coefficient is known to be zero (dead groups, no KL, no entropy bonus) are left out of the forward:
their gradient is exactly zero. The old log-probabilities of a step with one update are those of
the policy itself (ratio 1); with more updates they are recomputed first, without gradient.

Across ranks: every rank makes the same decisions from the same gathered numbers, and joins every
collective. One without a live row computes a masked token; where gradients are reduced micro-batch
by micro-batch (DeepSpeed, FSDP) such fillers also level the numbers of micro-batches.
Sharded weights (ZeRO-3, FSDP2) are a twin's, which an update alone computes with (sharded.py); a
sharded head is gathered inside its own module (heads.py). Left out: pipeline parallelism.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from reasonrl import heap, importance, whole_decoder
from reasonrl.batch import lengths, pack, places, rows_of
from reasonrl.config import Config
from reasonrl.heads import Head
from reasonrl.implementations import native
from reasonrl.logprobs import rollout_logp
from reasonrl.loss import LossSpec, linear_policy_loss
from reasonrl.models import Policy
from reasonrl.ranks import gathered
from reasonrl.records import Batch, InputError, NonFiniteStop, Rollout
from reasonrl.seen import ratios
from reasonrl.sharded import Shards, load_optimizer_state, moments, optimizer_state
from reasonrl.vision import idle

NATIVE = importlib.util.find_spec("reasonrl._C") is not None
PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")  # kinds of ranks
METRICS = ("kl", "clip_ratio/region_mean", "ratio/mean", "ratio/max", "nonfinite")  # never absent


class Trainable(nn.Module):
    """The policy with its head inside one forward, so that wrappers (DDP, DeepSpeed) see it all."""

    def __init__(self, policy: Policy, temperature: float):
        super().__init__()
        self.model = policy.model
        self.policy, self.temperature = policy, temperature
        self._no_split_modules = policy.model._no_split_modules  # what FSDP shards by

    def forward(self, batch: Batch, spec: LossSpec, denominator: float):
        metrics: dict[str, Tensor] = {}

        def at_head(hidden: Tensor, head: Head) -> Tensor:
            device = hidden.device
            out = linear_policy_loss(
                hidden,
                head.weight,
                batch.target.to(device),
                _to(batch.old_logp, device),
                batch.advantage.to(device),
                spec,
                mask=_to(batch.mask, device),
                cu_seqlens=batch.cu_seqlens.to(device),
                ref_logp=_to(batch.ref_logp, device),
                bias=head.bias,
                temperature=self.temperature,
                softcap=head.softcap,
                is_weight=_to(batch.weight, device),
                denominator=denominator,
            )
            metrics.update(out.metrics)
            return out.loss

        loss = self.policy.at_head(batch, at_head)
        nothing = idle(self.policy, batch.images)
        return (loss if nothing is None else loss + nothing.to(loss.device)), metrics


@dataclass(frozen=True)
class Share:
    """What one update reads, of one rank; N completion tokens."""

    rollout: Rollout
    advantage: Tensor  # (N,)
    spec: LossSpec
    rows: Sequence[int]  # of the rollout
    old: Tensor | None  # (N,)
    ref: Tensor | None  # (N,)
    weight: Tensor | None = None  # (N,), importance of what a server drew


class Learner:
    """Owns the optimiser; `step` turns a rollout and its advantages into one or more updates."""

    def __init__(self, policy: Policy, config: Config, accelerator: Accelerator):
        self.config, self.accelerator, self.policy = config, accelerator, policy
        _set_up_deepspeed(accelerator, config)
        if policy.device.type == "cpu":
            heap.keep()
        self.shards = Shards(policy, accelerator)
        module = Trainable(self.shards.trained, config.sample.temperature)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=config.optim.betas,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            fused=policy.device.type in ("cpu", "cuda"),
        )
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        # whole weights and no scaler: torch's own optimiser does all that accelerate's does
        self.plain = accelerator.distributed_type.value in PLAIN and accelerator.scaler is None
        self.alone = self.plain and accelerator.num_processes == 1  # nobody reduces gradients
        self.reference: Policy | None = None
        self.skipped = 0  # steps in a row that the NaN policy left out
        self.watches, self.seen = False, None  # whether to keep what updates see of every token
        self.keep: Callable[[Share], None] | None = None  # called with the first of a row

    def step(
        self, rollout: Rollout, advantage: Tensor, spec: LossSpec, rate: float, updates: int = 1
    ) -> dict[str, float]:
        """`updates` optimiser steps over the rollout's groups; mean metrics over its tokens."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        old = self.logp(rollout, self.policy) if updates > 1 else None
        weight, drawn = None, {}
        if rollout.stale:  # an earlier policy wrote some of it: what it said then is the old one
            old = torch.cat(list(rollout.logp))
        elif self.config.engine.url:
            old, weight, drawn = self._drawn(rollout, old)
        ref = self.logp(rollout, self.reference) if self.reference else None
        groups = [int(n) for (n,) in gathered(self.accelerator, [len(rollout.problems)])]
        place = self.accelerator.process_index, self.accelerator.num_processes
        shares = _shares(rollout, updates, sum(groups), *place)
        every = [Share(rollout, advantage, spec, rows, old, ref, weight) for rows in shares]
        now = torch.full((sum(lengths(rollout)),), math.nan)
        done = []
        for number, share in enumerate(every):
            if self.watches:
                self._watch(share, now, fresh=number == 0 and not rollout.stale)
            done.append(self.update(share))
        self.seen = ratios(rollout, now, old, advantage, spec) if self.watches else None
        return _merged(done) | drawn

    def logp(self, rollout: Rollout, policy: Policy) -> Tensor:
        """(N,) log-probabilities of the completion tokens under a policy."""
        return rollout_logp(
            policy, rollout, self.config.batch.tokens, self.config.sample.temperature
        )

    def _drawn(self, rollout: Rollout, known: Tensor | None):
        """For what a server drew: the trainer's own log p as the old one, the weight of every
        token (None where nothing is to be corrected), and how far the two are apart."""
        how, weight = self.config.engine, None
        old = self.logp(rollout, self.policy) if known is None else known
        drawn = torch.cat([*(rollout.sampling_logp or rollout.logp), torch.zeros(0)])
        if how.correction != "off":
            weight = importance.weights(old, drawn, lengths(rollout), how.correction, how.cap)
        mine = importance.sums(old, drawn, weight, how.cap)
        return old, weight, importance.metrics(gathered(self.accelerator, mine))

    def _watch(self, share: Share, now: Tensor, fresh: bool) -> None:
        """Note the policy's log p of the rows that an update learns from in `now` (N,): a forward
        more where it is not known. fresh: the policy is the one that `old` is of."""
        live = _live(share.rollout, share.advantage, share.rows, share.spec)
        if not live:
            return
        at = places(share.rollout, live)
        if share.old is None:
            now[at] = 0.0
        else:
            rows = rows_of(share.rollout, live)
            now[at] = share.old[at] if fresh else self.logp(rows, self.policy)

    def update(self, share: Share) -> dict[str, float]:
        """One optimiser step at the rate as it is; its metrics."""
        rollout, advantage, spec = share.rollout, share.advantage, share.spec
        rows, old, ref, weight = share.rows, share.old, share.ref, share.weight
        size = lengths(rollout)
        live = _live(rollout, advantage, rows, spec)
        batches = list(pack(rollout, advantage, self.config.batch.tokens, live, old, ref, weight))
        mine = [sum(size[b] for b in rows), len(rows), len(live), len(batches)]
        ranks = gathered(self.accelerator, mine)
        tokens, count, alive, parts = (sum(column) for column in zip(*ranks, strict=True))
        share_live = {"rows/live": alive / max(1, count)}
        if tokens == 0 or parts == 0:  # nothing to learn on any rank: a defined no-op
            return _merged([]) | share_live | {"grad_norm": 0.0}
        divisor = {
            "token_mean": tokens,
            "seq_mean": count,
            "fixed": count * (spec.max_length or 1),
        }[spec.reduce]
        given = (x is not None for x in (old, ref, weight))
        filler = _filler(self.policy.tokenizer.eos_token_id, *given)
        lockstep = self.accelerator.distributed_type.value in ("DEEPSPEED", "FSDP")
        wanted = int(max(rank[3] for rank in ranks)) if lockstep else 1
        batches += [filler] * (wanted - len(batches))
        with self.shards.update():
            out = self._backward(batches, spec, divisor)
            names = sorted(out)  # the same on every rank
            every = gathered(self.accelerator, [out[name] for name in names])
            out = _merged([dict(zip(names, v, strict=True)) for v in every], total=("loss",))
            norm = self._apply(math.isfinite(out["loss"]))
        if self.skipped == 1 and self.keep is not None:
            self.keep(share)
        if self.skipped >= self.config.nan_patience:
            raise NonFiniteStop(
                f"loss or gradient was not finite in {self.skipped} steps in a row (nan_patience)"
            )
        return out | share_live | {"grad_norm": norm}

    def _backward(self, batches: Sequence[Batch], spec: LossSpec, divisor: float):
        """This rank's gradient, reduced with the last micro-batch; its share of the metrics."""
        world = self.accelerator.num_processes
        backward = Tensor.backward if self.plain else self.accelerator.backward
        parts = []
        for i, batch in enumerate(batches):
            last = i + 1 == len(batches)
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps on the last
            straight = whole_decoder.direct() if self.alone else nullcontext()
            with straight, nullcontext() if last else self.accelerator.no_sync(self.module):
                # ranks are averaged, so each divides by its share of the divisor
                loss, metrics = self.module(batch, spec, divisor / world)
                backward(loss)
            values = metrics | {"loss": loss.detach() / world}
            parts.append({k: float(v) for k, v in values.items()})
        return _merged(parts, total=("loss",))

    def _apply(self, usable: bool) -> float:
        """Clip and step; a loss or gradient that is not finite leaves the parameters bit-equal on
        every rank. usable: whether the loss is finite."""
        limit = self.config.optim.grad_clip or math.inf
        value = self._native_step(limit, usable)
        if value is None:
            norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
            norm = getattr(norm, "full_tensor", lambda: norm)()
            value = float(norm) if norm is not None else math.nan
            # DeepSpeed has stepped, or refused to, inside its backward
            if usable and math.isfinite(value):
                (self.optimizer.optimizer if self.plain else self.optimizer).step()
        self.skipped = 0 if usable and math.isfinite(value) else self.skipped + 1
        if self.plain:  # accelerate's and torch's own ways there take longer than a small step's
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            self.optimizer.zero_grad(set_to_none=True)
        return value

    def _native_step(self, limit: float, usable: bool) -> float | None:
        """Both in one pass over the moments of torch's own optimiser; None where that must."""
        if not (self.plain and self.policy.device.type == "cpu" and NATIVE):
            return None
        optimizer: Any = self.optimizer.optimizer
        (group,) = optimizer.param_groups
        learned = [p for p in group["params"] if p.grad is not None]
        all_of = []
        for p in learned:
            state = optimizer.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                state["exp_avg_sq"] = torch.zeros_like(p)
            all_of.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        flat = list(chain.from_iterable(all_of))
        if {x.dtype for x in flat} - {torch.float32} or not all(map(Tensor.is_contiguous, flat)):
            return None
        known = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        return native("adamw")(all_of, *known, limit, usable)

    def finite(self) -> bool:
        """Whether every weight and every moment is."""
        tensors = [*self.policy.model.parameters(), *moments(self.optimizer)]
        return all(bool(t.isfinite().all()) for t in tensors)

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's, as one process has it, on the main rank; a collective."""
        main = self.accelerator.is_main_process
        return optimizer_state(self.optimizer, self._learning(), main)

    def load_optimizer_state(self, saved: dict[str, Any]) -> None:
        load_optimizer_state(self.optimizer, self._learning(), saved)

    def _learning(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


def rate_at(step: int, steps: int, peak: float, warmup: int, schedule: str, final: float) -> float:
    """The learning rate of step 1..steps: linear warm-up, then constant, linear or cosine decay."""
    if step <= warmup:
        return peak * step / (warmup + 1)
    if schedule == "constant" or steps <= warmup:
        return peak
    done = (step - 1 - warmup) / (steps - warmup)
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (final + (1 - final) * left)


def _live(rollout: Rollout, advantage: Tensor, rows: Sequence[int], spec: LossSpec) -> list[int]:
    """Rows that can have a gradient: all where KL or entropy act, else those with credit."""
    if spec.kl_coef or spec.entropy_coef:
        return list(rows)
    credit = advantage.tolist()
    edges = [0, *accumulate(lengths(rollout))]
    return [b for b in rows if any(credit[edges[b] : edges[b + 1]])]


def _shares(
    rollout: Rollout, updates: int, groups: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """Rows of every update: whole groups, as even as they go, the same number on every rank.

    `groups` counts all ranks'. Group g of a rank is taken for the whole run's g * world + rank (as
    the loop deals them out), so the updates hold the groups that one process would give them.
    """
    updates = max(1, min(updates, groups))
    edges = [groups * i // updates for i in range(updates + 1)]
    owner = [min(g * world + rank, groups - 1) for g in rollout.group.tolist()]
    return [
        [b for b, g in enumerate(owner) if low <= g < high]
        for low, high in zip(edges, edges[1:], strict=False)
    ]


def _filler(token: int, old: bool, ref: bool, weight: bool) -> Batch:
    """A masked completion of one token: every parameter gets a gradient of exactly zero."""
    zero = torch.zeros(1)
    return Batch(
        input_ids=torch.tensor([token, token]),
        position_ids=torch.tensor([0, 1]),
        layout=[(0, 1, [1])],
        predict=torch.tensor([0]),
        target=torch.tensor([token]),
        cu_seqlens=torch.tensor([0, 1]),
        advantage=zero,
        old_logp=zero if old else None,
        ref_logp=zero if ref else None,
        weight=zero if weight else None,
        mask=torch.tensor([False]),
        rows=torch.tensor([0]),
    )


def _set_up_deepspeed(accelerator: Accelerator, config: Config) -> None:
    """What DeepSpeed must know before it wraps: no data loader, our micro-batches, our clipping."""
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            "gradient_accumulation_steps: expected 1 (batch.tokens cuts the micro-batches), got"
            f" {accelerator.gradient_accumulation_steps}"
        )
    if accelerator.distributed_type.value != "DEEPSPEED":
        return
    plugin: Any = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
    if settings.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        settings["train_micro_batch_size_per_gpu"] = 1
    settings["gradient_clipping"] = config.optim.grad_clip


def _merged(parts: Sequence[dict[str, float]], total: tuple[str, ...] = ()) -> dict[str, float]:
    """Metrics of several micro-batches as one: means by tokens, maxima, sums."""
    if not parts:
        return dict.fromkeys((*METRICS, "tokens", "loss"), 0.0)
    weights = [part.get("tokens", 0.0) for part in parts]
    whole = sum(weights)
    out = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part.get(key, 0.0) for part in parts]
        if key in ("tokens", "nonfinite", *total):
            out[key] = sum(values)
        elif key.endswith("/max"):
            out[key] = max(values)
        elif whole:
            out[key] = sum(v * w for v, w in zip(values, weights, strict=True)) / whole
        else:
            out[key] = sum(values) / len(values)
    return out


def _to(value: Tensor | None, device) -> Tensor | None:
    return None if value is None else value.to(device)
