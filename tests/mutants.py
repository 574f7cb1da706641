"""Wrong kernels that the tests must catch: what stands in a source, what the mutant writes instead.

One list for the specification, one for the Triton kernels; test_mutants.py plants them one at a
time. `old` stands exactly once in its file, so a change of the source fails here first.
"""

# one mutant a line
# ruff: noqa: E501

from __future__ import annotations

REFERENCE = "kernels/reference.py"
SEGMENTS = "kernels/reference_segments.py"
POLICY = "kernels/policy_loss.py"
COMMON = "kernels/common.py"
LOGP = "kernels/logp.py"
HEAD = "kernels/linear_logp.py"
ONEPASS = "kernels/linear_policy_loss.py"

SPECIFICATION = [
    ("temperature missed", REFERENCE, "softcap is not None else u) / temperature", "softcap is not None else u)"),
    ("softcap not undone", REFERENCE, "(softcap * torch.tanh(u / softcap)", "(torch.tanh(u / softcap)"),
    ("entropy sign", REFERENCE, "return taken, -(p * torch", "return taken, (p * torch"),
    ("bias missed", REFERENCE, "linear(x.to(acc), w, b)", "linear(x.to(acc), w, None)"),
    ("clip ignores the lower bound", REFERENCE, "clamp(low, high)", "clamp(max=high)"),
    ("clip ignores the upper bound", REFERENCE, "clamp(low, high)", "clamp(min=low)"),
    ("clip bounds swapped", REFERENCE, "low, high = 1 - spec.clip_low, 1 + spec.clip_high", "low, high = 1 - spec.clip_high, 1 + spec.clip_low"),
    ("clip takes the max", REFERENCE, "free * advantage <= bound * advantage", "free * advantage >= bound * advantage"),
    ("tie takes the clipped branch", REFERENCE, "free * advantage <= bound * advantage", "free * advantage < bound * advantage"),
    ("delta tie is cut", REFERENCE, "torch.where(rho <= spec.delta", "torch.where(rho < spec.delta"),
    ("delta missed", REFERENCE, "if spec.delta is not None:\n        free", "if False:\n        free"),
    ("dual clip missed", REFERENCE, "(advantage < 0) & (loss > most)", "(advantage < 0) & (loss != loss)"),
    ("cispo moves its ratio", REFERENCE, "return -rho.detach().clamp(max=high)", "return -rho.clamp(max=high)"),
    ("cispo clips below", REFERENCE, "return -rho.detach().clamp(max=high)", "return -rho.detach().clamp(low, high)"),
    ("sapo one temperature", REFERENCE, "masked_fill(advantage > 0, spec.sapo_pos)", "masked_fill(advantage > 9, spec.sapo_pos)"),
    ("sapo without 4 / t", REFERENCE, "return -(4 / t) * torch.sigmoid", "return -4 * torch.sigmoid"),
    ("gmpo clips by the ratio", REFERENCE, "clamp(-spec.clip_low, spec.clip_high)", "clamp(-spec.clip_high, spec.clip_high)"),
    ("gmpo tie is cut", REFERENCE, "sign * d <= sign * clipped", "sign * d < sign * clipped"),
    ("gmpo moves at A = 0", REFERENCE, "torch.where(sign == 0, 0.0, torch.where(", "torch.where(sign == 9, 0.0, torch.where("),
    ("gmpo by the plain mean", REFERENCE, "return -_exp(mean(exponent)) * mean(advantage)", "return -_exp(mean(d)) * mean(advantage)"),
    ("sequence ratio of sums", REFERENCE, "return (total / self.count).to", "return total.to"),
    ("sequence_token moves all", REFERENCE, "mean(d.detach()) + (d - d.detach())", "mean(d)"),
    ("exponent not clamped", REFERENCE, "return x.clamp(-EXP_MAX, EXP_MAX).exp()", "return x.exp()"),
    ("k1 sign", REFERENCE, "return -r\n", "return r\n"),
    ("k2 without half", REFERENCE, "r.square() / 2 if", "r.square() if"),
    ("k3 without - r", REFERENCE, ".expm1() - r", ".expm1()"),
    ("kl weighted too", REFERENCE, "per_token = per_token + spec.kl_coef * _kl", "per_token = per_token * spec.kl_coef + _kl"),
    ("entropy sign in the loss", REFERENCE, "loss = loss - (bonus", "loss = loss + (bonus"),
    ("seq_mean forgets the empty", REFERENCE, "return 1 / (length.clamp(min=1) * (max(rows, 1)", "return 1 / (length.clamp(min=1) * (max(rows - 1, 1)"),
    ("token_mean of all tokens", REFERENCE, "keep.sum().clamp(min=1) if reduce", "keep.numel() if reduce"),
    ("denominator ignored", REFERENCE, "device=keep.device) / denominator", "device=keep.device) / keep.sum()"),
    ("nonfinite not looked for", REFERENCE, "good & torch.isfinite(x)", "good & (x == x)"),
    ("low counts both signs", REFERENCE, "good & low & (given.advantage < 0)", "good & low"),
    ("std ignores ddof", SEGMENTS, '(stat["count"] - ddof)', '(stat["count"] - 1)'),
    ("eps inside the root", SEGMENTS, "centred / (_std(centred, stat, ddof) + eps)", "centred / (_std(centred, stat, ddof) ** 2 + eps).sqrt()"),
    ("rloo of all", SEGMENTS, 'centred = value - (stat["sum"] - value)', 'centred = value - stat["sum"]'),
    ("one member is alive", SEGMENTS, "dead = (count < 2) | (top == bottom)", "dead = top != top"),
    ("unscored counted", SEGMENTS, "count, total = segment_sum(known, member, rows)", "count, total = segment_sum(known | True, member, rows)"),
    ("gamma missed", SEGMENTS, "gamma**shift * total[shift:]", "total[shift:]"),
    ("returns cross completions", SEGMENTS, "torch.where(same, gamma", "torch.where(same | True, gamma"),
    ("process baseline of all", SEGMENTS, '(process["sum"] - rbar) / others', 'process["sum"] / others'),
    ("verl term missed", SEGMENTS, "if verl_baseline:", "if False:"),
    ("outcome part missed", SEGMENTS, "returns(r, cu, keep, gamma) + value[row]", "returns(r, cu, keep, gamma)"),
    ("last is first", SEGMENTS, 'chosen = _extreme(order, step, n_steps, "amax")', 'chosen = _extreme(order, step, n_steps, "amin")'),
    ("ties go last", SEGMENTS, 'chosen = _extreme(order[hit], step[hit], n_steps, "amin")', 'chosen = _extreme(order[hit], step[hit], n_steps, "amax")'),
    ("biased variance", SEGMENTS, "(count - 1).clamp(min=1)\n    return (centred", "count.clamp(min=1)\n    return (centred"),
]  # fmt: skip

