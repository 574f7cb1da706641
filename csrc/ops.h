// The native CPU ops: plain pointers and sizes. V vocabulary, N tokens, B completions, S steps.
//
// What Ops holds is compiled once per instruction set; ops() is the best set this CPU runs.
// `threads` bounds the OpenMP team; results do not depend on it. A null pointer is an absent input.
#pragma once

#include <stdint.h>

#include "decode.h"
#include "math.h"

namespace reasonrl {

enum DType { F32, BF16, F16 };
enum How { STEP_SUM, STEP_MEAN, STEP_MIN, STEP_MAX, STEP_LAST, STEP_PROD };
enum GroupKind { GROUP_GRPO, GROUP_DR_GRPO, GROUP_RLOO };
enum PrimeForm { PRIME_RLOO, PRIME_GRPO, PRIME_REINFORCE };
enum Pay { PAY_RETURN, PAY_STEP };

// (rows, V) logits as they come, and how they become scores: s = softcap tanh(u / softcap) / tau.
struct Logits {
    const void* data;
    int64_t rows, vocab;
    int dtype;
    float temperature;
    float softcap;  // 0 = none
};

// Per row: the largest score, the log of sum e^(s - max), the entropy.
struct RowStats {
    float max, log_sum, entropy;
};

struct LogpGrad {
    const int64_t* target;
    const float* grad_logp;     // (rows,) or null
    const float* grad_entropy;  // (rows,) or null
    const int64_t* source;      // (out_rows,) row of the logits behind each output row, or null
    int64_t out_rows;
    void* out;  // (out_rows, V) in the logits' dtype; may be the logits themselves
};

// Rewards from which advantages follow: a group's outcomes and either token rewards (PRIME) or step
// rewards. A step is one run of neighbouring tokens; completion b has [step_cu[b], step_cu[b + 1]).
struct CreditInput {
    int64_t tokens, batch, steps;
    const float* outcome;           // (B,)
    const int64_t *group, *cu;      // (B,), (B+1,)
    const uint8_t *mask, *scored;   // (N,), (B,)
    const float* token_reward;      // (N,), null: steps
    const float* step_reward;       // (S,)
    const uint8_t* step_scored;     // (S,)
    const int64_t *step, *step_cu;  // (N,) -1 = in none, (B+1,)
    int kind;                       // GroupKind of steps, PrimeForm of tokens
    int pay;                        // a step's worth: to itself, or to all before it as well
    bool by_place;                  // steps are compared with those at the same place only
    bool divide;                    // a step's worth is divided by its completion's steps
    bool verl_baseline;
    double gamma, ddof, eps, outcome_weight, process_weight;
};

// The rewards of one completion, measured against its group: a token's own worth is
// scale * reward + shift (token rewards) or value[step]; every token gets `outcome` as well.
struct Relative {
    double outcome, scale, shift;
    bool known;
};

struct Credit {
    const CreditInput* in;
    const Relative* relative;  // (B,)
    const double* value;       // (S,)
};

struct PolicyInput {
    int64_t tokens, batch;
    const float *logp, *old_logp, *advantage, *ref_logp, *entropy, *weight;  // (N,)
    const Credit* credit;    // in place of `advantage`, or null
    const uint8_t* mask;     // (N,)
    const int64_t* cu;       // (B+1,) into these tokens
    const int64_t* counts;   // (B,) unmasked tokens of each whole completion
    bool per_completion;     // seq_mean: every completion is divided by its count
    double divisor;          // divides the policy and KL part
    double entropy_divisor;  // divides the entropy part instead, where not 0
};

struct PolicyOutput {
    float* grad_logp;     // (N,)
    float* grad_entropy;  // (N,) or null
    double* sums;         // (SUM_COUNT,) added to
};

// One new token for each of B rows whose keys and values stand in slots; see cpu/slots.cpp.
struct SlotTask {
    const void *q, *k, *v;  // (B, H, d), (B, K, d), (B, K, d), rows their strides apart
    void *keys, *values;    // (B, K, W, d)
    const int64_t* length;  // (B,) places in use before
    void* out;              // (B, H, d)
    int64_t rows, heads, key_heads, width, size, q_stride, k_stride, v_stride;
    int q_dtype, k_dtype, v_dtype, dtype;  // dtype: of the slots and of `out`
    float scaling;
    const void *cos, *sin;  // (B, d) by which q and k are to be turned, or null
    int angle_dtype;
};

// Scores of B x H x R queries over W places, and what each query sees of them; see cpu/softmax.cpp.
struct SoftmaxTask {
    void* weight;         // (B, H, R, W) scores that become weights
    const uint8_t* sees;  // (B, R, W), or (R, W) where shared
    int64_t batch, heads, queries, width;
    int dtype;
    bool shared;
    float scaling;
};

// Rows to normalise by their root mean square; see cpu/layers.cpp.
struct NormTask {
    const void *x, *weight;  // (N, D), (D,)
    float* scale;            // (N,) 1 / rms, written by the forward where not null
    int64_t rows, width;
    int x_dtype, weight_dtype, y_dtype;
    float eps;
};

// What a forward adds to its rows before it normalises them, and where the sum goes.
struct Added {
    const void* delta;  // (N, D) or null
    void* sum;          // (N, D) in x's dtype
    int dtype;
};

struct NormGrad {
    const void *grad, *grad_sum;  // (N, D) by the result; in x's dtype by the sum, or null
    void *grad_x, *grad_delta;    // (N, D) in x's dtype; in `dtype`, or null
    void* grad_weight;            // (D,) or null
    void* again;                  // (N, D) what the forward gave, or null
    int dtype;
};

// Heads of N tokens, q k v side by side, to norm and turn; see cpu/heads.cpp.
struct HeadsTask {
    const void* from;              // (N, H + 2 K, d)
    void* out;                     // the same: heads, or in the backward their gradient, in place
    const void *cos, *sin;         // (N, d); d is even
    const float *q_norm, *k_norm;  // (d,)
    int64_t tokens, heads, key_heads, size;
    int dtype, angle_dtype;
    float eps;
};

// Queries and keys of N tokens to turn by their angles; see cpu/rotary.cpp.
struct RotaryTask {
    const void *q, *k, *cos, *sin;  // (N, H, d), (N, K, d), (N, d), (N, d); d is even
    void *q_out, *k_out;
    int64_t tokens, heads, key_heads, size, q_stride, k_stride;  // strides: from row to row
    int dtype, angle_dtype, out_dtype;
};

// Neighbouring tokens that are queries together: a prompt's, or those of a completion of it.
struct PackedBlock {
    int64_t start, count, prompt;  // the block of its prompt; below 0: it is one
};

// Attention over L packed tokens; see cpu/packed.cpp.
struct PackedTask {
    void* heads_of;             // (L, (H + 2 K) d) q, k and v; q and k are turned by the forward
    const void *cos, *sin;      // (L, d) by which they are, or null; then d is even
    const PackedBlock* blocks;  // (N,), in which every token stands once, prompts first
    float* shares;              // (L, H, 2) what weights are made of again
    void* out;                  // (L, H, d)
    int64_t tokens, count, heads, key_heads, size;
    int dtype, angle_dtype;
    float scaling;
    bool dots;  // by the instruction that multiplies pairs of bf16
};

struct PackedGrad {
    const void* grad;  // (L, H, d)
    void* by_heads;    // (L, (H + 2 K) d)
};

// Rows of logits to draw a token from each; see cpu/draw.cpp.
struct DrawTask {
    const void* logits;     // (B, V)
    const double* uniform;  // (B,) in [0, 1)
    int64_t* token;         // (B,)
    float* logp;            // (B,)
    int64_t rows, vocab;
    int dtype;
    float temperature;
};

// A parameter, its gradient, AdamW's moments of it and its number of steps.
struct Learned {
    float *weight, *grad, *mean, *square, *step;
    int64_t count;
};

struct AdamW {
    double rate, beta1, beta2, eps, decay, limit;
    bool usable;  // false: for the norm alone
};

struct Piece {
    const float* at;
    int64_t count;
};

// Linear layers of one input that learn; see cpu/linear.cpp. bf16: only where has_dots, and of even
// widths.
struct LinearTask {
    std::vector<Piece> parts;          // their weights, rows of `inputs`, and how many of these
    std::vector<const float*> biases;  // as many, null where there is none
    int64_t rows, inputs, outputs;
    int dtype;
};

// A decoder layer that learns; see cpu/layer.cpp. L tokens of width D, H query and K key heads of
// d, F wide inside. A of them go on behind the attention: those asked, or all.
struct LayerTask {
    const PackedBlock* blocks;                     // (block_count,), where the tokens stand
    const int64_t* asked;                          // (A,), ascending, or null
    const void *cos, *sin;                         // (L, d)
    const float *norm1, *norm2, *q_norm, *k_norm;  // (D,) twice, (d,) twice or null
    LinearTask qkv, out, both, down;               // what has no bias: null
    int64_t tokens, answers, width, inner, heads, key_heads, size, block_count;
    int dtype, angle_dtype;  // of the products (float32 or bf16), of cos
    float eps1, eps2, head_eps, scaling;
    bool dots;

