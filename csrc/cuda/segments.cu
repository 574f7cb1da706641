// Token counts, group advantages, returns and steps on a GPU. No atomics: the same bits in every
// run.
#include "device.h"

#include "../ops.h"
#include "launch.h"

namespace reasonrl {
namespace {

__global__ void count_kernel(const uint8_t* mask, const int64_t* cu, int64_t* counts) {
    SHARED(double, slots, WARPS);
    double x[1] = {};
    for (int64_t i = cu[blockIdx.x] + threadIdx.x; i < cu[blockIdx.x + 1]; i += THREADS) {
        x[0] += mask[i] != 0 ? 1.0 : 0.0;
    }
    block_sums<1>(x, slots);
    if (threadIdx.x == 0) counts[blockIdx.x] = (int64_t)x[0];
}

// A block per completion looks through all rewards for those of its group: no sort, any ids.
__global__ void group_kernel(const float* reward, const int64_t* group, const uint8_t* scored,
                             int64_t batch, int kind, double ddof, double eps, float* out) {
    SHARED(double, slots, WARPS * 3);
    const int64_t b = blockIdx.x;
    const bool known = scored == nullptr || scored[b] != 0;
    const double own = known ? (double)reward[b] : 0.0;
    double x[3] = {};  // members, their sum, how many differ from this one
    for (int64_t j = threadIdx.x; j < batch; j += THREADS) {
        if (group[j] != group[b] || (scored && !scored[j])) continue;
        x[0] += 1.0;
        x[1] += reward[j];
        x[2] += reward[j] != reward[b] ? 1.0 : 0.0;
    }
    block_sums<3>(x, slots);
    const double n = x[0], mean = n > 0.0 ? x[1] / n : 0.0;
    double square[1] = {};
    for (int64_t j = threadIdx.x; j < batch; j += THREADS) {
        if (group[j] != group[b] || (scored && !scored[j])) continue;
        square[0] += (reward[j] - mean) * (reward[j] - mean);
    }
    block_sums<1>(square, slots);
    if (threadIdx.x != 0) return;
    const bool dead = !known || n < 2.0 || x[2] == 0.0;
    const double freedom = n - ddof > 1.0 ? n - ddof : 1.0;
    const double scale = kind == GROUP_GRPO ? sqrt(square[0] / freedom) + eps : 1.0;
    const double base = kind == GROUP_RLOO && n > 1.0 ? (x[1] - own) / (n - 1.0) : mean;
    out[b] = dead ? 0.0f : (float)((own - base) / scale);
}

constexpr int RUN = 4;  // neighbouring tokens of a thread

// A block per completion walks it in tiles of 1024 tokens, from the end (or, forward, from the
// start).
__global__ void returns_kernel(const float* reward, const int64_t* cu, const uint8_t* mask,
                               double gamma, int forward, float* out) {
    SHARED(Affine, totals, WARPS);
    const int64_t start = cu[blockIdx.x], end = cu[blockIdx.x + 1];
    double carry = 0.0;
    for (int64_t tile = 0; tile < end - start; tile += RUN * THREADS) {
        const int64_t first = tile + RUN * threadIdx.x;
        Affine upto[RUN];  // this thread's tokens up to each of its own
        bool on[RUN];
        Affine run = {1.0, 0.0};
        UNROLLED
        for (int k = 0; k < RUN; k++) {
            const int64_t i = forward ? start + first + k : end - 1 - first - k;
            on[k] = first + k < end - start && (mask == nullptr || mask[i] != 0);
            if (on[k]) run = after(run, {gamma, (double)reward[i]});
            upto[k] = run;
        }
        const double entering = scan_before(run, &carry, totals);
        UNROLLED
        for (int k = 0; k < RUN; k++) {
            const int64_t i = forward ? start + first + k : end - 1 - first - k;
            if (first + k >= end - start) continue;
            out[i] = on[k] ? (float)(upto[k].a * entering + upto[k].b) : 0.0f;
        }
    }
}

struct Best {
    double value;
    int64_t at;  // -1 = none yet
};

// The first NaN, then the first smallest (largest).
__device__ Best better(Best a, Best b, bool smallest) {
    if (a.at < 0 || b.at < 0) return a.at < 0 ? b : a;
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    const bool equal = a_nan || b_nan ? a_nan && b_nan : a.value == b.value;
    if (equal) return a.at < b.at ? a : b;
    if (a_nan || b_nan) return a_nan ? a : b;
    return (a.value < b.value) == smallest ? a : b;
}

struct Steps {
    const float* value;
    const int64_t *order, *offsets;  // no order: as they lie in memory
    int64_t steps;
    int how;

