// The launch plan as a library with a C interface, and NVIDIA's own occupancy calculator to hold it against: plans.py.
#include <climits>

#include "plan.hpp"
#if __has_include(<cuda_occupancy.h>)
#include <cuda_occupancy.h>
#define HAS_OCCUPANCY 1
#endif

using namespace gatewise;
using namespace gatewise::cuda;

extern "C" {

void plan(const DeviceLimits* device, const StepProblem* problem, Plan* out) { *out = plan_layer(*device, *problem); }

const char* reason_sentence(int reason) { return sentence(static_cast<Reason>(reason)); }

Index resident(const DeviceLimits* device, Index threads, Index registers, Index shared_bytes) {
  return resident_blocks(*device, threads, registers, shared_bytes);
}

// The least H that gets no persistent plan, less one; H and R of the problem are not looked at.
Index largest_H(const DeviceLimits* device, const StepProblem* problem) {
  StepProblem tried = *problem;
  for (Index H = 1;; ++H) {
    tried.H = tried.R = H;
    if (!plan_layer(*device, tried).persistent()) return H - 1;
  }
}

#ifdef HAS_OCCUPANCY
static cudaOccDeviceProp properties(const DeviceLimits& device) {
  cudaOccDeviceProp p{};
  p.computeMajor = int(device.major), p.computeMinor = int(device.minor);
  p.maxThreadsPerBlock = int(device.threads_per_block);
  p.maxThreadsPerMultiprocessor = int(device.threads_per_multiprocessor);
  p.regsPerBlock = p.regsPerMultiprocessor = int(device.registers_per_multiprocessor);
  p.warpSize = int(device.warp_size), p.numSms = int(device.multiprocessors);
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerBlockOptin = device.shared_per_block;
  p.sharedMemPerMultiprocessor = device.shared_per_multiprocessor;
  p.reservedSharedMemPerBlock = device.major >= 8 ? 1024 : 0;
  return p;
}

// Resident blocks by NVIDIA's count; -1 where it knows no such device.
Index nvidia_resident(const DeviceLimits* device, Index threads, Index registers, Index shared_bytes) {
  const cudaOccDeviceProp p = properties(*device);
  cudaOccFuncAttributes attributes{};
  attributes.maxThreadsPerBlock = INT_MAX, attributes.numRegs = int(registers), attributes.numBlockBarriers = 1;
  attributes.partitionedGCConfig = PARTITIONED_GC_OFF;
  attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  attributes.maxDynamicSharedSizeBytes = shared_bytes;
  cudaOccDeviceState state{};
  cudaOccResult result{};
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &attributes, &state, int(threads), shared_bytes);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

// Whether NVIDIA's header has this device's most blocks and most shared memory a multiprocessor.
bool nvidia_knows(const DeviceLimits* device) {
  const cudaOccDeviceProp p = properties(*device);
  int blocks = 0;
  std::size_t least = device->shared_per_multiprocessor, more = least + 1;
  return cudaOccMaxBlocksPerMultiprocessor(&blocks, &p) == CUDA_OCC_SUCCESS &&
         blocks == device->blocks_per_multiprocessor &&
         cudaOccAlignUpShmemSizeVoltaPlus(&least, &p) == CUDA_OCC_SUCCESS &&
         Index(least) == device->shared_per_multiprocessor &&
         cudaOccAlignUpShmemSizeVoltaPlus(&more, &p) != CUDA_OCC_SUCCESS;
}
#endif
}
