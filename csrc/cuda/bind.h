// The CUDA half of module.cpp: launches that raise reasonrl._C.CudaError, with its number in
// `code`.
#pragma once

#include <string>

#include "../bind.h"
#include "launch.h"

namespace reasonrl {

struct CudaFailure {
    int code;
    std::string text;
};

// Runs one launcher without the GIL; throws only once it is held again.
template <typename... Parameters, typename... Arguments>
void cuda_run(const char* op, void* stream, int (*launcher)(Parameters...),
              Arguments... arguments) {
    int code;
    {
        py::gil_scoped_release release;
        code = cuda_finish(launcher(arguments..., stream), stream);
    }
    if (code == 0) return;
    throw CudaFailure{code, std::string(op) + ": " + cuda_error_name(code) + " (" +
                                std::to_string(code) + "): " + cuda_error_text(code)};
}

inline void bind_cuda_error(py::module_& m) {
    static PyObject* type = nullptr;
    type = PyErr_NewException("reasonrl._C.CudaError", PyExc_RuntimeError, nullptr);
    m.attr("CudaError") = py::handle(type);
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const CudaFailure& failure) {
            py::object error = py::handle(type)(failure.text);
            error.attr("code") = failure.code;
            PyErr_SetObject(type, error.ptr());
        }
    });
}

inline PolicyTask policy_task(uintptr_t logp, uintptr_t old_logp, uintptr_t advantage,
                              uintptr_t ref_logp, uintptr_t entropy, uintptr_t weight,
                              uintptr_t mask, uintptr_t cu, uintptr_t divisors, uintptr_t grad_logp,
                              uintptr_t grad_entropy, uintptr_t sums, uintptr_t loss,
                              uintptr_t metrics, uintptr_t arrived, int64_t tokens, int64_t batch,
                              bool per_completion, double divisor, double entropy_divisor) {
    return {at<const float>(logp),
            at<const float>(old_logp),
            at<const float>(advantage),
            at<const float>(ref_logp),
            at<const float>(entropy),
            at<const float>(weight),
            at<const uint8_t>(mask),
            at<const int64_t>(cu),
            at<const double>(divisors),
            at<float>(grad_logp),
            at<float>(grad_entropy),
            at<double>(sums),
            at<float>(loss),
            at<float>(metrics),
            at<int>(arrived),
            tokens,
            batch,
            per_completion,
            divisor,
            entropy_divisor};
}

inline CreditTask credit_task(uintptr_t outcome, uintptr_t group, uintptr_t scored,
                              uintptr_t token_reward, uintptr_t step_reward, uintptr_t step_scored,
                              uintptr_t step, uintptr_t step_cu, bool tokens_paid, int kind,
                              int pay, bool by_place, bool divide, bool verl_baseline, double gamma,
                              double ddof, double eps, double outcome_weight, double process_weight,
                              uintptr_t relative, uintptr_t mean, uintptr_t value) {
    return {at<const float>(outcome),
            at<const int64_t>(group),
            at<const uint8_t>(scored),
            at<const float>(token_reward),
            at<const float>(step_reward),
            at<const uint8_t>(step_scored),
            at<const int64_t>(step),
            at<const int64_t>(step_cu),
            tokens_paid,
            kind,
            pay,
            by_place,
            divide,
            verl_baseline,
            gamma,
            ddof,
            eps,
            outcome_weight,
            process_weight,
            at<double>(relative),
            at<double>(mean),
            at<double>(value)};
}

