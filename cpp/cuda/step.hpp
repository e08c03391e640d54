// The kernels between the products: the cell on the rows of a step, forward and backward, what is standardised, and
// what frames the loop. A packed row is one live (step, sequence) pair, as in cpu/rows.hpp: i is a sequence's sorted
// position, offset[s] + i its packed row at step s. One thread an element, unless a kernel says otherwise; no two
// threads write the same number, and every sum is taken in one order.
#pragma once
#include <cmath>

#include "device.hpp"
#include "gatewise/cells.hpp"
#include "gatewise/gatewise.hpp"
#include "gatewise/random.hpp"
#include "product.hpp"

namespace gatewise::cuda {

// Compile-time facts about a cell; blocks of gate gradients as in cpu/pass.hpp: a split cell stores its last gate
// twice, [dgx of the last | the gates before | dgh of the last], so that both parts are contiguous, dgx rotated by a
// gate.
template <class Cell> struct Facts {
  static constexpr int G = Cell::G, S = Cell::S, U = Cell::U;
  static constexpr bool staged = Cell::middle != Middle::none;
  static constexpr bool may_project = Cell::has_c && !staged;
  static constexpr int cell_units = staged ? Cell::output_unit : U;  // those whose gradients `backward` makes
  static constexpr int product_gates = Cell::middle == Middle::product ? G - 1 : G;
  static constexpr int x_block = 0, h_block = Cell::normed ? G : Cell::split ? 1 : 0, D = h_block + G;
  __host__ __device__ static constexpr int x_slot(int gate) { return Cell::split ? (gate + 1) % G : gate; }
  __host__ __device__ static constexpr int h_slot(int gate) { return h_block + gate; }
  // The gates' input parts wait for the cell where their gates are kept, unless the stage's output needs them after it
  static constexpr bool x_in_saved = Cell::middle != Middle::product;
  static constexpr int x_at = Cell::normed ? G : 0;  // in blocks of a row of `saved`
};

// What kernels of a step know of the problem. Pointers are the device's.
template <class T> struct Walk {
  Index steps, N, H, R;
  const Index *order, *offset, *place, *length;  // as in cpu/rows.hpp; length [N] by sorted position
  const T *h0, *c0, *h_mask, *w_unit;
  const unsigned char* reset;
  bool reverse, reset_to_initial, clips;
  T clip;
  Zoneout zones;

  __device__ Index row(Index s, Index i) const { return offset[s] + i; }
  // Whether the state of position i starts anew before step s; see cpu/pass.hpp
  __device__ bool restarts(Index s, Index i) const {
    if (!reset) return false;
    if (reverse) return s > 0 && reset[place[row(s - 1, i)]];
    return reset[place[row(s, i)]];
  }
  // Whether the state after step s ends there, because the next step starts anew
  __device__ bool cut(Index s, Index i) const { return reset && s + 1 < length[i] && restarts(s + 1, i); }
  // Whether a reset at the very first step drops the initial state
  __device__ bool starts_from_zero(Index i) const { return !reset_to_initial && length[i] > 0 && restarts(0, i); }

  // Unit k of the state that a sequence starts from, or restarts from
  __device__ T start_h(bool restarted, Index i, Index k) const {
    return h0 && (!restarted || reset_to_initial) ? h0[order[i] * R + k] : T(0);
  }
  __device__ T start_c(bool restarted, Index i, Index k) const {
    return c0 && (!restarted || reset_to_initial) ? c0[order[i] * H + k] : T(0);
  }
  // Unit k of the state before step s
  __device__ T previous_h(const T* y, Index s, Index i, Index k) const {
    const bool restarted = restarts(s, i);
    return s > 0 && !restarted ? y[place[row(s - 1, i)] * R + k] : start_h(restarted, i, k);
  }
  // c: that of position 0 after the step before
  __device__ T previous_c(const T* c, Index s, Index i, Index k) const {
    const bool restarted = restarts(s, i);
    return s > 0 && !restarted ? c[i * H + k] : start_c(restarted, i, k);
  }
  __device__ T mask(Index i, Index k) const { return h_mask ? h_mask[order[i] * R + k] : T(1); }

  __device__ bool zoned() const { return zones.h > 0 || zones.c > 0; }
  // Zoneout, as the weight of the previous state
  __device__ State<T> zoneout(Index s, Index i, Index k) const {
    if (!zones.drawn) return {T(zones.h), T(zones.c)};
    const Index n = order[i], t = reverse ? length[i] - 1 - s : s;
    const std::uint32_t of_h = random_bits(random_key(zones.seed, t, n), std::uint32_t(k));
    const auto drawn = [](std::uint32_t bits, double probability) {
      return T(std::int32_t(bits >> 1) < random_limit(probability) ? 1 : 0);
    };
    return {drawn(of_h, zones.h), drawn(more_bits(of_h), zones.c)};
  }
  template <int U> __device__ Unit<T, U> unit(Index k) const {
    Unit<T, U> own;
    for (int u = 0; u < U; ++u) own.w[u] = w_unit[u * H + k];
    own.clip = clip, own.clips = clips;
    return own;
  }
};

// A product as its parts left it: [count][rows][columns]
template <class T> struct Parts {
  const T* numbers = nullptr;
  Index stride = 0, part_stride = 0, count = 1;

  __device__ T operator()(Index row, Index column) const {
    const T* from = numbers + row * stride + column;
    T sum = *from;
    for (Index z = 1; z < count; ++z) sum = sum + from[z * part_stride];
    return sum;
  }
};

// ---- Forward

// bias [G * H]: what is added to gx. The last gate of a split cell leaves b_hh to the step, where r acts on it too.
template <class T> __global__ void add_biases(const T* b_ih, const T* b_hh, Index apart, Index size, T* bias) {
  const Element e;
  if (!e.in(1, size)) return;
  const Index k = e.column;
  const T ih = b_ih ? b_ih[k] : T(0), hh = b_hh && k < apart ? b_hh[k] : T(0);
  bias[k] = ih + hh;
}

// entering [live, R]: what meets w_hh in step s
template <class T> __global__ void enter(Walk<T> walk, Index s, Index live, const T* y, T* entering) {
  const Element e;
  if (!e.in(live, walk.R)) return;
  const Index i = e.row, k = e.column;
  entering[i * walk.R + k] = walk.previous_h(y, s, i, k) * walk.mask(i, k);
}

// Rows of a step, of its first packed row on
template <class T> struct ForwardStep {
  Walk<T> walk;
  Index s, live;
  RowsAt<T> gx;        // [live][G][H]
  Parts<T> gh;         // [live][product gates * H]; no numbers: zeros
  const T* b_hh_last;  // [H], of a split cell's last gate, or null
  T* y;
  RowsAt<T> saved;    // [live][S][H], or none
  T* middle;          // [live, H]: what goes through the stage or the projection
  const T* c_before;  // [live, H]
  T* c_after;         // [live, H]
  bool to_stage;
};

// The cell on one element: what the product gave, without its bias, and c before the step; the state after it
template <class Cell, class T> __device__ __forceinline__ State<T> element_forward(const ForwardStep<T>& p, Index i,
                                                                                   Index k, T (&gh)[Cell::G],
                                                                                   T c_before) {
  constexpr int G = Cell::G, S = Cell::S, U = Cell::U;
  const Walk<T>& walk = p.walk;
  const Index H = walk.H;
  T gx[G], saved[S];
  const T* const from = p.gx[i] + k;
  for (int g = 0; g < G; ++g) gx[g] = from[g * H];
  if (Cell::split && p.b_hh_last) gh[G - 1] = gh[G - 1] + p.b_hh_last[k];
  State<T> prev{T(0), c_before};
  if (H == walk.R) prev.h = walk.previous_h(p.y, p.s, i, k);
  if (Cell::middle == Middle::product) prev.h = prev.h * walk.mask(i, k);
  State<T> next = Cell::forward(gx, gh, walk.template unit<U>(k), prev, saved);
  if (p.to_stage) p.middle[i * H + k] = next.h;
  if (walk.zoned()) {
    const State<T> keep = walk.zoneout(p.s, i, k);
    next.h = fma(keep.h, prev.h, (T(1) - keep.h) * next.h);
    if (Cell::has_c) next.c = fma(keep.c, prev.c, (T(1) - keep.c) * next.c);
  }
  if (!p.to_stage) p.y[walk.place[walk.row(p.s, i)] * H + k] = next.h;
  if (Cell::has_c) p.c_after[i * H + k] = next.c;
  if (!p.saved.numbers) return next;
  T* const kept = p.saved[i] + k;
  for (int n = 0; n < S; ++n)
    if (n != Cell::output_saved) kept[n * H] = saved[n];
  return next;
}
template <class Cell, class T> __global__ void cell_forward(ForwardStep<T> p) {
  const Walk<T>& walk = p.walk;
  const Element e;
  if (!e.in(p.live, walk.H)) return;
  const Index i = e.row, k = e.column;
  T gh[Cell::G];
  for (int g = 0; g < Cell::G; ++g)
    gh[g] = p.gh.numbers && g < Facts<Cell>::product_gates ? p.gh(i, g * walk.H + k) : T(0);
  element_forward<Cell>(p, i, k, gh, Cell::has_c ? walk.previous_c(p.c_before, p.s, i, k) : T(0));
}

// h from what came back from the stage or the projection, [live, R]
template <class Cell, class T> __global__ void output_forward(ForwardStep<T> p, Parts<T> back) {
  constexpr int G = Cell::G, S = Cell::S, U = Cell::U;
  const Walk<T>& walk = p.walk;
  const Element e;
  if (!e.in(p.live, walk.R)) return;
  const Index i = e.row, k = e.column, R = walk.R;
  T h = back(i, k);
  const State<T> prev{walk.previous_h(p.y, p.s, i, k), T(0)};
  if constexpr (Facts<Cell>::staged) {
    T gx[G], saved[S];
    const T* const from = p.gx[i] + k;
    T* const kept = p.saved[i] + k;
    for (int g = 0; g < G; ++g) gx[g] = from[g * R];
    for (int n = 0; n < S; ++n) saved[n] = kept[n * R];
    h = Cell::output(gx, h, walk.template unit<U>(k), prev, saved);
    kept[Cell::output_saved * R] = saved[Cell::output_saved];
  }
  if (walk.zoned()) {
    const T keep = walk.zoneout(p.s, i, k).h;
    h = fma(keep, prev.h, (T(1) - keep) * h);
  }
  p.y[walk.place[walk.row(p.s, i)] * R + k] = h;
}

template <class T> struct FinalStates {
  Walk<T> walk;
  const T *y, *c;
  bool c_of_all;  // c is that after every packed row, not only the last of each position
  T *hn, *cn;     // cn null: a cell without c
};
template <class T> __global__ void final_states(FinalStates<T> p) {
  const Walk<T>& walk = p.walk;
  const Element e;
  if (!e.in(walk.N, walk.H)) return;
  const Index i = e.row, k = e.column, H = walk.H, R = walk.R, n = walk.order[i], length = walk.length[i];
  if (k < R) {
    const T start = walk.h0 ? walk.h0[n * R + k] : T(0);
    p.hn[n * R + k] = length > 0 ? p.y[walk.place[walk.row(length - 1, i)] * R + k] : start;
  }
  if (!p.cn) return;
  const T start = walk.c0 ? walk.c0[n * H + k] : T(0);
  p.cn[n * H + k] = length > 0 ? p.c[(p.c_of_all ? walk.row(length - 1, i) : i) * H + k] : start;
}

// Zeros the rows of a [T, N, width] array that lie past the end of their sequence.
template <class T>
__global__ void zero_padding(Walk<T> walk, Index per_step, Index per_sequence, Index width, T* array) {
  const Element e;
  if (!e.in(walk.steps * walk.N, width)) return;
  const Index t = e.row / walk.N, i = e.row % walk.N;
  if (t >= walk.length[i]) array[(t * per_step + walk.order[i] * per_sequence) * width + e.column] = T(0);
}

// ---- Backward

template <class T> struct BackwardStep {
  Walk<T> walk;
  Index s, live, fed;  // fed: positions that have a next step
  const T *y, *dy;     // dy null: zeros
  RowsAt<const T> saved;
  const T* c_before;  // [live, H]
  Parts<T> dh;        // what comes back from the next step through w_hh, [fed, R]; no numbers: zeros
  Parts<T> d_stage;   // what comes back from the stage or the projection, [live, H]
  bool in_stage;
  T* gates;                  // [live][D][H] gate gradients
  T* d_out;                  // [live, R] gradient of what the stage gave back, or of a projection's h
  T *carry_h, *carry_c;      // [N, R], [N, H] gradients that reach the state past the product
  T *restart_h, *restart_c;  // [N, R], [N, H] what resets send to the initial state, or null
  T* unit_sums;              // [N][U][H], or null
};

// The gradient of what a reset cuts off is the initial state's, or nobody's; zero goes on.
template <class T> __device__ T send(T gradient, T* restarts, Index at) {
  if (restarts) restarts[at] = restarts[at] + gradient;
  return T(0);
}

// What comes back from the next step through w_hh
template <class T> __device__ T through_product(const BackwardStep<T>& p, Index i, Index k) {
  return p.dh.numbers && i < p.fed ? p.dh(i, k) * p.walk.mask(i, k) : T(0);
}
// The gradient of h after the step, of all that reaches it: through the product, past it, from outside
template <class T> __device__ T total_dh(const BackwardStep<T>& p, Index i, Index k, T through, T past) {
  const Walk<T>& walk = p.walk;
  const Index at = i * walk.R + k;
  T dh = through + past;
  if (walk.cut(p.s, i)) dh = send(dh, p.restart_h, at);
  return p.dy ? dh + p.dy[walk.place[walk.row(p.s, i)] * walk.R + k] : dh;
}

template <int U, class T>
__device__ void add_unit(const BackwardStep<T>& p, Index i, Index k, const T (&dw)[U ? U : 1], int begin, int end) {
  if (!p.unit_sums) return;
  T* const sums = p.unit_sums + i * U * p.walk.H + k;
  for (int u = begin; u < end; ++u) sums[u * p.walk.H] = sums[u * p.walk.H] + dw[u];
}

// Back through what makes h of what came back from the stage, or of the projection; [live, R]
template <class Cell, class T> __global__ void output_backward(BackwardStep<T> p) {
  constexpr int G = Cell::G, S = Cell::S, U = Cell::U;
  const Walk<T>& walk = p.walk;
  const Element e;
  if (!e.in(p.live, walk.R)) return;
  const Index i = e.row, k = e.column, R = walk.R;
  T total = total_dh(p, i, k, through_product(p, i, k), p.carry_h[i * R + k]), bypass = T(0);
  if (walk.zoned()) {
    const T keep = walk.zoneout(p.s, i, k).h;
    bypass = keep * total, total = (T(1) - keep) * total;
  }
  if constexpr (Facts<Cell>::staged) {
    T saved[S], dgx[G] = {}, dw[U ? U : 1] = {};
    const T* const kept = p.saved[i] + k;
    for (int n = 0; n < S; ++n) saved[n] = kept[n * R];
    const State<T> prev{walk.previous_h(p.y, p.s, i, k), T(0)};
    const Staged<T> d = Cell::d_output(saved, walk.template unit<U>(k), prev, total, dgx, dw);
    T* const out = p.gates + i * Facts<Cell>::D * R + k;
    for (int g = Cell::output_gate; g < G; ++g) out[Facts<Cell>::x_slot(g) * R] = dgx[g];
    add_unit<U>(p, i, k, dw, Facts<Cell>::cell_units, U);
    bypass = bypass + d.prev_h, total = d.middle;
  }
  p.d_out[i * R + k] = total;
  p.carry_h[i * R + k] = bypass;
}

// The cell's backward on one element: what comes through the product, and the gradients that reach the state past it,
// after the step. The same before it; the gates' gradients stay with the caller too.
template <class Cell, class T>
__device__ __forceinline__ State<T> element_backward(const BackwardStep<T>& p, Index i, Index k, T through,
                                                     State<T> carry, T (&dgx)[Cell::G], T (&dgh)[Cell::G]) {
  using F = Facts<Cell>;
  constexpr int G = Cell::G, S = Cell::S, U = Cell::U;
  const Walk<T>& walk = p.walk;
  const Index H = walk.H;
  T saved[S], dw[U ? U : 1];
  const T* const kept = p.saved[i] + k;
  for (int n = 0; n < S; ++n) saved[n] = kept[n * H];
  T* const out = p.gates + i * F::D * H + k;
  if constexpr (F::staged)  // the stage's own have been there
    for (int g = 0; g < G; ++g) dgx[g] = g < Cell::output_gate ? T(0) : out[F::x_slot(g) * H];

  const Index at = i * H + k;
  const bool projects = H != walk.R;
  State<T> prev{T(0), T(0)}, grad{T(0), T(0)}, bypass{T(0), T(0)};
  if (!projects) prev.h = walk.previous_h(p.y, p.s, i, k);
  grad.h = p.in_stage ? p.d_stage(i, k) : total_dh(p, i, k, through, carry.h);
  if (F::staged) bypass.h = carry.h;
  if (Cell::has_c) {
    prev.c = walk.previous_c(p.c_before, p.s, i, k);
    grad.c = carry.c;
    if (walk.cut(p.s, i)) grad.c = send(grad.c, p.restart_c, at);
  }
  if (walk.zoned()) {
    const State<T> keep = walk.zoneout(p.s, i, k);
    if (!p.in_stage) bypass.h = keep.h * grad.h, grad.h = (T(1) - keep.h) * grad.h;
    if (Cell::has_c) bypass.c = keep.c * grad.c, grad.c = (T(1) - keep.c) * grad.c;
  }
  const T mask = Cell::middle == Middle::product ? walk.mask(i, k) : T(1);
  prev.h = prev.h * mask;
  State<T> before = Cell::backward(saved, walk.template unit<U>(k), prev, grad, dgx, dgh, dw);
  before.h = before.h * mask;
  for (int g = 0; g < G; ++g) out[F::x_slot(g) * H] = dgx[g];
  if (Cell::split) out[F::h_slot(G - 1) * H] = dgh[G - 1];
  if (Cell::normed)
    for (int g = 0; g < G; ++g) out[F::h_slot(g) * H] = dgh[g];
  add_unit<U>(p, i, k, dw, 0, F::cell_units);
  return {before.h + bypass.h, before.c + bypass.c};
}
template <class Cell, class T> __global__ void cell_backward(BackwardStep<T> p) {
  const Element e;
  if (!e.in(p.live, p.walk.H)) return;
  const Index i = e.row, k = e.column, at = i * p.walk.H + k;
  T dgx[Cell::G], dgh[Cell::G];
  // A projection's rows of carry_h are others, and wait for output_backward
  const bool has_h = !p.in_stage || Facts<Cell>::staged;
  const State<T> carry{has_h ? p.carry_h[at] : T(0), Cell::has_c ? p.carry_c[at] : T(0)};
  const State<T> before =
      element_backward<Cell>(p, i, k, p.in_stage ? T(0) : through_product(p, i, k), carry, dgx, dgh);
  if (has_h) p.carry_h[at] = before.h;
  if (Cell::has_c) p.carry_c[at] = before.c;
}

// Gradients of the initial state, [N, width] by sorted position into the caller's order: what comes through w_hh, past
// it, and from resets
template <class T> struct InitialGradient {
  Walk<T> walk;
  Index width, fed;
  Parts<T> product;          // [fed, width], or no numbers: zeros
  const T *carry, *restart;  // [N, width]; restart may be null
  bool masked;
  T* gradient;  // [N, width]
};
template <class T> __global__ void initial_gradient(InitialGradient<T> p) {
  const Element e;
  if (!e.in(p.walk.N, p.width)) return;
  const Index i = e.row, k = e.column, at = i * p.width + k;
  T total = p.product.numbers && i < p.fed ? p.product(i, k) : T(0);
  if (p.masked) total = total * p.walk.mask(i, k);
  total = total + p.carry[at];
  if (p.walk.starts_from_zero(i)) total = T(0);
  p.gradient[p.walk.order[i] * p.width + k] = p.restart ? total + p.restart[at] : total;
}

// [N, width] in the caller's order -> by sorted position. A null source reads as zeros.
template <class T> __global__ void gather(Walk<T> walk, const T* from, Index width, T* to) {
  const Element e;
  if (!e.in(walk.N, width)) return;
  to[e.row * width + e.column] = from ? from[walk.order[e.row] * width + e.column] : T(0);
}

// hidden [rows, R]: what met w_hh, of steps [begin, end). Grid: elements of the first step's rows, shares of the steps.
template <class T> __global__ void hidden_rows(Walk<T> walk, Index begin, Index end, const T* y, T* hidden) {
  const Element e;
  const Index i = e.row, k = e.column;
  for (Index s = begin + blockIdx.z; s < end; s += gridDim.z)
    if (e.in(walk.offset[s + 1] - walk.offset[s], walk.R))
      hidden[(walk.row(s, i) - walk.offset[begin]) * walk.R + k] = walk.previous_h(y, s, i, k) * walk.mask(i, k);
}

// ---- Sums over rows

constexpr int kSumColumns = 32, kSumRows = 8;
constexpr Index kRowsOfASum = 256;

// sums [ceil(rows / kRowsOfASum)][columns]: sums of so many rows. Block: kSumColumns x kSumRows threads, of which each
// adds every kSumRows-th row of its column; their sums are then joined as a tree.
template <class T> __global__ void column_sums(const T* numbers, Index rows, Index columns, T* sums) {
  GATEWISE_SHARED_MEMORY(shared);
  SharedMemory memory{shared};
  T* const of_thread = memory.take<T>(kSumColumns * kSumRows);
  const Index column = Index(blockIdx.x) * kSumColumns + threadIdx.x, begin = Index(blockIdx.y) * kRowsOfASum;
  const Index end = begin + kRowsOfASum < rows ? begin + kRowsOfASum : rows;
  T sum = T(0);
  if (column < columns)
    for (Index r = begin + threadIdx.y; r < end; r += kSumRows) sum = sum + numbers[r * columns + column];
  T* const own = of_thread + threadIdx.y * kSumColumns + threadIdx.x;
  *own = sum;
  for (int half = kSumRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.y) < half) *own = *own + own[half * kSumColumns];
  }
  if (threadIdx.y == 0 && column < columns) sums[Index(blockIdx.y) * columns + column] = *own;
}
// gradient[(k + turn) mod size] += the sums of column first + k
template <class T>
__global__ void add_sums(const T* sums, Index count, Index columns, Index first, Index size, Index turn, T* gradient) {
  const Element e;
  if (!e.in(1, size)) return;
  const Index k = e.column;
  T sum = T(0);
  for (Index n = 0; n < count; ++n) sum = sum + sums[n * columns + first + k];
  T* const to = gradient + (k + turn) % size;
  *to = *to + sum;
}

