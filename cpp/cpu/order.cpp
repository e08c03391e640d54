// The order of rows as callers see it: the same for every arch, and on a GPU.
#include <memory>

#include "rows.hpp"

namespace gatewise {

template <class T> void row_order(const Problem<T>& problem, Index* rows) {
  Arena counter(nullptr);
  Rows(counter, problem.dims.T, problem.dims.N, count_rows(problem));
  const std::unique_ptr<char[]> block(new char[counter.bytes()]);
  Arena arena(block.get());
  Rows order(arena, problem.dims.T, problem.dims.N, count_rows(problem));
  order.fill(problem);
  for (Index row = 0; row < order.count; ++row) rows[row] = order.place[row];
}
template void row_order(const Problem<float>&, Index*);
template void row_order(const Problem<double>&, Index*);

}  // namespace gatewise