    __device__ int64_t token(int64_t k) const { return order == nullptr ? k : order[k]; }
};

__device__ int64_t my_step() {
    return (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
}

__device__ double warp_fold(double x, bool product) {
    for (int step = 16; step > 0; step /= 2) {
        const double other = __shfl_down_sync(ALL_LANES, x, step);
        x = product ? x * other : x + other;
    }
    return __shfl_sync(ALL_LANES, x, 0);
}

// A warp per step, its lanes over the step's tokens.
__global__ void step_kernel(Steps s, float* out, int64_t* index) {
    const int64_t step = my_step();
    const int lane = threadIdx.x % 32;
    if (step >= s.steps) return;
    const int64_t start = s.offsets[step], end = s.offsets[step + 1];
    const bool product = s.how == STEP_PROD, smallest = s.how == STEP_MIN;
    double total = product ? 1.0 : 0.0;
    Best best = {0.0, -1};
    for (int64_t k = start + lane; k < end; k += 32) {
        const int64_t i = s.token(k);
        const double x = s.value[i];
        total = product ? total * x : total + x;
        best = better(best, {x, i}, smallest);
    }
    total = warp_fold(total, product);
    for (int gap = 16; gap > 0; gap /= 2) {
        Best other;
        other.value = __shfl_down_sync(ALL_LANES, best.value, gap);
        other.at = __shfl_down_sync(ALL_LANES, best.at, gap);
        best = better(best, other, smallest);
    }
    if (lane != 0) return;
    const int64_t n = end - start;
    if (s.how == STEP_LAST) best.at = n > 0 ? s.token(end - 1) : -1;
    const bool chosen = s.how == STEP_MIN || s.how == STEP_MAX || s.how == STEP_LAST;
    if (s.how == STEP_MEAN && n > 0) total /= (double)n;
    index[step] = chosen ? best.at : n;
    out[step] = chosen ? (best.at < 0 ? 0.0f : s.value[best.at]) : (float)total;
}

__global__ void step_grad_kernel(Steps s, const int64_t* index, const float* grad, float* out) {
    const int64_t step = my_step();
    const int lane = threadIdx.x % 32;
    if (step >= s.steps) return;
    const int64_t start = s.offsets[step], end = s.offsets[step + 1];
    double zeros = 0.0, rest = 1.0;
    for (int64_t k = start + lane; k < end && s.how == STEP_PROD; k += 32) {
        const float x = s.value[s.token(k)];
        zeros += x == 0.0f ? 1.0 : 0.0;
        rest *= x == 0.0f ? 1.0 : (double)x;
    }
    zeros = warp_fold(zeros, false);
    rest = warp_fold(rest, true);
    for (int64_t k = start + lane; k < end; k += 32) {
        const int64_t i = s.token(k);
        double g = grad[step];
        if (s.how == STEP_MEAN) g /= (double)(end - start);
        if (s.how == STEP_MIN || s.how == STEP_MAX) g = index[step] == i ? g : 0.0;
        if (s.how == STEP_LAST) g = k == end - 1 ? g : 0.0;
        if (s.how == STEP_PROD) {
            const double x = s.value[i], others = zeros - (x == 0.0 ? 1.0 : 0.0);
            g = others > 0.0 ? 0.0 : g * (x == 0.0 ? rest : rest / x);
        }
        out[i] = (float)g;
    }
}

__global__ void expand_kernel(const float* value, const int64_t* step, int64_t tokens, float* out) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < tokens) out[i] = step[i] < 0 ? 0.0f : value[step[i]];
}

int64_t blocks_for(int64_t items, int64_t per_block) {
    return (items + per_block - 1) / per_block;
}

}  // namespace
}  // namespace reasonrl

using namespace reasonrl;

int reasonrl_count_tokens(const uint8_t* mask, const int64_t* cu, int64_t batch, int64_t* counts,
                          void* stream) {
    return launch(batch, stream, count_kernel, mask, cu, counts);
}

int reasonrl_group_advantage(const float* reward, const int64_t* group, const uint8_t* scored,
                             int64_t batch, int kind, double ddof, double eps, float* out,
                             void* stream) {
    return launch(batch, stream, group_kernel, reward, group, scored, batch, kind, ddof, eps, out);
}

int reasonrl_returns(const float* reward, const int64_t* cu, const uint8_t* mask, int64_t batch,
                     double gamma, int forward, float* out, void* stream) {
    return launch(batch, stream, returns_kernel, reward, cu, mask, gamma, forward, out);
}

int reasonrl_step_reduce(const float* value, const int64_t* order, const int64_t* offsets,
                         int64_t steps, int how, float* out, int64_t* index, void* stream) {
    const Steps s = {value, order, offsets, steps, how};
    return launch(blocks_for(steps, WARPS), stream, step_kernel, s, out, index);
}

int reasonrl_step_reduce_grad(const float* value, const int64_t* order, const int64_t* offsets,
                              int64_t steps, int how, const int64_t* index, const float* grad,
                              float* out, void* stream) {
    const Steps s = {value, order, offsets, steps, how};
    return launch(blocks_for(steps, WARPS), stream, step_grad_kernel, s, index, grad, out);
}

int reasonrl_step_expand(const float* value, const int64_t* step, int64_t tokens, float* out,
                         void* stream) {
    return launch(blocks_for(tokens, THREADS), stream, expand_kernel, value, step, tokens, out);
}
