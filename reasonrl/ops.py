"""The one door to the kernels: validates and brings both layouts into one packed form.

`implementations.run` then picks who computes. No formula stands here: `kernels/reference.py` is the
specification. Legend: B completions, T tokens, N packed tokens,
S steps, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl import checks
from reasonrl.implementations import run as _run

HOW = ("sum", "mean", "min", "max", "last", "prod")


def logp(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...) int
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(s)[target] and, if asked, the entropy of softmax(s), s = softcap tanh(u /
    softcap) / temperature.

    Both are fp32 (float64 for float64 logits) and differentiable; u are the logits.
    """
    checks.dtype("logits", logits, checks.ANY_FLOAT)
    if logits.dim() < 1:
        raise ValueError("logits must be (..., V), got ()")
    shape, width = logits.shape[:-1], logits.shape[-1]
    checks.tensor("target", target, shape, "(...)", checks.INTEGER, logits.device)
    ids = checks.integers("target", target, 0, width).reshape(-1)
    temperature, softcap = checks.scale(temperature, softcap)
    rows = logits.reshape(-1, width) if width else logits.reshape(target.numel(), 0)
    taken, ent = _run("logp", impl, rows, ids, temperature, softcap, entropy)
    return (taken.reshape(shape), ent.reshape(shape)) if entropy else taken.reshape(shape)


def linear_logp(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...) int
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`logp` of u = hidden @ weight.T + bias, never holding all of (N, V)."""
    checks.dtype("hidden", hidden, checks.ANY_FLOAT)
    if hidden.dim() < 1:
        raise ValueError("hidden must be (..., D), got ()")
    shape = hidden.shape[:-1]
    checks.head(hidden, weight, bias)
    checks.tensor("target", target, shape, "(...)", checks.INTEGER, hidden.device)
    ids = checks.integers("target", target, 0, weight.shape[0]).reshape(-1)
    temperature, softcap = checks.scale(temperature, softcap)
    rows = hidden.reshape(ids.numel(), hidden.shape[-1])
    taken, ent = _run("linear_logp", impl, rows, weight, ids, bias, temperature, softcap, entropy)
    return (taken.reshape(shape), ent.reshape(shape)) if entropy else taken.reshape(shape)


def policy_loss(
    logp: Tensor,  # (B, T) or (N,)
    old_logp: Tensor | None,
    advantage: Any,  # per token, (B,), or a credit (reasonrl.credit)
    spec: Any,  # a LossSpec
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    is_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of log-probabilities; see `reasonrl.loss.policy_loss`."""
    checks.dtype("logp", logp, checks.FULL)
    lay = checks.layout("logp", logp.shape, logp.device, mask, cu_seqlens)
    if spec.entropy_coef and entropy is None:
        raise ValueError(
            f"entropy must be given where entropy_coef = {spec.entropy_coef}, got None"
        )
    given = (old_logp, advantage, spec, ref_logp, is_weight, denominator)
    known = checks.loss_inputs(lay, *given, dtype=logp.dtype)
    ent = None if entropy is None else lay.token("entropy", entropy)
    flat = lay.token("logp", logp)
    return _run(
        "policy_loss",
        impl,
        flat,
        known["old"],
        known["advantage"],
        spec,
        lay.cu,
        lay.mask,
        known["ref"],
        ent,
        known["weight"],
        known["divisor"],
    )


