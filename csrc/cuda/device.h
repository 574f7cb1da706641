// The one place where nvcc and the CPU shim of the tests differ; first include of every .cu file.
//
// Rules of these sources, so that the same files run on a CPU: launch by cudaLaunchKernelEx, shared
// memory by SHARED, warp operations in their _sync form with an explicit mask, no inline PTX, no
// asynchronous copies, no waiting of one block for another.
#pragma once

#ifdef SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
#define SHARED(type, name, count) __shared__ type name[count]
#endif

#include <stdint.h>

namespace reasonrl {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Sums of K numbers over the block, in a fixed order; every thread gets them. Entry `top` is a
// maximum.
template <int K>
__device__ void block_sums(double (&x)[K], double* slots, int top = -1) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int k = 0; k < K; k++) {
        for (int step = 16; step > 0; step /= 2) {
            const double other = __shfl_down_sync(ALL_LANES, x[k], step);
            x[k] = k == top ? (other > x[k] ? other : x[k]) : x[k] + other;
        }
        if (lane == 0) slots[warp * K + k] = x[k];
    }
    __syncthreads();
    for (int k = 0; k < K; k++) {
        x[k] = slots[k];
        for (int w = 1; w < WARPS; w++) {
            const double other = slots[w * K + k];
            x[k] = k == top ? (other > x[k] ? other : x[k]) : x[k] + other;
        }
    }
    __syncthreads();  // the next call writes the slots again
}

template <typename... Parameters, typename... Arguments>
int launch(int64_t blocks, void* stream, void (*kernel)(Parameters...), Arguments... arguments) {
    if (blocks == 0) return 0;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(THREADS);
    config.stream = (cudaStream_t)stream;
    return (int)cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace reasonrl
