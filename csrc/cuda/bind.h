// The CUDA half of module.cpp: launches that raise reasonrl._C.CudaError, with its number in
// `code`.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "launch.h"

namespace reasonrl {

namespace py = pybind11;

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

}  // namespace reasonrl
