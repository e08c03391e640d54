// What the CUDA library exports: one table of layers, on a stream. The structs are those of gatewise.hpp; their
// pointers are the device's, except lengths, which the host reads. Calls enqueue work and return; a failure throws
// cuda::Error.
#pragma once
#include "gatewise/gatewise.hpp"
#include "plan.hpp"
#include "runtime.hpp"

namespace gatewise::cuda {

// How the steps are run. The plan decides (plan.hpp), unless a caller, as a test or a benchmark, does: persistent then
// throws std::invalid_argument with the plan's reason where it does not fit.
enum class Loop { planned, persistent, stepwise };

// What the operands of the recurrent product are rounded to, so that tensor cores can multiply them. Sums are float's
// always; double's products are never rounded.
enum class Operands { exact, tf32, bf16 };

class Cublas;                 // cublas.hpp
const Cublas* find_cublas();  // what GATEWISE_CUBLAS names, 1: any that is installed; null where it is 0 or not set

struct Execution {
  DeviceLimits device;  // of the stream's device
  Loop loop = Loop::planned;
  Operands operands = Operands::exact;
  const Cublas* cublas = nullptr;  // that makes the products of all steps, or null: our own kernels do
};

// Of a device, asked one attribute at a time: cudaGetDeviceProperties() takes milliseconds.
inline DeviceLimits device_limits(int device) {
  const auto value = [&](cudaDeviceAttr attribute) {
    int found = 0;
    GATEWISE_CUDA_CHECK(cudaDeviceGetAttribute(&found, attribute, device));
    return Index(found);
  };
  return {value(cudaDevAttrMultiProcessorCount),
          value(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          value(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          value(cudaDevAttrMaxRegistersPerMultiprocessor),
          value(cudaDevAttrMaxThreadsPerBlock),
          value(cudaDevAttrMaxThreadsPerMultiProcessor),
          value(cudaDevAttrMaxBlocksPerMultiprocessor),
          value(cudaDevAttrWarpSize),
          value(cudaDevAttrL2CacheSize),
          value(cudaDevAttrComputeCapabilityMajor),
          value(cudaDevAttrComputeCapabilityMinor)};
}

template <class T> struct CellKernels {
  Sizes (*sizes)(const Problem<T>&, const Execution&);
  void (*forward)(const Forward<T>&, const Execution&, cudaStream_t);
  void (*backward)(const Backward<T>&, const Execution&, cudaStream_t);
};
struct Kernels {
  CellInfo info;
  CellKernels<float> f32;
  CellKernels<double> f64;
};  // one row a cell

struct KernelList {
  const Kernels* begin;
  const Kernels* end;
};
KernelList kernels();

// n numbers of an array from 16 bits to floats, or back: rounded to nearest, ties to even; NaN stays one
enum class Storage { float16, bfloat16 };
void widen(Storage, const void* from, Index n, float* to, cudaStream_t);
void narrow(Storage, const float* from, Index n, void* to, cudaStream_t);

}  // namespace gatewise::cuda
