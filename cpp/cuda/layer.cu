// The table of the CUDA layers: every cell of cells.hpp, in float and double.
#include <iterator>

#include "layer.hpp"

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

}  // namespace gatewise::cuda
