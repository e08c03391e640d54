// Arrays of the host on the device and back, for the tests' drivers.
#pragma once
#include <vector>

#include "cuda/device.hpp"
#include "gatewise/gatewise.hpp"

namespace gatewise::cuda {

// Device memory of a call, freed with it
class Device {
 public:
  ~Device() {
    for (void* p : blocks_) cudaFree(p);
  }
  void* take(std::size_t bytes) {
    void* p = nullptr;
    GATEWISE_CUDA_CHECK(cudaMalloc(&p, bytes ? bytes : 1));
    blocks_.push_back(p);
    return p;
  }
  template <class T> T* send(const void* from, Index n) {
    if (!from) return nullptr;
    T* const to = static_cast<T*>(take(std::size_t(n) * sizeof(T)));
    if (n) GATEWISE_CUDA_CHECK(cudaMemcpy(to, from, std::size_t(n) * sizeof(T), cudaMemcpyHostToDevice));
    return to;
  }
  template <class T> T* result(void* host, Index n, bool added_to = false) {
    if (!host) return nullptr;
    const std::size_t bytes = std::size_t(n) * sizeof(T);
    T* const p = added_to ? send<T>(host, n) : static_cast<T*>(take(bytes));
    results_.push_back({host, p, bytes});
    return p;
  }
  void fetch() {
    for (const Result& r : results_)
      if (r.bytes) GATEWISE_CUDA_CHECK(cudaMemcpy(r.host, r.device, r.bytes, cudaMemcpyDeviceToHost));
  }

 private:
  struct Result {
    void* host;
    void* device;
    std::size_t bytes;
  };
  std::vector<void*> blocks_;
  std::vector<Result> results_;
};

}  // namespace gatewise::cuda