// ---- Standardising: numbers less their mean, over the root of their variance + 1e-5, as in torch.nn.LayerNorm. A
// block is a row; its threads' sums are joined as a tree.

// Threads of the block of a row of n numbers: a power of two
constexpr unsigned threads_of_row(Index n) { return n <= 128 ? 32 : n <= 1024 ? 128 : 256; }

template <class T> __device__ T block_sum(T own, T* of_thread) {
  __syncthreads();  // the sum before may still be read
  of_thread[threadIdx.x] = own;
  for (int half = int(blockDim.x) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) of_thread[threadIdx.x] = of_thread[threadIdx.x] + of_thread[threadIdx.x + half];
  }
  __syncthreads();
  return of_thread[0];
}

// to row r = row r of `from`, standardised; scale [r], where it is wanted
template <class T> __global__ void standardise(Parts<T> from, RowsAt<T> to, Index n, T* scale) {
  GATEWISE_SHARED_MEMORY(shared);
  SharedMemory memory{shared};
  T* const of_thread = memory.take<T>(blockDim.x);
  const Index r = blockIdx.x;
  T* const row = to[r];
  T sum = T(0), squares = T(0);
  for (Index k = threadIdx.x; k < n; k += blockDim.x) {
    const T number = from(r, k);
    row[k] = number, sum = sum + number;
  }
  const T mean = block_sum(sum, of_thread) / T(n);
  for (Index k = threadIdx.x; k < n; k += blockDim.x) {
    const T rest = row[k] - mean;
    row[k] = rest, squares = fma(rest, rest, squares);
  }
  const T factor = T(1) / std::sqrt(block_sum(squares, of_thread) / T(n) + T(1e-5));
  for (Index k = threadIdx.x; k < n; k += blockDim.x) row[k] = row[k] * factor;
  if (scale && threadIdx.x == 0) scale[r] = factor;
}

// Back: the gradient d of standardised x becomes scale (d - mean(d) - x mean(d x)).
template <class T> __global__ void d_standardise(RowsAt<const T> x, const T* scale, RowsAt<T> d, Index n) {
  GATEWISE_SHARED_MEMORY(shared);
  SharedMemory memory{shared};
  T* const of_thread = memory.take<T>(blockDim.x);
  const Index r = blockIdx.x;
  const T* const number = x[r];
  T* const row = d[r];
  T sum = T(0), along = T(0);
  for (Index k = threadIdx.x; k < n; k += blockDim.x) sum = sum + row[k], along = fma(row[k], number[k], along);
  const T factor = scale[r];
  const T of_mean = -factor * (block_sum(sum, of_thread) / T(n));
  const T of_x = -factor * (block_sum(along, of_thread) / T(n));
  for (Index k = threadIdx.x; k < n; k += blockDim.x) row[k] = fma(number[k], of_x, fma(row[k], factor, of_mean));
}

}  // namespace gatewise::cuda
