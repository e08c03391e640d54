// A stand-in for cuBLAS, where it is not installed: the functions that cublas.hpp looks for, as loops on the host that
// look at their arguments, and count. It computes where a stream would: the tests' streams run what they are given at
// once.
#include <cstddef>
#include <cstdint>

extern "C" {

struct fake_cublas_calls { int products, math_mode; } fake_cublas_calls;

struct Handle {
  void *stream, *workspace;
  int math_mode;
};
constexpr int invalid_value = 7;

int cublasCreate_v2(Handle** handle) { return *handle = new Handle{}, 0; }
int cublasSetStream_v2(Handle* handle, void* stream) {
  handle->stream = stream, handle->workspace = nullptr;  // as cuBLAS does
  return 0;
}
int cublasSetWorkspace_v2(Handle* handle, void* workspace, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(workspace) % 256 || bytes < (4 << 20)) return invalid_value;
  handle->workspace = workspace;
  static_cast<char*>(workspace)[0] = static_cast<char*>(workspace)[bytes - 1] = 0;
  return 0;
}
int cublasSetMathMode(Handle* handle, int mode) { return handle->math_mode = mode, 0; }
}

// C [m, n] = alpha op(A) op(B) + beta C, all column by column; 1: transposed
template <class T> static int gemm(Handle* handle, int op_a, int op_b, int m, int n, int k, const T* alpha, const T* a,
                                   int lda, const T* b, int ldb, const T* beta, T* c, int ldc) {
  if (!handle->stream || !handle->workspace || op_a < 0 || op_a > 1 || op_b < 0 || op_b > 1) return invalid_value;
  if (m < 1 || n < 1 || k < 1 || lda < (op_a ? k : m) || ldb < (op_b ? n : k) || ldc < m) return invalid_value;
  ++fake_cublas_calls.products, fake_cublas_calls.math_mode = handle->math_mode;
  for (std::ptrdiff_t j = 0; j < n; ++j)
    for (std::ptrdiff_t i = 0; i < m; ++i) {
      double sum = 0;
      for (std::ptrdiff_t l = 0; l < k; ++l)
        sum += double(a[op_a ? l + i * lda : i + l * lda]) * double(b[op_b ? j + l * ldb : l + j * ldb]);
      T& to = c[i + j * ldc];
      to = T(double(*alpha) * sum + (*beta == 0 ? 0 : double(*beta) * double(to)));
    }
  return 0;
}

extern "C" int cublasSgemm_v2(Handle* handle, int op_a, int op_b, int m, int n, int k, const float* alpha,
                              const float* a, int lda, const float* b, int ldb, const float* beta, float* c, int ldc) {
  return gemm(handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
extern "C" int cublasDgemm_v2(Handle* handle, int op_a, int op_b, int m, int n, int k, const double* alpha,
                              const double* a, int lda, const double* b, int ldb, const double* beta, double* c,
                              int ldc) {
  return gemm(handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
