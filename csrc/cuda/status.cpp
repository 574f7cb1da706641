// Errors of the CUDA runtime in words, and whether this machine can run kernels at all.
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#include "launch.h"

namespace reasonrl {

const char* cuda_missing() {
    int driver = 0, devices = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        cudaGetLastError();
        return "no usable NVIDIA driver is installed";
    }
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        cudaGetLastError();
        return "the NVIDIA driver is too old for this build, or it finds no device";
    }
    return nullptr;
}

int cuda_finish(int code, void* stream) {
    const char* sync = getenv("REASONRL_CUDA_SYNC");
    if (code == 0 && sync && !strcmp(sync, "1")) code = cudaStreamSynchronize((cudaStream_t)stream);
    if (code != 0) cudaGetLastError();
    return code;
}

const char* cuda_error_name(int code) {
    return cudaGetErrorName((cudaError_t)code);
}

// the runtime's own text for a machine without a driver speaks of versions
const char* cuda_error_text(int code) {
    if (code == cudaErrorInsufficientDriver || code == cudaErrorNoDevice) {
        return "no usable NVIDIA driver or device";
    }
    return cudaGetErrorString((cudaError_t)code);
}

}  // namespace reasonrl
