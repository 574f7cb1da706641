"""What five published systems compute, as pure functions of numbers; who calls the models is not
said here.

SophiaVL-R1 (arXiv 2505.17018 eq. 1-5): trust_weight, trust_reward. ReasonFlux-PRM (2506.18896 eq.
11, 12): reasonflux_*. Libra (2507.21645): libra_reward, dpo_loss. PRIME (2502.01456 eq. 3 and the
CE loss): implicit_*; its advantage is `reasonrl.advantage.prime_advantage`. MeRF has no formula of
its own: see `reasonrl.reward_spec`. Left out: parsing of replies, prompts, schedules other than the
papers' own. Legend: B completions, T tokens, N packed tokens, S steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl import checks, ops


def trust_weight(
    outcome: Tensor,  # (B,)
    thinking: Tensor,  # (B,)
    group: Tensor,  # (B,) int
    *,
    threshold: float = 0.5,
    scored: Tensor | None = None,  # (B,) bool: whose thinking reward is known
) -> Tensor:  # (B,)
    """gamma of each group: 1 where mu_c >= mu_w, else exp(mu_c - mu_w).

    mu_c, mu_w: mean thinking reward of the right (outcome >= threshold, in float32) and the wrong
    completions; 1 where either is empty.
    """
    return ops.trust_advantage(
        outcome, thinking, group, 0, 1, threshold=threshold, scored=scored
    ).gamma


def trust_reward(
    outcome: Tensor,  # (B,)
    thinking: Tensor,  # (B,) in [0, 1]
    group: Tensor,  # (B,) int
    step: float,
    total_steps: float,
    *,
    alpha: float = 0.3,
    score_wrong: bool = True,
    keep_degenerate: bool = False,
    trust: bool = True,
    scored: Tensor | None = None,  # (B,) bool: whose thinking reward is known
) -> Tensor:  # (B,)
    """R = outcome + gamma alpha exp(-step / total_steps) thinking; gamma from `trust_weight`.

    trust=False: gamma is 1 (the paper's ablation). score_wrong=False (the released code): where
    outcome < 0.2, thinking is taken as a known 0. Unknown thinking rewards become the mean of the
    known ones of their group. Groups all right (>= 0.9) or all wrong (<= 0.1) get no thinking
    reward unless keep_degenerate. `ops.trust_advantage` gives reward and advantage in one go.
    """
    return ops.trust_advantage(
        outcome,
        thinking,
        group,
        step,
        total_steps,
        alpha=alpha,
        score_wrong=score_wrong,
        keep_degenerate=keep_degenerate,
        trust=trust,
        scored=scored,
    ).reward


def reasonflux_step_target(align: Tensor, quality: Tensor, coherence: Tensor) -> Tensor:
    """sum_k w_k x_k over the three scores x of a step, w = softmax(x); any one shape."""
    scores = (("align", align), ("quality", quality), ("coherence", coherence))
    for name, score in scores:
        checks.tensor(name, score, align.shape, "the shape of align", checks.FULL, align.device)
    x = torch.stack([align, quality, coherence], -1)
    return (torch.softmax(x, -1) * x).sum(-1)


def reasonflux_score(
    step_scores: Tensor,  # (S,) one completion, or (B, S) with mask
    final_score: Tensor | float,  # 0-d or a number, or (B,)
    *,
    alpha: float = 1.0,
    mask: Tensor | None = None,  # shape of step_scores
) -> Tensor:  # 0-d or (B,)
    """Mean of the steps + alpha * final (eq. 11); a completion without steps has mean 0."""
    checks.dtype("step_scores", step_scores, checks.FULL)
    if step_scores.dim() not in (1, 2):
        raise ValueError(f"step_scores must be (S,) or (B, S), got {tuple(step_scores.shape)}")
    keep = torch.ones_like(step_scores, dtype=torch.bool)
    if mask is not None:
        shape, device = step_scores.shape, step_scores.device
        checks.tensor("mask", mask, shape, "the shape of step_scores", checks.MASK, device)
        keep = mask != 0
    final = torch.as_tensor(final_score, dtype=step_scores.dtype, device=step_scores.device)
    rows = step_scores.shape[:-1]
    if final.shape != rows:
        raise ValueError(f"final_score must be {tuple(rows)}, got {tuple(final.shape)}")
    mean = torch.where(keep, step_scores, 0.0).sum(-1) / keep.sum(-1).clamp(min=1)
    return mean + alpha * final


def reasonflux_reward(outcome: Tensor, score: Tensor, *, beta: float = 0.75) -> Tensor:  # (B,)
    """(1 - beta) outcome + beta score (eq. 12)."""
    checks.dtype("outcome", outcome, checks.FULL)
    checks.tensor("score", score, outcome.shape, "(B,)", checks.FULL, outcome.device)
    return (1 - beta) * outcome + beta * score


def libra_reward(
    verdict: Tensor,  # (B,) 0, 1 or NaN = unparsable
    label: Tensor,  # (B,) 0 or 1
    length: Tensor,  # (B,) tokens of the judgement
    *,
    l_exp: float,
    l_max: float,
) -> Tensor:  # (B,)
    """1[verdict == label] - clip((length - l_exp) / (l_max - l_exp), 0, 1); l_max == l_exp: a step
    at l_exp."""
    kinds = (*checks.MASK, *checks.FULL)
    checks.dtype("verdict", verdict, kinds)
    verdict = verdict if verdict.is_floating_point() else verdict.float()
    for name, x in (("label", label), ("length", length)):
        checks.tensor(name, x, verdict.shape, "(B,)", kinds, verdict.device)
    if not l_exp <= l_max:
        raise ValueError(f"l_max must be >= l_exp = {l_exp}, got {l_max}")
    if checks.values_checked(verdict):
        for name, x in (("verdict", verdict[~verdict.isnan()]), ("label", label)):
            if bool(((x != 0) & (x != 1)).any()):
                wrong = x[(x != 0) & (x != 1)][0].item()
                raise ValueError(f"{name} must hold 0 and 1, got {wrong}")
    over = length.to(verdict.dtype) - l_exp
    share = (over / (l_max - l_exp)).clamp(0, 1) if l_max > l_exp else (over > 0).to(over.dtype)
    return (verdict == label).to(verdict.dtype) - share


def dpo_loss(
    logp_chosen: Tensor,  # (P,) sums over the completion
    ref_chosen: Tensor,
    logp_rejected: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:  # 0-d
    """mean of -log sigmoid(beta ((chosen - its ref) - (rejected - its ref))) (arXiv 2305.18290 eq.
    7)."""
    checks.dtype("logp_chosen", logp_chosen, checks.FULL)
    given = {"ref_chosen": ref_chosen, "logp_rejected": logp_rejected, "ref_rejected": ref_rejected}
    for name, x in given.items():
        checks.tensor(name, x, logp_chosen.shape, "(P,)", checks.FULL, logp_chosen.device)
    margin = beta * ((logp_chosen - ref_chosen) - (logp_rejected - ref_rejected))
    return -torch.nn.functional.logsigmoid(margin).sum() / max(margin.numel(), 1)


def implicit_reward(
    logp: Tensor,  # (B, T) or (N,)
    ref_logp: Tensor,
    *,
    beta: float = 0.05,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # layout of logp
    """beta (logp - ref_logp) of every unmasked token, 0 at the others (eq. 3)."""
    lay, keep = _tokens(logp, ref_logp, mask, cu_seqlens)
    return _log_ratio(lay, keep, logp, ref_logp, beta).reshape(lay.shape)


def implicit_prm_loss(
    logp: Tensor,  # (B, T) or (N,)
    ref_logp: Tensor,
    outcome: Tensor,  # (B,) in [0, 1]
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.05,
) -> Tensor:  # 0-d
    """mean over completions of BCE(sigmoid(sum_t beta (logp - ref_logp)), outcome); soft outcomes
    allowed."""
    lay, keep = _tokens(logp, ref_logp, mask, cu_seqlens)
    checks.tensor("outcome", outcome, (lay.rows,), "(B,)", checks.FULL, logp.device)
    if checks.values_checked(outcome) and bool((~((outcome >= 0) & (outcome <= 1))).any()):
        wrong = outcome[~((outcome >= 0) & (outcome <= 1))][0].item()
        raise ValueError(f"outcome must lie in [0, 1], got {wrong}")
    token = _log_ratio(lay, keep, logp, ref_logp, beta)
    row = torch.arange(lay.rows, device=logp.device)
    row = row.repeat_interleave(lay.cu.diff(), output_size=token.numel())
    total = torch.zeros(lay.rows, dtype=torch.float64, device=logp.device)
    total = total.index_add(0, row, token.double())
    each = torch.nn.functional.softplus(total) - outcome.detach() * total
    return (each.sum() / max(lay.rows, 1)).to(logp.dtype)


def _tokens(
    logp: Tensor, ref_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[checks.Layout, Tensor | None]:
    checks.dtype("logp", logp, checks.FULL)
    lay = checks.layout("logp", logp.shape, logp.device, mask, cu_seqlens)
    lay.token("ref_logp", ref_logp)
    return lay, lay.mask


def _log_ratio(
    lay: checks.Layout, keep: Tensor | None, logp: Tensor, ref_logp: Tensor, beta: float
) -> Tensor:  # (N,)
    own, ref = lay.token("logp", logp), lay.token("ref_logp", ref_logp).detach()
    if keep is not None:
        own, ref = torch.where(keep, own, 0.0), torch.where(keep, ref, 0.0)
    return (own - ref).mul_(beta)  # in place: a second array of this size costs more than the sum
