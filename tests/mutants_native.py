"""Wrong C++ and CUDA kernels that the tests must catch; see mutants.py and test_mutants_native.py.

A mutant: name, source, what stands there once, what is written instead, which tests to try (for the
CPU a `-k` expression of test_native and its parts, test_parity, test_credit, test_trust; for CUDA a part
of the cases' names).
"""

# one mutant a line
# ruff: noqa: E501

from __future__ import annotations

MATH = "csrc/math.h"
POLICY = "csrc/cpu/policy.cpp"
LOGP = "csrc/cpu/logp.cpp"
SEGMENTS = "csrc/cpu/segments.cpp"
CREDIT = "csrc/cpu/credit.cpp"
WALK = "csrc/cpu/credit.h"
SCAN = "csrc/cpu/scan.h"
STEPS = "csrc/cpu/steps.cpp"
TRUST = "csrc/cpu/trust.cpp"
GROUPS = "csrc/cpu/groups.h"
WHITEN = "csrc/cpu/whiten.cpp"
SLOTS = "csrc/cpu/slots.cpp"
SOFTMAX = "csrc/cpu/softmax.cpp"
LAYERS = "csrc/cpu/layers.cpp"
ROTARY = "csrc/cpu/rotary.cpp"
TURN = "csrc/cpu/rotary.h"
BLOCKS = "csrc/cpu/blocks.cpp"
DRAW = "csrc/cpu/draw.cpp"

