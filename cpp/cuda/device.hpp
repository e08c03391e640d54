// The only header of CUDA's that kernels include. nvcc sees the real toolkit. Any other compiler sees "cuda_host.hpp",
// which runs the same source without a GPU (runtime.hpp).
// Whatever CUDA C++ cannot say (memory orders, matrix units, carving of shared memory) has one name here and two
// definitions: inline PTX, and a twin for the host. Nothing else in a kernel depends on the compiler.
#pragma once
#include <cstddef>
#include <utility>

#include "runtime.hpp"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GATEWISE_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define GATEWISE_SHARED_MEMORY(name) \
  const cuda_host::DynamicShared name {}
#endif

namespace gatewise::cuda {

// --- On the device ---------------------------------------------------------------------------------------------------

// Reads *p; what other blocks wrote before they added to it by add_release is visible afterwards.
// Every loop that waits for another thread goes through here: on the host it lets that thread run.
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
#ifdef __CUDACC__
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
#else
  cuda_host::yield();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}

// *p += v; what this thread wrote before, and saw written, is visible to whoever acquires the sum.
__device__ __forceinline__ void add_release(unsigned* p, unsigned v) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#else
  __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
  cuda_host::progress();
#endif
}

// Parts of the dynamic shared memory, one behind the other, each aligned to 16 bytes. All threads of a block take the
// same parts in the same order. The launch must ask for at least `used()` bytes.
//   GATEWISE_SHARED_MEMORY(bytes);
//   SharedMemory memory{bytes};
//   float* tile = memory.take<float>(n);
class SharedMemory {
 public:
#ifdef __CUDACC__
  __device__ __forceinline__ explicit SharedMemory(unsigned char* base) : base_(base) {}
#else
  explicit SharedMemory(cuda_host::DynamicShared) {}
#endif
  template <class T> __device__ __forceinline__ T* take(std::size_t n) {
    const std::size_t offset = (used_ + 15) / 16 * 16;
    used_ = offset + n * sizeof(T);
#ifdef __CUDACC__
    return reinterpret_cast<T*>(base_ + offset);
#else
    return static_cast<T*>(cuda_host::shared_part(offset, n * sizeof(T)));  // with guard bytes on either side
#endif
  }
  __device__ __forceinline__ std::size_t used() const { return used_; }

 private:
#ifdef __CUDACC__
  unsigned char* base_;
#endif
  std::size_t used_ = 0;
};

// The nearest number of 11 significant bits, ties away from zero: what mma_tf32 takes
__device__ __forceinline__ float to_tf32(float x) {
  const unsigned bits = __float_as_uint(x), exponent = 0x7f800000;
  return (bits & exponent) == exponent ? x : __uint_as_float((bits + 0x1000) & ~0x1fffu);
}

// d += A B by a whole warp, in the fragments of the PTX ISA. With g = lane / 4, t = lane % 4:
//   d[i]  D[g + 8 (i / 2)][2 t + i % 2]                                       16 x 8, float
// mma_tf32: A 16 x 8, B 8 x 8; the bits of floats, of which the last 13 are ignored
//   a[i]  A[g + 8 (i % 2)][t + 4 (i / 2)]        b[i]  B[t + 4 i][g]
// mma_bf16: A 16 x 16, B 16 x 8; two bfloat16 a register, the lower k in the lower half
//   a[i]  A[g + 8 (i % 2)][2 t + 8 (i / 2) + {0, 1}]      b[i]  B[2 t + 8 i + {0, 1}][g]
// They need compute capability 8.0; older code traps, and the launch plan never chooses it.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if !defined(__CUDACC__)
  cuda_host::mma_tf32(d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if !defined(__CUDACC__)
  cuda_host::mma_bf16(d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// --- On the host -----------------------------------------------------------------------------------------------------

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes;  // dynamic
  bool cooperative;          // all blocks resident at once, so that they may wait for each other
};

// Runs kernel(args...) on the stream. A function instead of <<<>>>, which only nvcc can read.
template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchShape& shape, cudaStream_t stream, A&&... args) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  GATEWISE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...));
}

}  // namespace gatewise::cuda
