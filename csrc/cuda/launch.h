// What the .cu files offer: device pointers, sizes and a stream in; a cudaError_t out. 0 = absent.
#pragma once

#include <stdint.h>

#include "../math.h"

#define REASONRL_API extern "C" __attribute__((visibility("default")))

namespace reasonrl {

// Inputs and outputs of the policy loss; see PolicyInput in ops.h.
struct PolicyTask {
    const float *logp, *old_logp, *advantage, *ref_logp, *entropy, *weight;  // (N,)
    const uint8_t* mask;                                                     // (N,)
    const int64_t* cu;                                                       // (B+1,)
    const int64_t* counts;            // (B,) unmasked tokens of each completion
    const double* divisors;           // (2,) of the loss; of the entropy part, 0 = the same
    float *grad_logp, *grad_entropy;  // (N,)
    double* sums;                     // (items, SUM_COUNT), see reasonrl_policy_items
    float* result;                    // (1 + 10,) loss, metrics
    int64_t tokens, batch;
    int per_completion;
};

}  // namespace reasonrl

// blocks of the policy kernel: rows of `sums`
REASONRL_API int64_t reasonrl_policy_items(const reasonrl::Loss*, int64_t tokens, int64_t batch,
                                           int per_completion);
REASONRL_API int reasonrl_policy(const reasonrl::Loss*, const reasonrl::PolicyTask*, void* stream);
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