CPU = [
    ("clip tie takes the clipped branch", MATH, "select((used == rho)", "select((used == rho) & (rho < s.high)", "policy_loss"),
    ("delta missed", MATH, "min_of(rho, all_of<F>(s.delta))", "rho", "policy_loss"),
    ("dual clip missed", MATH, "min_of(upper, all_of<F>(s.dual))", "upper", "policy_loss"),
    ("slope through the clamp", MATH, "(used == rho) & (x == d)", "(used == rho)", "policy_loss"),
    ("cispo unbounded", MATH, "-min_of(rho, all_of<F>(s.high)) * advantage;", "-rho * advantage;", "policy_loss"),
    ("sapo without its derivative", MATH, "-4.0f * up * down * rho * advantage", "-4.0f * up * rho * advantage", "policy_loss"),
    ("gmpo tie is cut", MATH, "const auto first = (up & (d <= clipped)) | (down & (d >= clipped));", "const auto first = (up & (d < clipped)) | (down & (d > clipped));", "policy_loss"),
    ("k1 sign", MATH, "return kl == K1 ? -r :", "return kl == K1 ? r :", "policy_loss"),
    ("k2 slope", MATH, "(kl == K2 ? -r : k3_grad)", "(kl == K2 ? r : k3_grad)", "policy_loss"),
    ("k3 cancels near 0", MATH, "select(near, rest, out.less_one - x);", "out.less_one - x;", "policy_loss"),
    ("k3 slope cancels near 0", MATH, "select(near, low, out.e - 1.0f);", "out.e - 1.0f;", "policy_loss"),
    ("exp one bit off", MATH, "1.6666665459e-1f * f + 5.0000001201e-1f", "1.6666665459e-1f * f + 5.001e-1f", "policy_loss or logp"),
    ("mask missed", POLICY, "in.mask[at + j] ? -1 : 0", "-1", "policy_loss or core or mask"),
    ("nonfinite advantage let through", POLICY, "(0.0f * a + 0.0f * f)", "(0.0f * f)", "policy_loss or nonfinite"),
    ("weight missed in the gradient", POLICY, ", term.grad = t.weight * term.grad;", ";", "policy_loss"),
    ("kl slope missed", POLICY, "(own + coef * where(t.good, slope)) * scale", "own * scale", "policy_loss"),
    ("completion's count missed", POLICY, "in.per_completion ? in.divisor * count : in.divisor", "in.divisor", "policy_loss"),
    ("shared part of another completion", POLICY, "sum_of(sums.moved) / count * whole.scale", "sum_of(sums.moved) * whole.scale", "policy_loss"),
    ("entropy sign", POLICY, "loss.entropy_coef * sum_of(s.entropy)", "-loss.entropy_coef * sum_of(s.entropy)", "policy_loss"),
    ("last lanes forgotten", POLICY, "if (j == s.n) return;", "return;", "policy_loss or core"),
    ("entropy gradient of the last lanes lost", POLICY, "if (s.grad_entropy) memcpy(out[1], s.grad_entropy + j, left * sizeof(float));", "", "policy_loss"),
    ("tail block forgotten", POLICY, "(item.end - item.start + SPAN - 1) / SPAN", "(item.end - item.start) / SPAN", "policy_loss or core"),
    ("maximum of the last item", POLICY, "if (part[SUM_RATIO_MAX] > out.sums[SUM_RATIO_MAX])", "if (true)", "policy_loss"),
    ("temperature missed", LOGP, "u[j] = u[j] / tau;", "u[j] = u[j];", "logp"),
    ("softcap slope missed", LOGP, "grad[j] /= tau;", "grad[j] = 1.0f / tau;", "logp"),
    ("target column missed", LOGP, "write<DTYPE>(out, out_row * logits.vocab + target, 1, &at_target);", "", "logp"),
    ("entropy gradient without H", LOGP, "c1 + h1 * (x + whole)", "c1 + h1 * x", "logp"),
    ("gradient misses the temperature", LOGP, "1.0f / logits.temperature, c1", "1.0f, c1", "logp"),
    ("sums of the last block", LOGP, "total = merge(total, LogSumExp{m, s, q});", "total = LogSumExp{m, s, q};", "logp"),
    ("unscored counted", GROUPS, "if (!scored || scored[b]) member.push_back(b);", "member.push_back(b);", "group"),
    ("std ignores ddof", SEGMENTS, "std::max((double)n - ddof, 1.0)", "std::max((double)n, 1.0)", "group"),
    ("rloo of all", SEGMENTS, "(sum - r) / (double)(n - 1) : mean", "sum / (double)n : mean", "group"),
    ("ties go last", SEGMENTS, "smallest ? x < best : x > best", "smallest ? x <= best : x >= best", "step"),
    ("process baseline of all", CREDIT, "a = {1.0, -(sum - own) / others}", "a = {1.0, -sum / others}", "tokens or prime"),
    ("verl term missed", CREDIT, "a.scale += 1.0 / others;", "a.scale += 0.0;", "tokens or prime"),
    ("unknown completions left as they were", CREDIT, "if (!out.relative[b].known) ops()", "if (false) ops()", "tokens or prime"),
    ("a group's first alone is walked", CREDIT, "ops().walk_credit(credit, member, n, advantage, inside);", "ops().walk_credit(credit, member, 1, advantage, inside);", "tokens or prime"),
    ("places of all groups together", CREDIT, "id[b] * places + (s - in.step_cu[b])", "(s - in.step_cu[b])", "steps"),
    ("steps not shared out", CREDIT, "out.value[s] = in.process_weight * worth[s] / share;", "out.value[s] = in.process_weight * worth[s];", "steps"),
    ("outcome weight missed", CREDIT, "{in.outcome_weight * outcome[b], 0.0, 0.0, true}", "{outcome[b], 0.0, 0.0, true}", "steps"),
    ("carry lost between blocks", WALK, "in.gamma, worth, carry, out);", "in.gamma, worth, 0.0, out);", "core"),
    ("mean of a step by one too many", SEGMENTS, "run.value / (double)run.tokens", "run.value / (double)(run.tokens + 1)", "step"),
    ("a chunk's end splits a step", SEGMENTS, "join(open, first, product);", "open = first;", "step"),
    ("a step's last run alone", SEGMENTS, "join(all[run.step], run, product);", "all[run.step] = run;", "step"),
    ("next run summed too", STEPS, "number < n - k ? load_wide(value + k) : nothing", "load_wide(value + k)", "step"),
    ("last values left out", STEPS, "all[0] + rest", "all[0]", "step"),
    ("runs end with the chunk", STEPS, "bits |= (uint64_t)last << k;", "bits |= (uint64_t)(at + k + 1 == stop) << k;", "step"),
    ("step paid at every token", WALK, "if (step[j] == following) continue;", "", "steps or core"),
    ("masked step pays", WALK, "in.mask ? in.mask + at + start : nullptr", "nullptr", "steps or core"),
    ("carry of the wrong lane", SCAN, "return by < 0 ? x[0] : x[WIDE - 1];", "return by < 0 ? x[WIDE - 1] : x[0];", "returns or tokens"),
    ("masked token discounts", SCAN, "factor = on ? discount : one;", "factor = discount;", "returns or tokens"),
    ("half of a scan", SCAN, "gather<BY, 2>(x, factor);", "", "returns or tokens"),
    ("half of an even scan", SCAN, "x += g2 * moved<-2 * BY>(x, Wide{});", "", "returns or tokens"),
    ("masked token pays", SCAN, "x = (Wide)((WideI)x & on);", "", "returns or tokens"),
    ("wrong thinking trusted", TRUST, "std::min(right.value() - wrong.value(), 0.0)", "0.0", "trust or formula"),
    ("trust above one", TRUST, "std::min(right.value() - wrong.value(), 0.0)", "right.value() - wrong.value()", "trust or formula"),
    ("unasked left out of the mean", TRUST, "return unasked || !in.known || in.known[b];", "return !unasked && (!in.known || in.known[b]);", "trust or formula"),
    ("threshold missed by its value", TRUST, ">= in.threshold ?", "> in.threshold ?", "float32"),
    ("saturated group thinks", TRUST, "return right || wrong;", "return wrong;", "trust or formula"),
    ("unknown thinking is nought", TRUST, "value = every.value();", "value = 0.0;", "trust or formula"),
    ("alpha missed", TRUST, "(double)weight * in.weight *", "(double)weight *", "trust or formula"),
    ("groups of neighbours", GROUPS, "std::stable_sort(member.begin(), member.end(), before);", "", "trust or formula or group"),
    ("biased variance", WHITEN, "all.count > 2.0 ? all.count - 1.0 : 1.0", "all.count > 2.0 ? all.count : 1.0", "whiten or prime"),
    ("scores not scaled", SLOTS, "q[c] * t.scaling", "q[c]", "slots or row"),
    ("places behind the length weigh", SLOTS, "s.weight[h * room + at + j] = -FLT_MAX;", "s.weight[h * room + at + j] = 0.0f;", "slots or row"),
    ("the new key goes one place before", SLOTS, "t.cos, keys, n, s);", "t.cos, keys, n ? n - 1 : 0, s);", "slots or row"),
    ("the new value is left out", SLOTS, "put<DTYPE>(t.v, t.v_dtype, row * t.v_stride + head * t.size, false, values, n, s);", "", "slots or row"),
    ("a score that is not finite is let through", SLOTS, "(double)sum[k] + (double)broken[k]", "(double)sum[k]", "slots or row"),
    ("query heads of another key head", SLOTS, "head * group + g", "head + g", "slots or row"),
    ("values of the last places alone", SLOTS, "sum[h] = load(s.out.data() + h * s.padded + c);", "sum[h] = Vec{};", "slots or row"),
    ("every other lane", SLOTS, "+ every_second<1>(a, b, lanes)", "+ every_second<0>(a, b, lanes)", "slots or row"),
    ("another row behind the last place", SLOTS, "memset(s.block.data() + n * s.size, 0, LANES * sizeof(float));", "", "slots or row"),
    ("softmax not scaled", SOFTMAX, "where(on, load(row + j) * scaling)", "where(on, load(row + j))", "softmax"),
    ("what is not seen weighs", SOFTMAX, "load_bits(seen + j) & (x > LOWEST)", "(x > LOWEST)", "softmax"),
    ("one head's weights", SOFTMAX, "(b * t.heads + h) * t.queries + r) * t.width;", "(b * t.heads) * t.queries + r) * t.width;", "softmax"),
    ("the first mask for all", SOFTMAX, "t.shared ? r : i", "r", "softmax"),
    ("a broken score is let through", SOFTMAX, "(total_of(sum) + total_of(broken))", "total_of(sum)", "score"),
    ("softmax gradient without its mean", SOFTMAX, "(load(&g[j]) - mean)", "load(&g[j])", "softmax"),
    ("softmax gradient not scaled", SOFTMAX, "t.scaling * load(&p[j])", "load(&p[j])", "softmax"),
    ("norm without eps", LAYERS, "(float)t.width + t.eps", "(float)t.width", "norm"),
    ("norm of a sum, not a mean", LAYERS, "sqrtf(total_of(sum) / (float)t.width", "sqrtf(total_of(sum)", "norm"),
    ("normalised input not rounded", LAYERS, "if (task.x_dtype == F32) return;", "return;", "norm"),
    ("norm gradient without its mean", LAYERS, "load(&row.x[j]) * mean", "0.0f * mean", "norm"),
    ("norm gradient not scaled", LAYERS, "scale * (load(&row.w[j])", "(load(&row.w[j])", "norm"),
    ("weight gradient of the last row", LAYERS, "load(&part[j]) + load(&row.g[j])", "load(&row.g[j])", "norm"),
    ("weight gradient of the first chunk", LAYERS, "parts[c * padded + j]", "parts[j]", "norm"),
    ("last rows without a gradient", LAYERS, "(t.rows + CHUNK - 1) / CHUNK", "t.rows / CHUNK", "norm"),
    ("gate not multiplied", LAYERS, "g * sigmoid(g) * load(up + j)", "sigmoid(g) * load(up + j)", "swiglu"),
    ("slope of the gate alone", LAYERS, "(1.0f + g * (1.0f - s))", "1.0f", "swiglu"),
    ("gradients of gate and up change places", LAYERS, "store(up + j, d * g * s);", "store(up + j, load(gate + j));", "swiglu"),
    ("last gates left out", LAYERS, "(t.width + SPAN - 1) / SPAN", "t.width / SPAN", "swiglu or gate"),
    ("gates of the row before", LAYERS, "read_any(t.dtype, t.gate, row * t.stride + at", "read_any(t.dtype, t.gate, row * t.width + at", "gate"),
    ("results where the inputs stand", LAYERS, "write_any(t.dtype, out, row * t.width + at", "write_any(t.dtype, out, row * t.stride + at", "gate"),
    ("the residual is left out", LAYERS, "load(&row.x[j]) + load(&row.g[j]));\n        }\n        row.round", "load(&row.x[j]));\n        }\n        row.round", "residual"),
    ("a sum that is not rounded", LAYERS, "        row.round(row.x.data());\n        write_any(t.x_dtype, added.sum", "        write_any(t.x_dtype, added.sum", "residual"),
    ("the sum's own gradient is left out", LAYERS, "if (d.grad_sum) {", "if (false) {", "residual or alone"),
    ("no gradient by what was added", LAYERS, "if (d.grad_delta) write_any", "if (false) write_any", "residual"),
    ("turned the other way", TURN, "p * cos[j] - q * sin[j]", "p * cos[j] + q * sin[j]", "rotary"),
    ("the second half as the first", TURN, "q * cos[j + half] + p * sin[j + half]", "p * cos[j + half] + q * sin[j + half]", "rotary"),
    ("turned forward again", TURN, "BACK ? p * cos[j] + q * sin[j + half]", "BACK ? p * cos[j] - q * sin[j + half]", "rotary"),
    ("half of a head turned", TURN, "half = (int64_t)angle.cos.size() / 2", "half = (int64_t)angle.cos.size() / 4", "rotary"),
    ("keys as far apart as queries", ROTARY, "keys ? t.k_stride : t.q_stride", "t.q_stride", "rotary"),
    ("the first head alone", ROTARY, "h < width; h += t.size", "h < t.size; h += t.size", "rotary"),
    ("the first row's angles", ROTARY, "angle.read(t.angle_dtype, t.cos, t.sin, i);", "angle.read(t.angle_dtype, t.cos, t.sin, 0);", "rotary"),
    ("the first row's angles in a slot", SLOTS, "s.angle.read(t.angle_dtype, t.cos, t.sin, row)", "s.angle.read(t.angle_dtype, t.cos, t.sin, 0)", "slots or row"),
    ("a key goes to its slot unturned", SLOTS, "head * t.size, t.cos, keys, n, s);", "head * t.size, false, keys, n, s);", "slots or row"),
    ("a turned query is not rounded", SLOTS, "if (dtype == F32) return;", "return;", "slots or row"),
    ("gradients with no rows between", LAYERS, "d.grad_up, row * d.stride + at", "d.grad_up, row * t.width + at", "again"),
    ("SwiGLU made again without its gate", LAYERS, "store(by + j, g * s * u);", "store(by + j, s * u);", "again"),
    ("SwiGLU of every row in the first", LAYERS, "d.again, row * t.width + at", "d.again, at", "again"),
    ("a norm made again without its weight", LAYERS, "store(&row.x[j], load(&row.w[j]) * load(&row.x[j]));", "store(&row.x[j], load(&row.x[j]));", "again"),
    ("norms of every row in the first", LAYERS, "d.again, i * t.width, t.width", "d.again, 0, t.width", "again"),
    ("heads of no token are left as they were", BLOCKS, "memset(out, 0, bytes);", "", "packed or unturned"),
    ("blocks of another head", BLOCKS, "((n * t.heads + h) * t.width + w) * t.size;\n                char", "((n * t.heads) * t.width + w) * t.size;\n                char", "packed or unturned"),
    ("heads not turned", BLOCKS, "turn<false>(heads.data() + h * t.size, angle);", "", "packed"),
    ("the first row's angles in a block", BLOCKS, "angle.read(t.angle_dtype, t.cos, t.sin, row);\n                read_any", "angle.read(t.angle_dtype, t.cos, t.sin, 0);\n                read_any", "packed"),
    ("rows that stand together", BLOCKS, "(row * t.stride + h * t.size) * item", "(row * t.heads * t.size + h * t.size) * item", "packed or unturned"),
    ("the last place alone", BLOCKS, "into[j] += head[j]", "into[j] = head[j]", "packed or unturned"),
    ("every place in the first tensor", BLOCKS, "const int64_t part = t.place[e] & 1,", "const int64_t part = 0,", "packed"),
    ("gradients not turned back", BLOCKS, "turn<true>(sum.data() + h * t.size, angle);", "{}", "packed"),
    ("the sum of the row before", BLOCKS, "std::fill(sum.begin(), sum.end(), 0.0f);", "{}", "unturned"),
    ("sums that stand together", BLOCKS, "t.out, row * t.stride, t.heads * t.size", "t.out, row * t.heads * t.size, t.heads * t.size", "packed"),
    ("drawn without its temperature", DRAW, "x[j] /= task.temperature;", "x[j] += 0.0f;", "uniform or choose"),
    ("drawn with the inverse of its temperature", DRAW, "x[j] /= task.temperature;", "x[j] *= task.temperature;", "uniform or choose"),
    ("words behind the end may be drawn", DRAW, "x[j] = -INFINITY;", "x[j] = 0.0f;", "uniform or choose or often"),
    ("a block's own sum for the sum so far", DRAW, "ends[b] = total;", "ends[b] = total - (b ? ends[b - 1] : 0.0);", "uniform or choose"),
    ("a block begins at nothing", DRAW, "block ? ends[block - 1] : 0.0", "0.0 * block", "uniform or choose"),
    ("the first block alone", DRAW, "block * BLOCK + at;", "at;", "uniform or choose"),
    ("a word without weight is drawn", DRAW, "if (!(x[j] > 0.0f)) continue;", "", "uniform or often"),
    ("a uniform number of 1 for all", DRAW, "task.uniform[row] * total", "0.5 * total", "uniform or often"),
    ("log p of the weight alone", DRAW, "(y[at] - top) - log(total)", "(y[at] - top)", "uniform"),
    ("not a number is let through", DRAW, "broken |= ~(v < Vec{} + INFINITY);", "", "distribution"),
    ("nothing possible is let through", DRAW, "return top == -INFINITY ? NAN : top;", "return top;", "distribution"),
    ("values as far apart as if alone", SLOTS, "row * t.v_stride + head * t.size", "i * t.size", "slots or row"),
]  # fmt: skip