def linear_policy_loss(
    hidden: Tensor,  # (B, T, D) or (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (B, T) or (N,) int
    old_logp: Tensor | None,
    advantage: Any,
    spec: Any,  # a LossSpec
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    is_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) straight from the last hidden states; see
    `reasonrl.loss.linear_policy_loss`."""
    checks.dtype("hidden", hidden, checks.ANY_FLOAT)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be (B, T, D) or (N, D), got {tuple(hidden.shape)}")
    checks.head(hidden, weight, bias)
    lay = checks.layout("hidden", hidden.shape[:-1], hidden.device, mask, cu_seqlens)
    ids = lay.token("target", target, checks.INTEGER)
    ids = ids if lay.mask is None else torch.where(lay.mask, ids, 0)
    ids = checks.integers("target", ids, 0, max(weight.shape[0], int(lay.mask is not None)))
    temperature, softcap = checks.scale(temperature, softcap)
    if checks.is_credit(advantage):
        known = {"mask": mask, "cu_seqlens": cu_seqlens, "impl": _dense(impl)}
        advantage = credit_advantage(advantage, **known)
    known = checks.loss_inputs(lay, old_logp, advantage, spec, ref_logp, is_weight, denominator)
    rows = hidden if hidden.dim() == 2 else hidden.reshape(ids.numel(), hidden.shape[-1])
    return _run(
        "linear_policy_loss",
        impl,
        rows,
        weight,
        ids,
        known["old"],
        known["advantage"],
        spec,
        lay.cu,
        lay.mask,
        known["ref"],
        bias,
        temperature,
        softcap,
        known["weight"],
        known["divisor"],
    )


def group_advantage(
    reward: Tensor,  # (B,)
    group: Tensor,  # (B,) int
    *,
    kind: str = "grpo",
    scored: Tensor | None = None,  # (B,) bool
    ddof: int = 1,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:  # (B,)
    """grpo (r - mean) / (std + eps), dr_grpo r - mean, rloo r - mean of the others, over the scored
    of a group.

    Unscored completions and groups with fewer than two scored members, or equal rewards, get
    exactly 0.
    """
    checks.choice("kind", kind, ("grpo", "dr_grpo", "rloo"))
    checks.choice("ddof", ddof, (0, 1))
    ids = checks.groups("reward", reward, group, scored)
    return _run(
        "group_advantage",
        impl,
        reward.detach(),
        ids,
        kind,
        scored,
        ddof,
        checks.nonnegative("eps", eps),
    )


class Trusted(NamedTuple):
    """What SophiaVL-R1 makes of outcomes and thinking rewards, (B,) each."""

    advantage: Tensor
    reward: Tensor
    gamma: Tensor


def trust_advantage(
    outcome: Tensor,  # (B,)
    thinking: Tensor,  # (B,)
    group: Tensor,  # (B,) int
    step: float,
    total_steps: float,
    *,
    alpha: float = 0.3,
    threshold: float = 0.5,
    trust: bool = True,
    score_wrong: bool = True,
    keep_degenerate: bool = False,
    scored: Tensor | None = None,  # (B,) bool: whose thinking reward is known
    kind: str = "grpo",
    ddof: int = 1,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Trusted:
    """Trust-GRPO (arXiv 2505.17018 eq. 1-5) from outcomes and thinking rewards to advantages, one
    walk over each group; the options are those of `trust_reward` and `group_advantage`."""
    checks.choice("kind", kind, ("grpo", "dr_grpo", "rloo"))
    checks.choice("ddof", ddof, (0, 1))
    ids = checks.groups("outcome", outcome, group, scored=None)
    weight = checks.number("alpha", alpha) * math.exp(
        -checks.nonnegative("step", step) / checks.positive("total_steps", total_steps)
    )
    checks.tensor("thinking", thinking, outcome.shape, "(B,)", checks.FULL, outcome.device)
    known = scored
    if not score_wrong:  # a thinking reward that nobody asks for may hold anything
        asked = outcome.detach().float() >= 0.2
        known = asked if scored is None else scored & asked
    checks.groups("thinking", thinking, group, known)
    out = _run(
        "trust",
        impl,
        outcome.detach(),
        thinking.detach(),
        ids,
        scored,
        weight,
        checks.number("threshold", threshold),
        bool(trust),
        bool(score_wrong),
        bool(keep_degenerate),
        kind,
        ddof,
        checks.nonnegative("eps", eps),
    )
    return Trusted(*out.unbind())


def prime_advantage(
    token_reward: Tensor,  # (B, T) or (N,)
    outcome: Tensor,  # (B,)
    group: Tensor,  # (B,) int
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "rloo",
    gamma: float = 1.0,
    ddof: int = 1,
    scored: Tensor | None = None,  # (B,) bool
    whiten: bool = False,
    verl_baseline: bool = False,
    impl: str = "auto",
) -> Tensor:  # layout of token_reward
    """PRIME (arXiv 2502.01456 eq. 5, 7, 8): discounted process return + outcome part, both against
    the group.

    A part whose std is exactly 0 (grpo), or with fewer than two scored members (rloo, grpo), is
    exactly 0. `verl_baseline` (rloo only) adds (r_t - rbar_i) / (K - 1), as the released code does.
    Unscored completions get 0.
    """
    checks.choice("form", form, ("rloo", "grpo", "reinforce"))
    checks.choice("ddof", ddof, (0, 1))
    if verl_baseline and form != "rloo":
        raise ValueError(f"verl_baseline needs form='rloo', got {form!r}")
    checks.dtype("token_reward", token_reward, checks.FULL)
    lay = checks.layout("token_reward", token_reward.shape, token_reward.device, mask, cu_seqlens)
    checks.tensor("outcome", outcome, (lay.rows,), "(B,)", checks.FULL, token_reward.device)
    ids = checks.groups("outcome", outcome, group, scored)
    flat = lay.token("token_reward", token_reward.detach())
    counted = lay.mask
    if scored is not None:
        known = scored.repeat_interleave(lay.cu.diff(), output_size=flat.numel())
        counted = known if counted is None else known & counted
    checks.finite("token_reward", flat, counted)
    out = _run(
        "prime_advantage",
        impl,
        flat,
        outcome.detach(),
        ids,
        lay.cu,
        lay.mask,
        form,
        checks.discount(gamma),
        ddof,
        scored,
        bool(whiten),
        bool(verl_baseline),
    )
    return out.reshape(lay.shape)


def credit_advantage(
    credit: Any,  # a StepCredit or TokenCredit of reasonrl.credit
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:  # layout of its tokens
    """The advantages that follow from a credit's rewards, in one call; see `reasonrl.credit`."""
    tokens = credit.tokens
    lay = checks.layout("step or token_reward", tokens.shape, tokens.device, mask, cu_seqlens)
    full = torch.float64 if credit.outcome.dtype == torch.float64 else torch.float32
    found = _run("credit_advantage", impl, credit.packed(lay, full), lay.cu, lay.mask)
    return found.reshape(lay.shape)


