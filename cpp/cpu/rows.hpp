// Rows: the order in which kernels walk a batch. Sequences are sorted by length, longest first, so that at step s
// the live ones are a prefix, and work is proportional to the steps that exist. A packed row is one live (s, i)
// pair, i being the sorted position; everything the kernels keep for themselves is stored by packed row. Lengths,
// order, direction and layout are therefore nothing but `place` and `x_at`, where a packed row is in the caller's
// arrays.
#pragma once
#include "gatewise/arch.hpp"
#include "gatewise/gatewise.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH { namespace {

// Carves aligned arrays from one block. With a null block it only counts, so one function both sizes and places.
class Arena {
 public:
  explicit Arena(void* block) : block_(reinterpret_cast<std::uintptr_t>(block)) {}
  template <class T> T* take(Index n) {
    const std::uintptr_t at = (block_ + used_ + kAlign - 1) / kAlign * kAlign;
    used_ = at - block_ + std::size_t(n) * sizeof(T);
    return reinterpret_cast<T*>(at);
  }
  std::size_t bytes() const { return used_ + kAlign; }  // the real block may start anywhere

 private:
  static constexpr std::uintptr_t kAlign = 64;  // a cache line
  std::uintptr_t block_;
  std::size_t used_ = 0;
};

struct Range {
  Index begin, end;
  Index size() const { return end - begin; }
};
inline Range share(Index n, int id, int parts) { return {n * id / parts, n * (id + 1) / parts}; }
constexpr Index least(Index a, Index b) { return a < b ? a : b; }
inline Index between(Index low, Index x, Index high) { return x < low ? low : least(x, high); }

template <class T> Index length_of(const Problem<T>& p, Index n) {
  return p.sequence.lengths ? p.sequence.lengths[n] : p.dims.T;
}
// Where in time the walk through a sequence is at its step s
template <class T> Index time_of(const Problem<T>& p, Index s, Index n) {
  return p.sequence.reverse ? length_of(p, n) - 1 - s : s;
}
template <class T> Index count_rows(const Problem<T>& p) {
  if (!p.sequence.lengths) return p.dims.T * p.dims.N;
  Index rows = 0;
  for (Index n = 0; n < p.dims.N; ++n) rows += p.sequence.lengths[n];
  return rows;
}

struct Rows {
  Index count;    // live (s, i) pairs
  Index* order;   // [N] sorted position -> n
  Index* offset;  // [T+1] first packed row of step s
  Index* place;   // [count] packed row -> its row of y, dy, dx and reset
  Index* x_at;    // [count] packed row -> where in x its numbers begin

  Rows(Arena& arena, Index T, Index N, Index count)
      : count(count), order(arena.take<Index>(N)), offset(arena.take<Index>(T + 1)), place(arena.take<Index>(count)),
        x_at(arena.take<Index>(count)) {}

  Index live(Index s) const { return offset[s + 1] - offset[s]; }

  // order and offset
  template <class T> void sort(const Problem<T>& p) {
    const Index steps = p.dims.T, N = p.dims.N;
    // Counting sort. Before placing, offset[l] = sequences longer than l, the first position of length l;
    // placing advances it to sequences of length l or more, which is the live count of step l - 1.
    for (Index l = 0; l <= steps; ++l) offset[l] = 0;
    for (Index n = 0; n < N; ++n) ++offset[length_of(p, n)];
    for (Index l = steps, longer = 0; l >= 0; --l) {
      const Index same = offset[l];
      offset[l] = longer;
      longer += same;
    }
    for (Index n = 0; n < N; ++n) order[offset[length_of(p, n)]++] = n;
    offset[0] = 0;
    for (Index s = 0; s < steps; ++s) offset[s + 1] += offset[s];
  }

  template <class T> void fill(const Problem<T>& p) {
    const Index steps = p.dims.T, N = p.dims.N;
    const Sequence<T>& of = p.sequence;
    sort(p);
    const bool packed = of.layout == Layout::packed;  // there the order is the caller's own, and so is `offset`
    const Index per_step = of.layout == Layout::time_major ? N : 1,
                per_sequence = of.layout == Layout::time_major ? 1 : steps;
    for (Index s = 0; s < steps; ++s)
      for (Index i = 0; i < live(s); ++i) {
        const Index row = offset[s] + i, n = order[i], t = time_of(p, s, n);
        place[row] = packed ? offset[t] + i : t * per_step + n * per_sequence;
        x_at[row] = packed ? place[row] * of.step_stride : t * of.step_stride + n * of.sequence_stride;
      }
  }
};

// The sorted positions that thread `id` owns when rows are split: contiguous, about equal in live steps. Blocks of
// positions are never split.
template <class T> Range own_positions(const Problem<T>& p, const Rows& rows, int id, int parts, Index block = 1) {
  Range own{p.dims.N, p.dims.N};
  Index before = 0;
  for (Index i = 0; i < p.dims.N; i += block) {
    const Index part = rows.count ? before * parts / rows.count : 0;
    if (part >= id && own.begin == p.dims.N) own.begin = i;
    if (part > id) {
      own.end = i;
      break;
    }
    for (Index k = i; k < least(i + block, p.dims.N); ++k) before += length_of(p, rows.order[k]);
  }
  if (own.begin > own.end) own.begin = own.end;
  return own;
}

}}}  // namespace gatewise::GATEWISE_ARCH
