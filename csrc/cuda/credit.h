// Rewards measured against their group, and the advantages that follow: the CUDA half of
// credit.cpp.
//
// A block has a group: the one of its first completion; blocks of later members have nothing to do.
// It makes the group's statistics, then walks each member from its end in tiles.
#pragma once

#include "../ops.h"
#include "device.h"
#include "launch.h"

namespace reasonrl {
namespace {

// What some numbers of a group have in common.
struct Crowd {
    double count, sum, square;
    bool equal;
};

// `each(f)` calls f(x) for this thread's share of the numbers; the same ones in both passes.
template <typename Each>
__device__ Crowd crowd_of(double* slots, Each each) {
    double x[4] = {0.0, 0.0, -INFINITY, -INFINITY};  // count, sum, largest, largest of -x
    each([&](double v) {
        x[0] += 1.0;
        x[1] += v;
        x[2] = v > x[2] ? v : x[2];
        x[3] = -v > x[3] ? -v : x[3];
    });
    block_sums<4>(x, slots, 0xcu);
    const double mean = x[0] > 0.0 ? x[1] / x[0] : 0.0;
    double square[1] = {};
    each([&](double v) { square[0] += (v - mean) * (v - mean); });
    block_sums<1>(square, slots);
    return {x[0], x[1], square[0], x[2] == -x[3]};
}

// scale * x + shift: a number's place in its crowd
struct Against {
    double scale, shift;
};

__device__ Against by_group(const CreditTask& c, const Crowd& g) {
    if (g.count < 2.0 || g.equal) return {0.0, 0.0};
    if (c.kind == GROUP_RLOO) return {g.count / (g.count - 1.0), -g.sum / (g.count - 1.0)};
    const double freedom = g.count - c.ddof > 1.0 ? g.count - c.ddof : 1.0;
    const double scale = c.kind == GROUP_GRPO ? 1.0 / (sqrt(g.square / freedom) + c.eps) : 1.0;
    return {scale, -g.sum / g.count * scale};
}

__device__ Against by_prime(const CreditTask& c, const Crowd& g, double own) {
    if (c.kind == PRIME_REINFORCE) return {1.0, 0.0};
    if (g.count < 2.0) return {0.0, 0.0};
    if (c.kind == PRIME_RLOO) return {1.0, -(g.sum - own) / (g.count - 1.0)};
    if (g.equal) return {0.0, 0.0};
    const double freedom = g.count - c.ddof > 1.0 ? g.count - c.ddof : 1.0;
    const double scale = 1.0 / sqrt(g.square / freedom);
    return {scale, -g.sum / g.count * scale};
}

__device__ bool is_known(const uint8_t* scored, int64_t i) {
    return scored == nullptr || scored[i] != 0;
}

// Calls visit(j) for this thread's members of b's group.
template <typename Visit>
__device__ void my_members(const CreditTask& c, int64_t batch, int64_t b, Visit visit) {
    for (int64_t j = b + threadIdx.x; j < batch; j += THREADS) {
        if (c.group[j] == c.group[b]) visit(j);
    }
}

// The member of b's group after j, or `batch`; the whole block looks for it.
__device__ int64_t next_member(const CreditTask& c, int64_t batch, int64_t b, int64_t j,
                               double* slots) {
    double nearest[1] = {-(double)batch};
    for (int64_t k = j + 1 + threadIdx.x; k < batch; k += THREADS) {
        if (c.group[k] != c.group[b]) continue;
        nearest[0] = -(double)k;
        break;
    }
    block_sums<1>(nearest, slots, 1u);
    return (int64_t)-nearest[0];
}

__device__ bool leads(const CreditTask& c, int64_t b, double* slots) {
    double earlier[1] = {};
    for (int64_t j = threadIdx.x; j < b; j += THREADS) {
        if (c.group[j] == c.group[b]) earlier[0] += 1.0;
    }
    block_sums<1>(earlier, slots);
    return earlier[0] == 0.0;
}

__device__ void measure_steps(const CreditTask& c, int64_t batch, int64_t b, double* slots) {
    double most[1] = {c.by_place ? 0.0 : 1.0};
    my_members(c, batch, b, [&](int64_t j) {
        const double n = (double)(c.step_cu[j + 1] - c.step_cu[j]);
        if (c.by_place && n > most[0]) most[0] = n;
    });
    block_sums<1>(most, slots, 1u);
    for (int64_t place = 0; place < (int64_t)most[0]; place++) {
        const auto mine =
            [&](auto visit) {  // this thread's steps that are compared with each other
                my_members(c, batch, b, [&](int64_t j) {
                    const int64_t first = c.step_cu[j], last = c.step_cu[j + 1];
                    if (!c.by_place) {
                        for (int64_t s = first; s < last; s++) visit(s, last - first);
                    } else if (first + place < last) {
                        visit(first + place, last - first);
                    }
                });
            };
        const Crowd crowd = crowd_of(slots, [&](auto f) {
            mine([&](int64_t s, int64_t) {
                if (is_known(c.step_scored, s)) f((double)c.step_reward[s]);
            });
        });
        const Against a = by_group(c, crowd);
        mine([&](int64_t s, int64_t steps) {
            const double share = c.divide ? (double)steps : 1.0;
            const bool known = is_known(c.step_scored, s);
            const double worth = known ? a.scale * c.step_reward[s] + a.shift : 0.0;
            c.value[s] = c.process_weight * worth / share;
        });
    }
}

__device__ void measure_tokens(const CreditTask& c, const int64_t* cu, const uint8_t* mask,
                               int64_t batch, int64_t b, double* slots) {
    for (int64_t j = b; j < batch; j = next_member(c, batch, b, j, slots)) {
        if (!is_known(c.scored, j)) continue;
        double x[2] = {};
        for (int64_t i = cu[j] + threadIdx.x; i < cu[j + 1]; i += THREADS) {
            if (mask && !mask[i]) continue;
            x[0] += c.token_reward[i];
            x[1] += 1.0;
        }
        block_sums<2>(x, slots);
        if (threadIdx.x == 0) c.mean[j] = x[1] > 0.0 ? x[0] / x[1] : 0.0;
    }
    // the means are everybody's: the search for the next member has waited
    const Crowd crowd = crowd_of(slots, [&](auto f) {
        my_members(c, batch, b, [&](int64_t j) {
            if (is_known(c.scored, j)) f(c.mean[j]);
        });
    });
    my_members(c, batch, b, [&](int64_t j) {
        Against a = {0.0, 0.0};
        if (is_known(c.scored, j)) {
            a = by_prime(c, crowd, c.mean[j]);
            if (c.verl_baseline && crowd.count > 1.0) {
                a.scale += 1.0 / (crowd.count - 1.0);
                a.shift -= c.mean[j] / (crowd.count - 1.0);
            }
        }
        c.relative[3 * j + 1] = c.process_weight * a.scale;
        c.relative[3 * j + 2] = c.process_weight * a.shift;
    });
}

// Everything the walks of b's group need, ready for every thread.
__device__ void measure(const CreditTask& c, const int64_t* cu, const uint8_t* mask, int64_t batch,
                        int64_t b, double* slots) {
    const Crowd crowd = crowd_of(slots, [&](auto f) {
        my_members(c, batch, b, [&](int64_t j) {
            if (is_known(c.scored, j)) f((double)c.outcome[j]);
        });
    });
    my_members(c, batch, b, [&](int64_t j) {
        double worth = 0.0;
        if (is_known(c.scored, j)) {
            const double own = c.outcome[j];
            const Against a = c.tokens_paid ? by_prime(c, crowd, own) : by_group(c, crowd);
            worth = a.scale * own + a.shift;
        }
        c.relative[3 * j] = c.outcome_weight * worth;
    });
    if (c.tokens_paid) {
        measure_tokens(c, cu, mask, batch, b, slots);
    } else {
        measure_steps(c, batch, b, slots);
    }
    __syncthreads();  // relative and value are everybody's
}

// Calls visit(i, advantage) for the tokens of completion j, tile by tile from its end; a thread has
// RUN neighbours of a tile.
template <int RUN, typename Visit>
__device__ void walk(const CreditTask& c, const uint8_t* mask, int64_t j, int64_t start,
                     int64_t end, Affine* totals, Visit visit) {
    const double* own = c.relative + 3 * j;  // read again for every tile: registers are dear here
    const bool returned = c.tokens_paid || c.pay == PAY_RETURN;
    const bool known = !c.tokens_paid || is_known(c.scored, j);
    double carry = 0.0;
    for (int64_t tile = 0; tile < end - start; tile += RUN * THREADS) {
        const int64_t first = end - 1 - tile - RUN * (int64_t)threadIdx.x;
        Affine upto[RUN];  // this thread's tokens up to each of its own
        bool on[RUN];
        Affine run = {1.0, 0.0};
        UNROLLED
        for (int k = 0; k < RUN; k++) {
            const int64_t i = first - k;
            double worth = 0.0;
            on[k] = i >= start && known && (mask == nullptr || mask[i] != 0);
            if (on[k] && c.tokens_paid) worth = own[1] * c.token_reward[i] + own[2];
            if (on[k] && !c.tokens_paid) {
                const int64_t step = c.step[i];
                const bool ends = i + 1 == end || c.step[i + 1] != step;
                if (step >= 0 && (ends || !returned)) worth = c.value[step];
            }
            if (!returned) run = {0.0, worth};
            if (on[k] && returned) run = after(run, {c.gamma, worth});
            upto[k] = run;
        }
        const double entering = returned ? scan_before(run, &carry, totals) : 0.0;
        UNROLLED
        for (int k = 0; k < RUN; k++) {
            const double worth = upto[k].a * entering + upto[k].b;
            if (first - k >= start) visit(first - k, on[k] ? (float)(worth + own[0]) : 0.0f);
        }
    }
}

}  // namespace
}  // namespace reasonrl
