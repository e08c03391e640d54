// The products of all steps by cuBLAS, where somebody asks for it: by the environment variable GATEWISE_CUBLAS, never
// by default. Its kernels change with the number of rows, so a row's bits would depend on its batch, which this library
// promises they do not (product.hpp keeps that). From run to run they stay, for the workspace is the call's own
// scratch. The library is opened when it is asked for and never linked; a name of cuBLAS's below is one of its
// functions.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "product.hpp"

namespace gatewise::cuda {

class Cublas {
 public:
  // What its kernels may use at most on any device; it must begin at a multiple of 256
  static constexpr std::size_t workspace_bytes = 32 << 20, workspace_alignment = 256;

  explicit Cublas(const std::string& file) : library_(dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!library_) throw std::runtime_error("GATEWISE_CUBLAS: " + std::string(dlerror()));
    find(create_, "cublasCreate_v2"), find(set_stream_, "cublasSetStream_v2");
    find(set_workspace_, "cublasSetWorkspace_v2"), find(set_math_mode_, "cublasSetMathMode");
    find(sgemm_, "cublasSgemm_v2"), find(dgemm_, "cublasDgemm_v2");
  }

  // A product whose rows are evenly strided. Sums of float are exact products', or, with tf32, rounded operands'.
  template <bool a_by_k, bool b_by_k, class T>
  void multiply(const Product<T>& p, bool tf32, void* workspace, cudaStream_t stream) const {
    const Lease lease(*this);
    // Its matrices lie column by column, in which order C^T = B^T A^T lies as C does in ours
    constexpr int as_it_is = 0, transposed = 1, pedantic = 2, of_tf32 = 3;
    const T one(1), before(p.add ? 1 : 0);
    require(set_stream_(lease.handle, stream), "cublasSetStream");
    require(set_workspace_(lease.handle, workspace, workspace_bytes), "cublasSetWorkspace");
    require(set_math_mode_(lease.handle, tf32 ? of_tf32 : pedantic), "cublasSetMathMode");
    require(
        gemm<T>()(lease.handle, b_by_k ? as_it_is : transposed, a_by_k ? transposed : as_it_is, p.N, p.M, p.K, &one,
                  p.b.numbers, int(p.b.stride), p.a.numbers, int(p.a.stride), &before, p.c.numbers, int(p.c.stride)),
        "cublasGemm");
  }

 private:
  using Handle = void*;
  template <class T>
  using Gemm = int (*)(Handle, int, int, int, int, int, const T*, const T*, int, const T*, int, const T*, T*, int);

  template <class F> void find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library_, name));
    if (!function) throw std::runtime_error("GATEWISE_CUBLAS: the library has no " + std::string(name));
  }
  static void require(int status, const char* call) {
    if (status) throw std::runtime_error(std::string(call) + ": status " + std::to_string(status));
  }
  template <class T> Gemm<T> gemm() const {
    if constexpr (sizeof(T) == 4) return sgemm_;
    else return dgemm_;
  }

  // A handle of the current device that nobody else has meanwhile. They are kept, and never destroyed: at the end of
  // the process the driver may be gone before.
  struct Lease {
    const Cublas& cublas;
    int device = 0;
    Handle handle = nullptr;

    explicit Lease(const Cublas& cublas) : cublas(cublas) {
      GATEWISE_CUDA_CHECK(cudaGetDevice(&device));
      {
        const std::lock_guard<std::mutex> lock(cublas.mutex_);
        std::vector<Handle>& idle = cublas.idle_[device];
        if (!idle.empty()) handle = idle.back(), idle.pop_back();
      }
      if (!handle) require(cublas.create_(&handle), "cublasCreate");
    }
    Lease(const Lease&) = delete;
    ~Lease() {
      const std::lock_guard<std::mutex> lock(cublas.mutex_);
      cublas.idle_[device].push_back(handle);
    }
  };

  void* library_;
  int (*create_)(Handle*);
  int (*set_stream_)(Handle, cudaStream_t);
  int (*set_workspace_)(Handle, void*, std::size_t);
  int (*set_math_mode_)(Handle, int);
  Gemm<float> sgemm_;
  Gemm<double> dgemm_;
  mutable std::mutex mutex_;
  mutable std::map<int, std::vector<Handle>> idle_;  // by device
};

