// Wrong kernels on purpose: each must be caught by the shim, a sanitizer or the race detector.
#include "../../csrc/cuda/device.h"

#define PLANT(name, body)                                                          \
    __global__ void name##_kernel(float* out, int n) body extern "C" int plant_##name( \
        float* out, int n, void*) {                                                \
        return reasonrl::launch(1, nullptr, name##_kernel, out, n);                \
    }

using reasonrl::ALL_LANES;
using reasonrl::THREADS;

PLANT(clean, {
    SHARED(float, x, THREADS);
    x[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = x[THREADS - 1 - threadIdx.x];
})

PLANT(no_barrier, {
    SHARED(float, x, THREADS);
    x[threadIdx.x] = (float)threadIdx.x;
    out[threadIdx.x] = x[THREADS - 1 - threadIdx.x];
})

PLANT(early_return, {
    if (threadIdx.x == 7) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
})

PLANT(divergent, {
    if (threadIdx.x < 128) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
})

PLANT(half_warp, {
    float x = (float)threadIdx.x;
    if (threadIdx.x % 32 < 16) x = __shfl_down_sync(ALL_LANES, x, 1);
    out[threadIdx.x] = x;
})

PLANT(wrong_lane, {
    float x = 0.0f;
    if (threadIdx.x % 32 < 16) x = __shfl_sync(0xffffu, x, 20);
    out[threadIdx.x] = x;
})

PLANT(unwritten_shared, {
    SHARED(float, x, THREADS);
    out[threadIdx.x] = x[threadIdx.x];
})

PLANT(too_much_shared, {
    SHARED(float, x, 20000);
    x[threadIdx.x] = 0.0f;
})

PLANT(same_cell, { out[0] = (float)threadIdx.x; })

PLANT(past_the_end, { out[n + threadIdx.x / 255] = 1.0f; })

PLANT(past_shared, {
    SHARED(float, x, THREADS);
    x[threadIdx.x + 1] = 0.0f;
    out[threadIdx.x] = 0.0f;
})

__global__ void blocks_kernel(float* out) { out[0] += 1.0f; }

extern "C" int plant_blocks(float* out, int n, void*) {
    return reasonrl::launch(n, nullptr, blocks_kernel, out);
}

extern "C" int plant_too_many_threads(float* out, int, void*) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(2048);
    return cudaLaunchKernelEx(&config, blocks_kernel, out);
}
