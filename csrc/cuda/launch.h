// What the .cu files offer: device pointers, sizes and a stream in; a cudaError_t out. 0 = absent.
#pragma once

#include <stdint.h>

#include "../math.h"

#define REASONRL_API extern "C" __attribute__((visibility("default")))

namespace reasonrl {

// Rewards in place of advantages; see CreditInput in ops.h. The last three are scratch.
struct CreditTask {
    const float* outcome;           // (B,)
    const int64_t* group;           // (B,)
    const uint8_t* scored;          // (B,)
    const float* token_reward;      // (N,)
    const float* step_reward;       // (S,)
    const uint8_t* step_scored;     // (S,)
    const int64_t *step, *step_cu;  // (N,), (B+1,)
    int tokens_paid, kind, pay, by_place, divide, verl_baseline;
    double gamma, ddof, eps, outcome_weight, process_weight;
    double* relative;  // (B, 3) outcome, scale, shift
    double* mean;      // (B,) of token rewards
    double* value;     // (S,)
};

// Inputs and outputs of the policy loss; see PolicyInput in ops.h.
struct PolicyTask {
    const float *logp, *old_logp, *advantage, *ref_logp, *entropy, *weight;  // (N,)
    const uint8_t* mask;                                                     // (N,)
    const int64_t* cu;                                                       // (B+1,)
    const double* divisors;           // (2,) where only the device knows them, else null
    float *grad_logp, *grad_entropy;  // (N,)
    double* sums;                     // (items, SUM_COUNT), see reasonrl_policy_items
    float *loss, *metrics;            // (), (10,)
    int* arrived;                     // 0, and 0 again afterwards
    int64_t tokens, batch;
    int per_completion;
    double divisor, entropy_divisor;  // of the loss; of the entropy part, 0 = the same
};

}  // namespace reasonrl

// blocks of the policy kernel: rows of `sums`
REASONRL_API int64_t reasonrl_policy_items(const reasonrl::Loss*, int64_t tokens, int64_t batch,
                                           int per_completion, int credited);
REASONRL_API int reasonrl_policy(const reasonrl::Loss*, const reasonrl::PolicyTask*, void* stream);
// the fused core: `advantage` is ignored, the credit takes its place
REASONRL_API int reasonrl_core(const reasonrl::Loss*, const reasonrl::PolicyTask*,
                               const reasonrl::CreditTask*, void* stream);
REASONRL_API int reasonrl_credit_advantage(const reasonrl::CreditTask*, const int64_t* cu,
                                           const uint8_t* mask, int64_t batch, float* out,
                                           void* stream);
REASONRL_API int reasonrl_count_tokens(const uint8_t* mask, const int64_t* cu, int64_t batch,
                                       int64_t* counts, void* stream);
REASONRL_API int reasonrl_group_advantage(const float* reward, const int64_t* group,
                                          const uint8_t* scored, int64_t batch, int kind,
                                          double ddof, double eps, float* out, void* stream);
REASONRL_API int reasonrl_returns(const float* reward, const int64_t* cu, const uint8_t* mask,
                                  int64_t batch, double gamma, int forward, float* out,
                                  void* stream);
// `order` (N,): tokens sorted by step, stably; `offsets` (S+1,): where each step starts in it
REASONRL_API int reasonrl_step_reduce(const float* value, const int64_t* order,
                                      const int64_t* offsets, int64_t steps, int how, float* out,
                                      int64_t* index, void* stream);
REASONRL_API int reasonrl_step_reduce_grad(const float* value, const int64_t* order,
                                           const int64_t* offsets, int64_t steps, int how,
                                           const int64_t* index, const float* grad, float* out,
                                           void* stream);
REASONRL_API int reasonrl_step_expand(const float* value, const int64_t* step, int64_t tokens,
                                      float* out, void* stream);

// status.cpp: the runtime's own words, and what this machine has
namespace reasonrl {
const char* cuda_missing();               // null where kernels can run
int cuda_finish(int code, void* stream);  // clears the error; REASONRL_CUDA_SYNC=1 waits first
const char* cuda_error_name(int code);
const char* cuda_error_text(int code);
}  // namespace reasonrl