inline const Cublas* cublas_of_environment() {
  const char* const asked = std::getenv("GATEWISE_CUBLAS");
  const std::string word = asked ? asked : "0";
  if (word.empty() || word == "0") return nullptr;
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<Cublas>> opened;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Cublas>& cublas = opened[word];
  if (!cublas && word != "1") cublas = std::make_unique<Cublas>(word);
  if (!cublas) {
    void* const newer = dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
    cublas = std::make_unique<Cublas>(newer ? "libcublas.so.13" : "libcublas.so.12");
  }
  return cublas.get();
}

// Row r of C = the bias, for a product that is then added
template <class T> __global__ void spread(const T* bias, Index rows, Index columns, RowsAt<T> to) {
  const Element e;
  if (e.in(rows, columns)) to[e.row][e.column] = bias[e.column];
}

// The products of all steps, by whom the caller wants
template <class T> struct LargeProducts {
  const Cublas* cublas;
  bool tf32;
  unsigned char* workspace;
  cudaStream_t stream;

  template <class Arena> LargeProducts(const Execution& execution, Arena& arena, cudaStream_t stream)
      : cublas(execution.cublas), tf32(execution.operands == Operands::tf32),
        workspace(
            arena.template take<unsigned char>(cublas ? Cublas::workspace_bytes + Cublas::workspace_alignment : 0)),
        stream(stream) {}

  template <class E> static bool even(const RowsAt<E>& rows, Index width) {
    return !rows.at && rows.stride >= width && rows.stride <= std::numeric_limits<int>::max();
  }
  // Whether cuBLAS makes a product of these rows
  template <bool a_by_k, bool b_by_k> bool by_cublas(const Product<T>& p) const {
    return cublas && even(p.a, a_by_k ? p.M : p.K) && even(p.b, b_by_k ? p.N : p.K) && even(p.c, p.N);
  }
  template <bool a_by_k, bool b_by_k> void multiply(Product<T> p) const {
    if (p.M <= 0 || p.N <= 0) return;
    if (p.K <= 0 || !by_cublas<a_by_k, b_by_k>(p)) return multiply_rows<a_by_k, b_by_k>(p, stream);
    if (p.bias) {
      launch(spread<T>, pointwise(p.M, p.N), stream, p.bias, Index(p.M), Index(p.N), p.c);
      p.bias = nullptr, p.add = true;
    }
    if (p.b.turn) {  // its rows are k's: in two ranges
      const Index first = p.b.count - p.b.turn;
      Product<T> rest = p;
      p.K = int(first), p.b = {p.b.numbers + p.b.turn * p.b.stride, p.b.stride};
      rest.K -= p.K, rest.a.numbers += a_by_k ? first * p.a.stride : first, rest.b.turn = 0, rest.add = true;
      multiply<a_by_k, b_by_k>(p);
      return multiply<a_by_k, b_by_k>(rest);
    }
    if (p.c.turn) {
      const Index first = p.c.count - p.c.turn;
      Product<T> rest = p;
      p.M = int(first), p.c = {p.c.numbers + p.c.turn * p.c.stride, p.c.stride};
      rest.M -= p.M, rest.a.numbers += a_by_k ? first : first * p.a.stride, rest.c.turn = 0;
      multiply<a_by_k, b_by_k>(p);
      return multiply<a_by_k, b_by_k>(rest);
    }
    const auto begin = reinterpret_cast<std::uintptr_t>(workspace);
    const std::uintptr_t aligned = ceil_div(Index(begin), Cublas::workspace_alignment) * Cublas::workspace_alignment;
    cublas->multiply<a_by_k, b_by_k>(p, tf32, reinterpret_cast<void*>(aligned), stream);
  }
};

}  // namespace gatewise::cuda
