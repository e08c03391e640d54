// What the CUDA library exports: one table of layers, on a stream. The structs are those of gatewise.hpp; their
// pointers are the device's, except lengths, which the host reads. Calls enqueue work and return; a failure throws
// cuda::Error.
#pragma once
#include "device.hpp"
#include "gatewise/gatewise.hpp"

namespace gatewise::cuda {

template <class T> struct CellKernels {
  Sizes (*sizes)(const Problem<T>&);
  void (*forward)(const Forward<T>&, cudaStream_t);
  void (*backward)(const Backward<T>&, cudaStream_t);
};
struct Kernels {
  const char* cell;
  CellKernels<float> f32;
  CellKernels<double> f64;
};  // one row a cell

struct KernelList {
  const Kernels* begin;
  const Kernels* end;
};
KernelList kernels();

}  // namespace gatewise::cuda
