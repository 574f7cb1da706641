// The one place where nvcc and the CPU shim of the tests differ; first include of every .cu file.
//
// Rules of these sources, so that the same files run on a CPU: launch by cudaLaunchKernelEx, shared
// memory by SHARED, warp operations in their _sync form with an explicit mask, no inline PTX, no
// asynchronous copies, no waiting of one block for another. One atomic: the ticket of comes_last.
#pragma once

#ifdef SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
#define SHARED(type, name, count) __shared__ type name[count]
#define ROLLED _Pragma("unroll 1")
#define UNROLLED _Pragma("unroll")
#endif

#include <stdint.h>

namespace reasonrl {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline double fold(double a, double b, bool top) {
    if (top) return b > a ? b : a;
    return a + b;
}

// Sums of K numbers over the block, in a fixed order; every thread gets them. Entries whose bit is
// set in `tops` are maxima.
template <int K>
__device__ void block_sums(double (&x)[K], double* slots, unsigned tops = 0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int k = 0; k < K; k++) {
        const bool top = (tops >> k) & 1u;
        for (int step = 16; step > 0; step /= 2) {
            x[k] = fold(x[k], __shfl_down_sync(ALL_LANES, x[k], step), top);
        }
        if (lane == 0) slots[warp * K + k] = x[k];
    }
    __syncthreads();
    for (int k = 0; k < K; k++) {
        const bool top = (tops >> k) & 1u;
        x[k] = slots[k];
        ROLLED  // unrolled, all K sums of all warps would be in registers at once
            for (int w = 1; w < WARPS; w++) x[k] = fold(x[k], slots[w * K + k], top);
    }
    __syncthreads();  // the next call writes the slots again
}

// R -> a R + b, what a run of tokens does to the return that enters it
struct Affine {
    double a, b;
};

__device__ inline Affine after(Affine first, Affine second) {
    return {second.a * first.a, second.a * first.b + second.b};
}

// A tile of the scan: what enters each thread's run from the threads before it and the carry.
__device__ inline double scan_before(Affine run, double* carry, Affine* totals) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        const double a = __shfl_up_sync(ALL_LANES, run.a, step);
        const double b = __shfl_up_sync(ALL_LANES, run.b, step);
        if (lane >= step) run = after({a, b}, run);
    }
    if (lane == 31) totals[warp] = run;
    __syncthreads();
    double entering = *carry;
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) entering = *carry;
        *carry = totals[w].a * *carry + totals[w].b;
    }
    __syncthreads();  // the next tile writes the totals again
    const double a = __shfl_up_sync(ALL_LANES, run.a, 1);
    const double b = __shfl_up_sync(ALL_LANES, run.b, 1);
    return lane == 0 ? entering : a * entering + b;
}

// Whether this block is the last of the launch to come here; it then sees what the others wrote.
__device__ inline bool comes_last(int* arrived) {
    SHARED(int, last, 1);
    if (threadIdx.x == 0) {
        __threadfence();
        last[0] = atomicAdd(arrived, 1) == (int)gridDim.x - 1;
        if (last[0]) *arrived = 0;  // as the next launch expects it
    }
    __syncthreads();
    __threadfence();
    return last[0];
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