    int64_t wide() const { return (heads + 2 * key_heads) * size; }
};

// Gradients by the weights of a layer, those of a product one under the other; null: not wanted.
struct LayerGrads {
    float *norm1, *norm2, *heads;  // (D,), (D,), (2, d)
    float *qkv, *out, *both, *down, *qkv_bias, *out_bias, *both_bias, *down_bias;
};

struct GateTask {
    const void *gate, *up;  // (N, D), rows `stride` apart; the result has none between them
    int64_t rows, width, stride;
    int dtype;
};

struct GateGrad {
    const void* grad;           // (N, D), no rows between
    void *grad_gate, *grad_up;  // (N, D), rows `stride` apart
    void* again;                // (N, D) what the forward gave, or null
    int64_t stride;
};

// Neighbouring tokens of one step: mostly all of it.
struct Run {
    int64_t step, tokens, end;  // `end`: the token after the last
    double value;               // their sum or product
};
enum RunWhat { RUN_SUM, RUN_PRODUCT, RUN_ENDS };

#define REASONRL_DECLARE(isa)                                                                      \
    namespace isa {                                                                                \
    void logp_forward(const Logits&, const int64_t* target, float* logp, float* entropy,           \
                      RowStats* stats, int threads);                                               \
    void logp_backward(const Logits&, const RowStats*, const LogpGrad&, int threads);              \
    void policy_loss(const Loss&, const PolicyInput&, const PolicyOutput&, int threads);           \
    void add_bf16(float* sum, const uint16_t* part, int64_t n, int threads);                       \
    void returns(const float* reward, const int64_t* cu, const uint8_t* mask, int64_t batch,       \
                 double gamma, bool forward, float* out, int threads);                             \
    void walk_credit(const Credit&, const int64_t* which, int64_t count, float* out, int threads); \
    double token_mean(const float* x, const uint8_t* mask, int64_t n);                             \
    int64_t list_runs(const float* value, const int64_t* step, int64_t start, int64_t stop,        \
                      int what, Run* out, bool* ascending);                                        \
    void whiten(const float* value, const uint8_t* mask, int64_t tokens, double eps, float* out,   \
                int threads);                                                                      \
    void attend_slots(const SlotTask&, int threads);                                               \
    void masked_softmax(const SoftmaxTask&, int threads);                                          \
    void masked_softmax_grad(const SoftmaxTask&, const void* grad, void* out, int threads);        \
    void rms_norm(const NormTask&, const Added&, void* y, int threads);                            \
    void rms_norm_grad(const NormTask&, const NormGrad&, int threads);                             \
    void rotary(const RotaryTask&, bool back, int threads);                                        \
    void norm_heads(const HeadsTask&, int threads);                                                \
    void norm_heads_grad(const HeadsTask&, float* by_norms, int64_t shares, int threads);          \
    void swiglu(const GateTask&, void* out, int threads);                                          \
    void narrow(const float* x, int64_t n, int dtype, void* out, int threads);                     \
    void column_sums(const void* x, int dtype, int64_t rows, int64_t width, float* out,            \
                     int threads);                                                                 \
    void swiglu_grad(const GateTask&, const GateGrad&, int threads);                               \
    void attend_packed(const PackedTask&, int threads);                                            \
    void attend_packed_grad(const PackedTask&, const PackedGrad&, int threads);                    \
    void draw(const DrawTask&, int threads);                                                       \
    double adamw(const Learned*, int64_t count, const AdamW&, int threads);                        \
    void linear(const LinearTask&, const void* x, void* y, int threads);                           \
    void linear_onto(const LinearTask&, const void* x, const float* onto, float* out,              \
                     int threads);                                                                 \
    void linear_by_input(const LinearTask&, const void* grad, void* out, int threads);             \
    void linear_by_gate(const LinearTask&, const void* grad, const GateTask&, const GateGrad&,     \
                        int threads);                                                              \
    void linear_by_weight(const LinearTask&, const void* grad, const void* x, float* out,          \
                          int threads);                                                            \
    int64_t panel();                                                                               \
    int64_t packed_words(int dtype, int64_t inputs, int64_t outputs);                              \
    void pack(const std::vector<PackTask>&, int threads);                                          \
    void decode_logits(const DecodeModel&, const DecodeRows&, void* logits, int threads);          \
    void decode_tokens(const DecodeModel&, const DecodeState&, int64_t tokens, int64_t until,      \
                       int threads);                                                               \
    }
REASONRL_DECLARE(portable)
REASONRL_DECLARE(avx2)
REASONRL_DECLARE(avx512)
#undef REASONRL_DECLARE

struct Ops {
    const char* name;
    decltype(&portable::logp_forward) logp_forward;
    decltype(&portable::logp_backward) logp_backward;
    decltype(&portable::policy_loss) policy_loss;
    decltype(&portable::add_bf16) add_bf16;
    decltype(&portable::returns) returns;
    decltype(&portable::walk_credit) walk_credit;
    decltype(&portable::token_mean) token_mean;
    decltype(&portable::list_runs) list_runs;
    decltype(&portable::whiten) whiten;
    decltype(&portable::attend_slots) attend_slots;
    decltype(&portable::masked_softmax) masked_softmax;
    decltype(&portable::masked_softmax_grad) masked_softmax_grad;
    decltype(&portable::rms_norm) rms_norm;
    decltype(&portable::rms_norm_grad) rms_norm_grad;
    decltype(&portable::rotary) rotary;
    decltype(&portable::norm_heads) norm_heads;
    decltype(&portable::norm_heads_grad) norm_heads_grad;
    decltype(&portable::swiglu) swiglu;
    decltype(&portable::narrow) narrow;
    decltype(&portable::column_sums) column_sums;
    decltype(&portable::swiglu_grad) swiglu_grad;
    decltype(&portable::attend_packed) attend_packed;
    decltype(&portable::attend_packed_grad) attend_packed_grad;
    decltype(&portable::draw) draw;
    decltype(&portable::adamw) adamw;
    decltype(&portable::linear) linear;
    decltype(&portable::linear_onto) linear_onto;
    decltype(&portable::linear_by_input) linear_by_input;
    decltype(&portable::linear_by_gate) linear_by_gate;
    decltype(&portable::linear_by_weight) linear_by_weight;
    decltype(&portable::panel) panel;
    decltype(&portable::packed_words) packed_words;
    decltype(&portable::pack) pack;
    decltype(&portable::decode_logits) decode_logits;
    decltype(&portable::decode_tokens) decode_tokens;
};

const Ops& ops();

// What a layer keeps for its gradient, and what it needs meanwhile, in bytes. x and the gradient by
// it: (L, D); out and its own: (A, D).
int64_t layer_keeps(const LayerTask&);
int64_t layer_needs(const LayerTask&);
void decoder_layer(const LayerTask&, const float* x, void* kept, void* scratch, float* out,
                   int threads);
void decoder_layer_grad(const LayerTask&, const float* x, void* kept, void* scratch,
                        const float* grad, float* grad_x, const LayerGrads&, int threads);

void count_tokens(const uint8_t* mask, const int64_t* cu, int64_t batch, int64_t* counts);
void group_advantage(const float* reward, const int64_t* group, const uint8_t* scored,
                     int64_t batch, int kind, double ddof, double eps, float* out);
void step_reduce(const float* value, const int64_t* step, int64_t tokens, int64_t steps, int how,
                 float* out, int64_t* index, int threads);
void step_reduce_grad(const float* value, const int64_t* step, int64_t tokens, int64_t steps,
                      int how, const int64_t* index, const float* grad, float* out, int threads);
void credit_advantage(const CreditInput&, float* out, int threads);
// the fused core: rewards to the loss and its gradient, without advantages in memory
void credit_loss(const Loss&, PolicyInput, const CreditInput&, const PolicyOutput&, int threads);
void step_expand(const float* value, const int64_t* step, int64_t tokens, int64_t steps, bool last,
                 float* out, int threads);

}  // namespace reasonrl
