// The bindings; those of layers stand in cpu/bind.h, of CUDA in cuda/bind.h. Pointers arrive as
// integers (tensor.data_ptr(), 0 = absent), sizes as they are; the Python side has checked shapes,
// dtypes, contiguity and values before it hands a pointer over.
#include "bind.h"

#include "cpu/bind.h"
#include "cpu/bind_decode.h"
#include "cpu/groups.h"
#include "ops.h"
#ifdef WITH_CUDA
#include "cuda/bind.h"
#endif

using namespace reasonrl;

namespace {

Logits logits_of(uintptr_t data, int64_t rows, int64_t vocab, int dtype, float temperature,
                 float softcap) {
    return {at<const void>(data), rows, vocab, dtype, temperature, softcap};
}

void logp_forward(const Logits& logits, uintptr_t target, uintptr_t logp, uintptr_t entropy,
                  uintptr_t stats, int threads) {
    py::gil_scoped_release release;
    ops().logp_forward(logits, at<const int64_t>(target), at<float>(logp), at<float>(entropy),
                       at<RowStats>(stats), threads);
}

void logp_backward(const Logits& logits, uintptr_t target, uintptr_t stats, uintptr_t grad_logp,
                   uintptr_t grad_entropy, uintptr_t source, int64_t out_rows, uintptr_t out,
                   int threads) {
    py::gil_scoped_release release;
    const LogpGrad grad = {at<const int64_t>(target),
                           at<const float>(grad_logp),
                           at<const float>(grad_entropy),
                           at<const int64_t>(source),
                           out_rows,
                           at<void>(out)};
    ops().logp_backward(logits, at<const RowStats>(stats), grad, threads);
}

PolicyInput policy_input(int64_t tokens, int64_t batch, uintptr_t logp, uintptr_t old_logp,
                         uintptr_t advantage, uintptr_t ref_logp, uintptr_t entropy,
                         uintptr_t weight, uintptr_t mask, uintptr_t cu, uintptr_t counts,
                         bool per_completion, double divisor, double entropy_divisor) {
    return {tokens,
            batch,
            at<const float>(logp),
            at<const float>(old_logp),
            at<const float>(advantage),
            at<const float>(ref_logp),
            at<const float>(entropy),
            at<const float>(weight),
            nullptr,
            at<const uint8_t>(mask),
            at<const int64_t>(cu),
            at<const int64_t>(counts),
            per_completion,
            divisor,
            entropy_divisor};
}

CreditInput credit_input(int64_t tokens, int64_t batch, int64_t steps, uintptr_t outcome,
                         uintptr_t group, uintptr_t cu, uintptr_t mask, uintptr_t scored,
                         uintptr_t token_reward, uintptr_t step_reward, uintptr_t step_scored,
                         uintptr_t step, uintptr_t step_cu, bool tokens_paid, int kind, int pay,
                         bool by_place, bool divide, bool verl_baseline, double gamma, double ddof,
                         double eps, double outcome_weight, double process_weight) {
    static const float none = 0.0f;  // no token at all still means token rewards
    const float* reward = at<const float>(token_reward);
    return {tokens,
            batch,
            steps,
            at<const float>(outcome),
            at<const int64_t>(group),
            at<const int64_t>(cu),
            at<const uint8_t>(mask),
            at<const uint8_t>(scored),
            tokens_paid && !reward ? &none : reward,
            at<const float>(step_reward),
            at<const uint8_t>(step_scored),
            at<const int64_t>(step),
            at<const int64_t>(step_cu),
            kind,
            pay,
            by_place,
            divide,
            verl_baseline,
            gamma,
            ddof,
            eps,
            outcome_weight,
            process_weight};
}

void policy_loss(const Loss& loss, const PolicyInput& in, uintptr_t grad_logp,
                 uintptr_t grad_entropy, uintptr_t sums, int threads) {
    py::gil_scoped_release release;
    ops().policy_loss(loss, in, {at<float>(grad_logp), at<float>(grad_entropy), at<double>(sums)},
                      threads);
}

void fused_loss(const Loss& loss, const PolicyInput& in, const CreditInput& credit,
                uintptr_t grad_logp, uintptr_t grad_entropy, uintptr_t sums, int threads) {
    py::gil_scoped_release release;
    credit_loss(loss, in, credit, {at<float>(grad_logp), at<float>(grad_entropy), at<double>(sums)},
                threads);
}

void bind_logp(py::module_& m) {
    py::class_<Logits>(m, "Logits",
                       "(rows, V) logits with their temperature and softcap (0 = none).")
        .def(py::init(&logits_of));
    m.def("logp_forward", &logp_forward, "log p of the target, entropy and row statistics.");
    m.def("logp_backward", &logp_backward,
          "Gradient by the logits, in place if out is the logits.");
    m.def(
        "add_bf16",
        [](uintptr_t sum, uintptr_t part, int64_t n, int threads) {
            py::gil_scoped_release release;
            ops().add_bf16(at<float>(sum), at<const uint16_t>(part), n, threads);
        },
        "sum += part, float32 and bf16.");
}

void bind_policy(py::module_& m) {
    py::class_<Loss>(m, "Loss", "The numbers of a LossSpec; see math.h.")
        .def(py::init([](int ratio, int surrogate, int kl, float low, float high, float delta,
                         float dual, float kl_coef, float entropy_coef, float sapo_pos,
                         float sapo_neg) {
            return Loss{ratio, surrogate, kl,           low,      high,    delta,
                        dual,  kl_coef,   entropy_coef, sapo_pos, sapo_neg};
        }));
    py::class_<PolicyInput>(m, "PolicyInput", "Per-token inputs of the policy loss; see ops.h.")
        .def(py::init(&policy_input));
    m.def("policy_loss", &policy_loss, "Adds to the sums; writes dL/dlogp and dL/dentropy.");
    m.attr("SUM_COUNT") = (int)SUM_COUNT;
    py::class_<CreditInput>(m, "CreditInput", "Rewards in place of advantages; see ops.h.")
        .def(py::init(&credit_input));
    m.def("credit_loss", &fused_loss, "policy_loss from rewards, without advantages in memory.");
    m.def(
        "credit_advantage",
        [](const CreditInput& in, uintptr_t out, int threads) {
            py::gil_scoped_release release;
            credit_advantage(in, at<float>(out), threads);
        },
        "The advantages (N,) that follow from the rewards.");
}

void bind_segments(py::module_& m) {
    m.def(
        "whiten",
        [](uintptr_t value, uintptr_t mask, int64_t tokens, double eps, uintptr_t out,
           int threads) {
            py::gil_scoped_release release;
            ops().whiten(at<const float>(value), at<const uint8_t>(mask), tokens, eps,
                         at<float>(out), threads);
        },
        "(x - mean) / sqrt(unbiased var + eps) over unmasked values.");
    m.def(
        "count_tokens",
        [](uintptr_t mask, uintptr_t cu, int64_t batch, uintptr_t counts) {
            count_tokens(at<const uint8_t>(mask), at<const int64_t>(cu), batch,
                         at<int64_t>(counts));
        },
        "Unmasked tokens of each completion.");
    m.def(
        "group_advantage",
        [](uintptr_t reward, uintptr_t group, uintptr_t scored, int64_t batch, int kind,
           double ddof, double eps, uintptr_t out) {
            group_advantage(at<const float>(reward), at<const int64_t>(group),
                            at<const uint8_t>(scored), batch, kind, ddof, eps, at<float>(out));
        },
        "Rewards relative to their group.");
    m.def(
        "trust",
        [](uintptr_t outcome, uintptr_t thinking, uintptr_t group, uintptr_t known, int64_t batch,
           double weight, float threshold, bool trusting, bool score_wrong, bool keep, int kind,
           double ddof, double eps, uintptr_t out) {
            const TrustInput in{at<const float>(outcome),
                                at<const float>(thinking),
                                at<const int64_t>(group),
                                at<const uint8_t>(known),
                                batch,
                                weight,
                                threshold,
                                trusting,
                                score_wrong,
                                keep,
                                kind,
                                ddof,
                                eps};
            float* to = at<float>(out);
            trust(in, to, to + batch, to + 2 * batch);
        },
        "SophiaVL-R1's advantage, reward and trust weight of every completion.");
    m.def(
        "returns",
        [](uintptr_t reward, uintptr_t cu, uintptr_t mask, int64_t batch, double gamma,
           bool forward, uintptr_t out, int threads) {
            py::gil_scoped_release release;
            ops().returns(at<const float>(reward), at<const int64_t>(cu), at<const uint8_t>(mask),
                          batch, gamma, forward, at<float>(out), threads);
        },
        "Discounted reverse sums per completion; forward sums are their gradient.");
    m.def(
        "step_reduce",
        [](uintptr_t value, uintptr_t step, int64_t tokens, int64_t steps, int how, uintptr_t out,
           uintptr_t index, int threads) {
            py::gil_scoped_release release;
            step_reduce(at<const float>(value), at<const int64_t>(step), tokens, steps, how,
                        at<float>(out), at<int64_t>(index), threads);
        },
        "One value per step; index keeps what the gradient needs.");
    m.def(
        "step_reduce_grad",
        [](uintptr_t value, uintptr_t step, int64_t tokens, int64_t steps, int how, uintptr_t index,
           uintptr_t grad, uintptr_t out, int threads) {
            py::gil_scoped_release release;
            step_reduce_grad(at<const float>(value), at<const int64_t>(step), tokens, steps, how,
                             at<const int64_t>(index), at<const float>(grad), at<float>(out),
                             threads);
        },
        "Gradient of step_reduce by the values.");
    m.def(
        "step_expand",
        [](uintptr_t value, uintptr_t step, int64_t tokens, int64_t steps, bool last, uintptr_t out,
           int threads) {
            py::gil_scoped_release release;
            step_expand(at<const float>(value), at<const int64_t>(step), tokens, steps, last,
                        at<float>(out), threads);
        },
        "A step's value at every token of it, or at its last.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "reasonrl's native ops: raw pointers and sizes, no torch.";
    m.def("isa", [] { return ops().name; }, "The instruction set in use.");
    m.def("use_isa", &use_isa, "Use this instruction set; false where the CPU lacks it.");
    bind_logp(m);
    bind_policy(m);
    bind_segments(m);
    bind_attention(m);
    bind_layers(m);
    bind_draw(m);
    bind_adamw(m);
    bind_linear(m);
    bind_layer(m);
    bind_decode(m);
#ifdef WITH_CUDA
    bind_cuda(m);
#endif
}
