// Picks the instruction set once, by what the CPU says it has. REASONRL_ISA narrows the choice.
#include <stdlib.h>

#include "ops.h"

namespace reasonrl {
namespace {

#define REASONRL_OPS(isa)      \
    {#isa,                     \
     isa::logp_forward,        \
     isa::logp_backward,       \
     isa::policy_loss,         \
     isa::add_bf16,            \
     isa::returns,             \
     isa::walk_credit,         \
     isa::token_mean,          \
     isa::list_runs,           \
     isa::whiten,              \
     isa::attend_slots,        \
     isa::masked_softmax,      \
     isa::masked_softmax_grad, \
     isa::rms_norm,            \
     isa::rms_norm_grad,       \
     isa::rotary,              \
     isa::norm_heads,          \
     isa::norm_heads_grad,     \
     isa::swiglu,              \
     isa::narrow,              \
     isa::column_sums,         \
     isa::swiglu_grad,         \
     isa::attend_packed,       \
     isa::attend_packed_grad,  \
     isa::draw,                \
     isa::adamw,               \
     isa::linear,              \
     isa::linear_onto,         \
     isa::linear_by_input,     \
     isa::linear_by_gate,      \
     isa::linear_by_weight,    \
     isa::panel,               \
     isa::packed_words,        \
     isa::pack,                \
     isa::decode_logits,       \
     isa::decode_tokens}

#ifdef WITH_X86
const Ops SETS[] = {REASONRL_OPS(avx512), REASONRL_OPS(avx2), REASONRL_OPS(portable)};
#else
const Ops SETS[] = {REASONRL_OPS(portable)};
#endif

bool runs_here(const char* name) {
#ifdef WITH_X86
    __builtin_cpu_init();
    if (!strcmp(name, "avx512")) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    if (!strcmp(name, "avx2")) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
#endif
    return !strcmp(name, "portable");
}

const Ops* find(const char* name) {
    for (const Ops& set : SETS) {
        if ((!name || !strcmp(name, set.name)) && runs_here(set.name)) return &set;
    }
    return nullptr;
}

const Ops* chosen = nullptr;

}  // namespace

const Ops& ops() {
    if (!chosen) chosen = find(getenv("REASONRL_ISA"));
    if (!chosen) chosen = find(nullptr);
    return *chosen;
}

bool has_dots() {
#ifdef WITH_X86
    return !strcmp(ops().name, "avx512") && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool use_isa(const char* name) {
    const Ops* set = find(name);
    if (set) chosen = set;
    return set != nullptr;
}

}  // namespace reasonrl