DEVICE = "csrc/cuda/device.h"
CUDA_POLICY = "csrc/cuda/policy.cu"
CUDA_CREDIT = "csrc/cuda/credit.h"
CUDA_SEGMENTS = "csrc/cuda/segments.cu"
CUDA_TOKENS = "csrc/cuda/tokens.h"

CUDA = [
    ("block sum of one warp", DEVICE, "for (int w = 1; w < WARPS; w++) x[k]", "for (int w = 1; w < 1; w++) x[k]", "policy"),
    ("maximum summed", DEVICE, "if (top) return b > a ? b : a;", "if (false) return b > a ? b : a;", "policy"),
    ("carry of the first warp", DEVICE, "if (w == warp) entering = *carry;", "", "returns"),
    ("ticket not reset", DEVICE, "if (last[0]) *arrived = 0;", "", "policy"),
    ("mask missed", CUDA_TOKENS, "return i < end && (task.mask == nullptr || task.mask[i] != 0);", "return i < end;", "policy"),
    ("weight missed", CUDA_POLICY, "                term.grad *= t.weight;\n", "", "policy"),
    ("weight of a completion missed", CUDA_POLICY, "term.grad *= t.weight;\n        return term;", "return term;", "policy"),
    ("kl slope missed", CUDA_POLICY, "c = (term.grad + loss.kl_coef * slope) * share;", "c = term.grad * share;", "policy"),
    ("kl slope of a completion missed", CUDA_POLICY, "c = ((shared ? 0.0f : term.grad) + loss.kl_coef * slope) * (float)scale.loss;", "c = (shared ? 0.0f : term.grad) * (float)scale.loss;", "policy"),
    ("tokens between two reads", CUDA_POLICY, "first < end; first += AHEAD * THREADS) {", "first < end; first += (AHEAD + 1) * THREADS) {", "policy"),
    ("tokens of a completion between two reads", CUDA_POLICY, "first < s.end; first += AHEAD * THREADS) {", "first < s.end; first += (AHEAD + 1) * THREADS) {", "policy"),
    ("few tokens not gathered", CUDA_TOKENS, "    all->ratio += few.ratio;\n", "    all->ratio = few.ratio;\n", "policy"),
    ("share of the whole batch", CUDA_POLICY, "const float part = (float)(x[SUM_COUNT] / count * scale.loss);", "const float part = (float)(x[SUM_COUNT] * scale.loss);", "policy"),
    ("count of all tokens", CUDA_POLICY, "n[0] += task.mask[i] != 0 ? 1.0 : 0.0;", "n[0] += 1.0;", "policy"),
    ("last chunk cut", CUDA_POLICY, "return plain ? (tokens + CHUNK - 1) / CHUNK : batch;", "return plain ? tokens / CHUNK : batch;", "policy"),
    ("one member of a group", CUDA_POLICY, "j < task.batch; j = next_member(", "j < b + 1; j = next_member(", "credit"),
    ("every block leads", CUDA_CREDIT, "return earlier[0] == 0.0;", "return true;", "credit"),
    ("unscored steps counted", CUDA_CREDIT, "if (is_known(c.step_scored, s)) f((double)c.step_reward[s]);", "f((double)c.step_reward[s]);", "credit"),
    ("process baseline of all", CUDA_CREDIT, "-(g.sum - own) / (g.count - 1.0)", "-g.sum / (g.count - 1.0)", "credit"),
    ("masked tokens in the mean", CUDA_CREDIT, "if (mask && !mask[i]) continue;", "", "credit"),
    ("steps not shared out", CUDA_CREDIT, "const double share = c.divide ? (double)steps : 1.0;", "const double share = 1.0;", "credit"),
    ("a step ends at every token", CUDA_CREDIT, "const bool ends = i + 1 == end || c.step[i + 1] != step;", "const bool ends = true;", "credit"),
    ("gamma missed", CUDA_CREDIT, "run = after(run, {c.gamma, worth});", "run = after(run, {1.0, worth});", "credit"),
    ("what enters a thread is not discounted", CUDA_CREDIT, "upto[k].a * entering + upto[k].b", "entering + upto[k].b", "credit"),
    ("returns forget the mask", CUDA_SEGMENTS, "if (on[k]) run = after(run, {gamma, (double)reward[i]});", "run = after(run, {gamma, (double)reward[i]});", "returns"),
    ("std ignores ddof", CUDA_SEGMENTS, "const double freedom = n - ddof > 1.0 ? n - ddof : 1.0;", "const double freedom = n;", "group"),
    ("first of a step", CUDA_SEGMENTS, "if (s.how == STEP_LAST) best.at = n > 0 ? s.token(end - 1) : -1;", "if (s.how == STEP_LAST) best.at = n > 0 ? s.token(start) : -1;", "step"),
    ("an order that is not there", CUDA_SEGMENTS, "return order == nullptr ? k : order[k];", "return order == nullptr ? k + 1 : order[k];", "step"),
]  # fmt: skip
