// Arrays of 16-bit numbers, which the kernels compute with as floats: made wider before, and rounded after.
#pragma once
#include "device.hpp"
#include "kernels.hpp"

namespace gatewise::cuda {

__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(float x) { return x; }
// To nearest, ties to even; beyond the largest number to infinity; NaN stays one
__device__ __forceinline__ void round_to(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void round_to(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(float x, float& to) { to = x; }

constexpr unsigned kConvertThreads = 256, kConvertEach = 4;  // numbers of a thread, whose loads wait together

template <class From, class To> __global__ void convert(const From* from, Index n, To* to) {
  const Index first = Index(blockIdx.x) * (kConvertThreads * kConvertEach) + threadIdx.x;
  From some[kConvertEach];
#pragma unroll
  for (unsigned k = 0; k < kConvertEach; ++k)
    if (first + k * kConvertThreads < n) some[k] = from[first + k * kConvertThreads];
#pragma unroll
  for (unsigned k = 0; k < kConvertEach; ++k)
    if (first + k * kConvertThreads < n) round_to(wide(some[k]), to[first + k * kConvertThreads]);
}

template <class From, class To> void convert_all(const From* from, Index n, To* to, cudaStream_t stream) {
  if (n > 0)
    launch(convert<From, To>,
           {dim3(unsigned(ceil_div(n, kConvertThreads * kConvertEach))), dim3(kConvertThreads), 0, false}, stream, from,
           n, to);
}

}  // namespace gatewise::cuda