def returns(
    token_reward: Tensor,  # (B, T) or (N,)
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """R_t = r_t + gamma R_(t+1) within each completion; gamma counts unmasked tokens only."""
    checks.dtype("token_reward", token_reward, checks.FULL)
    lay = checks.layout("token_reward", token_reward.shape, token_reward.device, mask, cu_seqlens)
    flat = lay.token("token_reward", token_reward)
    return _run("returns", impl, flat, lay.cu, lay.mask, checks.discount(gamma)).reshape(lay.shape)


def step_reduce(
    value: Tensor,  # any token layout
    step: Tensor,  # int, shape of value; -1 = in no step
    n_steps: int,
    *,
    how: str = "sum",
    impl: str = "auto",
) -> Tensor:  # (S,)
    """Reduce the token values of each step; `last` is the last in memory order, an empty step 0
    (`prod`: 1)."""
    checks.choice("how", how, HOW)
    checks.dtype("value", value, checks.FULL)
    checks.tensor("step", step, value.shape, "the shape of value", checks.INTEGER, value.device)
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 0:
        raise ValueError(f"n_steps must be an int >= 0, got {n_steps!r}")
    ids = checks.integers("step", step, -1, n_steps).reshape(-1)
    return _run("step_reduce", impl, value.reshape(-1), ids, n_steps, how)


def step_expand(
    step_value: Tensor,  # (S,)
    step: Tensor,  # int, any shape; -1 = in no step
    *,
    where: str = "all",
    impl: str = "auto",
) -> Tensor:  # shape of step
    """Give the tokens of each step (`last`: only its last in memory order) the step's value, the
    others 0."""
    checks.choice("where", where, ("all", "last"))
    checks.dtype("step_value", step_value, checks.FULL)
    if step_value.dim() != 1:
        raise ValueError(f"step_value must be (S,), got {tuple(step_value.shape)}")
    checks.dtype("step", step, checks.INTEGER)
    checks.tensor("step", step, step.shape, "any shape", checks.INTEGER, step_value.device)
    ids = checks.integers("step", step, -1, step_value.numel()).reshape(-1)
    return _run("step_expand", impl, step_value, ids, where).reshape(step.shape)


def whiten(
    value: Tensor, *, mask: Tensor | None = None, eps: float = 1e-8, impl: str = "auto"
) -> Tensor:
    """(x - mean) / sqrt(unbiased var + eps) over the unmasked values; masked ones get 0."""
    checks.dtype("value", value, checks.FULL)
    if mask is not None:
        checks.tensor("mask", mask, value.shape, "the shape of value", checks.MASK, value.device)
        mask = (mask != 0).reshape(-1)
    eps = checks.nonnegative("eps", eps)
    return _run("whiten", impl, value.reshape(-1), mask, eps).reshape(value.shape)


def _dense(impl: str) -> str:
    """Where a credit becomes a tensor for an op that Triton has: Triton has no credits."""
    return "reference" if impl == "triton" else impl
