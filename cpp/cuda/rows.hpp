// The order of a batch, as cpu/rows.hpp has it, made on the device. What crosses are the places and lengths of the
// sequences, and those only if lengths are given: as parameters of kernels, which are copied when a kernel is launched,
// or captured. So nothing that the host could free meanwhile is read later.
#pragma once
#include "../cpu/rows.hpp"
#include "product.hpp"

namespace gatewise::cuda {

// Sequences by sorted position: as many as fit the parameters of a kernel, 4 KiB, with room to spare
struct SomeSequences {
  static constexpr Index most = 256;
  struct { std::int32_t n, length; } of[most];
};

struct RowOrder {
  Index steps, N;
  bool equal;  // all of them have all steps
  bool reverse;
  Layout layout;
  Index step_stride, sequence_stride;  // of x
  Index *order, *length;               // [N]
  Index *offset, *place, *x_at;        // as in Rows
};

// The kernels are templates, as all here, so that a header can hold them; Order is RowOrder.

// Sequences [begin, begin + count) of the order
template <class Order> __global__ void put_sequences(SomeSequences some, Index begin, Index count, Order rows) {
  const Element e;
  if (!e.in(1, count)) return;
  rows.order[begin + e.column] = some.of[e.column].n;
  rows.length[begin + e.column] = some.of[e.column].length;
}

// offset of each step, and, where all are equal, the order: one thread a step or sequence
template <class Order> __global__ void start_rows(Order rows) {
  const Element e;
  const Index k = e.column;
  if (e.row > 0) return;
  if (rows.equal && k < rows.N) rows.order[k] = k, rows.length[k] = rows.steps;
  if (k > rows.steps) return;
  Index before = rows.equal ? k * rows.N : 0;
  if (!rows.equal)
    for (Index i = 0; i < rows.N; ++i) before += rows.length[i] < k ? rows.length[i] : k;
  rows.offset[k] = before;
}

// place and x_at of [steps, N], those that are live
template <class Order> __global__ void place_rows(Order rows) {
  const Element e;
  if (!e.in(rows.steps, rows.N)) return;
  const Index s = e.row, i = e.column, n = rows.order[i], t = rows.reverse ? rows.length[i] - 1 - s : s;
  if (s >= rows.length[i]) return;
  const bool packed = rows.layout == Layout::packed, time_major = rows.layout == Layout::time_major;
  const Index row = rows.offset[s] + i;
  const Index place = packed ? rows.offset[t] + i : time_major ? t * rows.N + n : t + n * rows.steps;
  rows.place[row] = place;
  rows.x_at[row] = packed ? place * rows.step_stride : t * rows.step_stride + n * rows.sequence_stride;
}

}  // namespace gatewise::cuda
