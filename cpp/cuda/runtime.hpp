// CUDA's runtime library and its errors, for kernels and for plain C++ around them. The library is the toolkit's, but
// where "cuda_host.hpp" can be included, which runs kernels without a GPU: it belongs to the tests and is on no other
// include path.
#pragma once
#include <stdexcept>
#include <string>

#if !defined(__CUDACC__) && __has_include("cuda_host.hpp")
#include "cuda_host.hpp"
#else
#include <cuda_runtime.h>
#endif

namespace gatewise::cuda {

// A call of CUDA's that failed: which, where, the code's number, name and sentence
struct Error : std::runtime_error {
  Error(cudaError_t code, const char* call, const char* file, int line)
      : std::runtime_error(std::string(call) + ": error " + std::to_string(int(code)) + ", " + cudaGetErrorName(code) +
                           ": " + cudaGetErrorString(code) + " (" + file + ":" + std::to_string(line) + ")"),
        code(code) {}
  cudaError_t code;
};

inline void check(cudaError_t code, const char* call, const char* file, int line) {
  if (code == cudaSuccess) return;
  const Error error(code, call, file, line);
  cudaGetLastError();  // else the next call that asks for the last error would be blamed for this one
  throw error;
}
#define GATEWISE_CUDA_CHECK(call) ::gatewise::cuda::check((call), #call, __FILE__, __LINE__)

}  // namespace gatewise::cuda