TRITON = [
    ("infinity is finite", COMMON, '(x == x) & (tl.abs(x) != float("inf"))', "x == x", "test_policy_loss and bnpo"),
    ("slope through the clamp", COMMON, "tl.where(inside, e, 0.0) - 1.0", "e", "policy_loss"),
    ("tanh of the wrong sign", COMMON, "tl.where(x < 0, -far, far)", "far", "logp"),
    ("softcap slope missed", COMMON, "softcap * tanh(a), slope", "softcap * tanh(a), 1.0", "logp"),
    ("temperature missed", COMMON, "over(s, heat, cold), ds * cold", "s, ds", "logp"),
    ("stale sum", COMMON, "return top, old * total + tl.sum(e, 0), moment", "return top, total + tl.sum(e, 0), moment", "test_logp and 300"),
    ("entropy not rescaled", COMMON, "old * (moment + shift * total)", "old * moment", "test_logp and 300"),
    ("tail columns counted", LOGP, 's = tl.where(v < vocab, s, float("-inf"))', "s = s", "logp"),
    ("target column missed", LOGP, "(tl.where(v == tl.load(target_ptr + row), 1.0, 0.0) - p)", "(0.0 - p)", "logp"),
    ("softmax term dropped", LOGP, "(tl.where(v == tl.load(target_ptr + row), 1.0, 0.0) - p)", "tl.where(v == tl.load(target_ptr + row), 1.0, 0.0)", "logp"),
    ("entropy gradient without H", LOGP, "du -= h * (plogp + p * tl.load(stats_ptr + 2))", "du -= h * plogp", "logp"),
    ("chain rule missed", LOGP, "du = tl.where(live, du * ds, 0.0)", "du = tl.where(live, du, 0.0)", "logp"),
    ("mask missed", POLICY, "keep &= tl.load(mask_ptr + i, mask=keep, other=0) != 0", "keep = keep", "policy_loss"),
    ("cispo unbounded", POLICY, "-tl.minimum(rho, high) * a\n", "-rho * a\n", "test_policy_loss and cispo"),
    ("sapo slope", POLICY, "-4.0 * s * (1.0 - s) * moving * a", "-4.0 * s * moving * a", "policy_loss"),
    ("delta missed in the slope", POLICY, "moving = tl.where(rho <= delta, moving, 0.0)", "moving = moving", "policy_loss"),
    ("clip takes the max", POLICY, "first = free * a <= clipped * a", "first = free * a >= clipped * a", "policy_loss"),
    ("dual clip missed", POLICY, "over = (a < 0) & (value > most)", "over = (a < 0) & (value != value)", "policy_loss"),
    ("k1 sign", POLICY, "value, slope = -r, 1.0 + 0.0 * r", "value, slope = r, 1.0 + 0.0 * r", "policy_loss"),
    ("k2 slope", POLICY, "value, slope = 0.5 * r * r, -r", "value, slope = 0.5 * r * r, r", "policy_loss"),
    ("k3 slope sign", POLICY, "        slope = -slope\n", "        slope = slope\n", "policy_loss"),
    ("sequence mean of a block", POLICY, "        sum_d += d\n", "        sum_d = d\n", "policy_loss"),
    ("slope not shared", POLICY, "slope = pooled + zero", "slope = slope", "policy_loss"),
    ("gmpo moves at A = 0", POLICY, "moves = (a != 0) & tl.where", "moves = tl.where", "policy_loss"),
    ("gmpo finite share", POLICY, "value, 0.0) * (fine / count)", "value, 0.0)", "policy_loss"),
    ("kl weighted", POLICY, "slope += kl_coef * dk", "slope += w * kl_coef * dk", "policy_loss"),
    ("bonus sign", POLICY, "share * value - bonus * h", "share * value + bonus * h", "policy_loss"),
    ("eta sign", POLICY, "tl.store(eta_ptr + i, -eta", "tl.store(eta_ptr + i, eta", "policy_loss"),
    ("max of the last block", POLICY, "top = tl.maximum(top, tl.where(good, rho, 0.0))", "top = tl.where(good, rho, 0.0)", "policy_loss"),
    ("share of all tokens", POLICY, "length = before[cu].diff()", "length = length", "policy_loss"),
    ("bias missed", HEAD, "if self.bias is None:\n            return self.x[rows]", "if True:\n            return self.x[rows]", "linear_logp"),
    ("bias gradient missed", HEAD, "            self.db += u.sum(0, dtype=torch.float32)\n", "            pass\n", "linear_logp"),
    ("last rows of a chunk", HEAD, "for start in range(0, n, size)]", "for start in range(0, n - size + 1, size)]", "linear_logp"),
    ("gradients of the wrong rows", HEAD, "rows = at if live.numel() == g.numel() else live[at]", "rows = at", "linear_logp"),
    ("stale dW", COMMON, "if total is None else total.add_(a @ b)", "if total is None else total.copy_(a @ b)", "linear_logp"),
    ("upstream gradient missed", COMMON, "(x * tl.load(g_ptr))", "(x)", "linear_policy"),
    ("dead rows keep their NaN", ONEPASS, "x = x.masked_fill(~live[:, None], 0.0)", "x = x", "linear_policy"),
    ("dead rows moved, not their numbers", ONEPASS, "rows = at + rows.start if isinstance(rows, slice)", "rows = at if isinstance(rows, slice)", "linear_policy"),
    ("chunks overlap", ONEPASS, "- at.start\n", "- at.start + 0 * at.stop - (at.start > 0)\n", "linear_policy"),
    ("sums of the last chunk", ONEPASS, "        sums += own\n", "        sums = own\n", "linear_policy"),
    ("dX of a chunk in the wrong rows", HEAD, "self.dx.index_copy_(0, rows, u @ self.head.w)", "self.dx.index_copy_(0, rows.flip(0), u @ self.head.w)", "linear_policy"),
    ("masked rows kept", ONEPASS, "rows = given.mask.nonzero()[:, 0]", "rows = (given.mask | True).nonzero()[:, 0]", "linear_policy"),
]  # fmt: skip
