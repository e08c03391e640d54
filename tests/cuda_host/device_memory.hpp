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
    sent_.push_back({const_cast<void*>(from), to, std::size_t(n) * sizeof(T)});
    copy(sent_.back(), cudaMemcpyHostToDevice);
    return to;
  }
  // Makes NaN of all that was sent, and sends it again
  void spoil() {
    for (const Pair& p : sent_)
      if (p.bytes) GATEWISE_CUDA_CHECK(cudaMemset(p.device, 0xff, p.bytes));
  }
  void send_again() {
    for (const Pair& p : sent_) copy(p, cudaMemcpyHostToDevice);
  }
  template <class T> T* result(void* host, Index n, bool added_to = false) {
    if (!host) return nullptr;
    const std::size_t bytes = std::size_t(n) * sizeof(T);
    T* const p = added_to ? send<T>(host, n) : static_cast<T*>(take(bytes));
    results_.push_back({host, p, bytes});
    return p;
  }
  void fetch() {
    for (const Pair& p : results_) copy(p, cudaMemcpyDeviceToHost);
  }

 private:
  struct Pair {
    void* host;
    void* device;
    std::size_t bytes;
  };
  static void copy(const Pair& p, cudaMemcpyKind kind) {
    const bool back = kind == cudaMemcpyDeviceToHost;
    if (p.bytes) GATEWISE_CUDA_CHECK(cudaMemcpy(back ? p.host : p.device, back ? p.device : p.host, p.bytes, kind));
  }
  std::vector<void*> blocks_;
  std::vector<Pair> sent_, results_;
};

}  // namespace gatewise::cuda
