// The table of the CUDA layers: every cell of cells.hpp, in float and double.
#include <iterator>

#include "layer.hpp"
#include "storage.hpp"

namespace gatewise::cuda {

namespace {
template <class List> struct Table;
template <class... Cell> struct Table<List<Cell...>> {
  static constexpr Kernels rows[sizeof...(Cell)] = {
      {info_of<Cell>(),
       {sizes<Cell, float>, forward<Cell, float>, backward<Cell, float>},
       {sizes<Cell, double>, forward<Cell, double>, backward<Cell, double>}}...};
};
}  // namespace

const Cublas* find_cublas() { return cublas_of_environment(); }

KernelList kernels() { return {std::begin(Table<Cells>::rows), std::end(Table<Cells>::rows)}; }

void widen(Storage storage, const void* from, Index n, float* to, cudaStream_t stream) {
  if (storage == Storage::float16) convert_all(static_cast<const __half*>(from), n, to, stream);
  else convert_all(static_cast<const __nv_bfloat16*>(from), n, to, stream);
}
void narrow(Storage storage, const float* from, Index n, void* to, cudaStream_t stream) {
  if (storage == Storage::float16) convert_all(from, n, static_cast<__half*>(to), stream);
  else convert_all(from, n, static_cast<__nv_bfloat16*>(to), stream);
}

}  // namespace gatewise::cuda