inline void bind_cuda(py::module_& m) {
    bind_cuda_error(m);
    m.def("cuda_missing", [] { return cuda_missing(); }, "Why kernels cannot run here, or None.");
    py::class_<PolicyTask>(m, "PolicyTask", "Device pointers of the policy loss; see launch.h.")
        .def(py::init(&policy_task));
    m.def(
        "cuda_policy_items",
        [](const Loss& loss, int64_t tokens, int64_t batch, bool per_completion, bool credited) {
            return reasonrl_policy_items(&loss, tokens, batch, per_completion, credited);
        },
        "Rows of PolicyTask.sums.");
    m.def(
        "cuda_policy",
        [](const Loss& loss, const PolicyTask& task, uintptr_t stream) {
            cuda_run("policy", at<void>(stream), reasonrl_policy, &loss, &task);
        },
        "Loss, metrics, dL/dlogp and dL/dentropy.");
    py::class_<CreditTask>(m, "CreditTask", "Device pointers of a credit; see launch.h.")
        .def(py::init(&credit_task));
    m.def(
        "cuda_core",
        [](const Loss& loss, const PolicyTask& task, const CreditTask& credit, uintptr_t stream) {
            cuda_run("core", at<void>(stream), reasonrl_core, &loss, &task, &credit);
        },
        "The same from rewards: the fused core.");
    m.def(
        "cuda_credit_advantage",
        [](const CreditTask& credit, uintptr_t cu, uintptr_t mask, int64_t batch, uintptr_t out,
           uintptr_t stream) {
            cuda_run("credit_advantage", at<void>(stream), reasonrl_credit_advantage, &credit,
                     at<const int64_t>(cu), at<const uint8_t>(mask), batch, at<float>(out));
        },
        "The advantages (N,) that follow from the rewards.");
    m.def(
        "cuda_count_tokens",
        [](uintptr_t mask, uintptr_t cu, int64_t batch, uintptr_t counts, uintptr_t stream) {
            cuda_run("count_tokens", at<void>(stream), reasonrl_count_tokens,
                     at<const uint8_t>(mask), at<const int64_t>(cu), batch, at<int64_t>(counts));
        },
        "Unmasked tokens of each completion.");
    m.def(
        "cuda_group_advantage",
        [](uintptr_t reward, uintptr_t group, uintptr_t scored, int64_t batch, int kind,
           double ddof, double eps, uintptr_t out, uintptr_t stream) {
            cuda_run("group_advantage", at<void>(stream), reasonrl_group_advantage,
                     at<const float>(reward), at<const int64_t>(group), at<const uint8_t>(scored),
                     batch, kind, ddof, eps, at<float>(out));
        },
        "Rewards relative to their group.");
    m.def(
        "cuda_returns",
        [](uintptr_t reward, uintptr_t cu, uintptr_t mask, int64_t batch, double gamma,
           bool forward, uintptr_t out, uintptr_t stream) {
            cuda_run("returns", at<void>(stream), reasonrl_returns, at<const float>(reward),
                     at<const int64_t>(cu), at<const uint8_t>(mask), batch, gamma, (int)forward,
                     at<float>(out));
        },
        "Discounted reverse sums per completion; forward sums are their gradient.");
    m.def(
        "cuda_step_reduce",
        [](uintptr_t value, uintptr_t order, uintptr_t offsets, int64_t steps, int how,
           uintptr_t out, uintptr_t index, uintptr_t stream) {
            cuda_run("step_reduce", at<void>(stream), reasonrl_step_reduce, at<const float>(value),
                     at<const int64_t>(order), at<const int64_t>(offsets), steps, how,
                     at<float>(out), at<int64_t>(index));
        },
        "One value per step; index keeps what the gradient needs.");
    m.def(
        "cuda_step_reduce_grad",
        [](uintptr_t value, uintptr_t order, uintptr_t offsets, int64_t steps, int how,
           uintptr_t index, uintptr_t grad, uintptr_t out, uintptr_t stream) {
            cuda_run("step_reduce_grad", at<void>(stream), reasonrl_step_reduce_grad,
                     at<const float>(value), at<const int64_t>(order), at<const int64_t>(offsets),
                     steps, how, at<const int64_t>(index), at<const float>(grad), at<float>(out));
        },
        "Gradient of step_reduce by the values.");
    m.def(
        "cuda_step_expand",
        [](uintptr_t value, uintptr_t step, int64_t tokens, uintptr_t out, uintptr_t stream) {
            cuda_run("step_expand", at<void>(stream), reasonrl_step_expand, at<const float>(value),
                     at<const int64_t>(step), tokens, at<float>(out));
        },
        "A step's value at every token of it.");
}

}  // namespace reasonrl
