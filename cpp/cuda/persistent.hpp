// The loop of a layer in one cooperative launch, for cells whose step is one product and the cell: plan.hpp says when
// there is one, and deals out units, rows and columns. A block keeps the weights of its units on chip. It multiplies
// them with all of h (backward: all gate gradients) of the step before, runs the cell on its own units, of which each
// thread keeps the state in registers, and leaves what the next step multiplies in global memory, from which all blocks
// read it behind a barrier. Sums are taken in one order, that of columns, whatever the batch.
#pragma once
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "step.hpp"

namespace gatewise::cuda {

// All blocks of a cooperative launch wait for each other; what was written before is visible behind it. The counter
// starts one below zero, so that every launch passes the place where it wraps.
class GridBarrier {
 public:
  static constexpr int first_byte = 0xff;
  __device__ __forceinline__ explicit GridBarrier(unsigned* arrivals) : arrivals_(arrivals) {}
  __device__ __forceinline__ void wait() {
    awaited_ += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(arrivals_, 1);
      while (int(load_acquire(arrivals_) - awaited_) < 0) continue;
    }
    __syncthreads();
  }

 private:
  unsigned* arrivals_;
  unsigned awaited_ = ~0u;
};

// A number for each of a thread's cells, in registers: no index is computed.
template <class T> struct Slots {
  T numbers[cell_slots] = {};

  __device__ __forceinline__ T operator[](int slot) const {
    T found = numbers[0];
#pragma unroll
    for (int n = 1; n < int(cell_slots); ++n) found = slot == n ? numbers[n] : found;
    return found;
  }
  __device__ __forceinline__ void set(int slot, T value) {
#pragma unroll
    for (int n = 0; n < int(cell_slots); ++n) numbers[n] = slot == n ? value : numbers[n];
  }
};

// 16 bytes of a row: a lane's part of a fragment
template <class T> struct alignas(16) Chunk { T numbers[16 / sizeof(T)]; };

// A number as it is multiplied; of bf16 see pack() and Recurrence::leave().
template <class T> __device__ __forceinline__ T rounded(T value, Operands operands) {
  if constexpr (sizeof(T) == 4) return operands == Operands::tf32 ? to_tf32(value) : value;
  else return value;
}

// What both kernels know of the loop. A row of `exchange` is a sequence, by sorted position; its
// numbers are as `operands` says, two of bf16 in the place of one float.
template <class T> struct Recurrence {
  Walk<T> walk;
  Shares shares;
  int units, batch_tile;
  Operands operands;
  Index begin, end;         // steps
  const Chunk<T>* weights;  // [blocks][warps at work][rounds][fragments of a round][lanes]
  unsigned* arrivals;
  T* exchange;         // [2][N filled up][pitch]
  Index pitch, other;  // in numbers: between rows, between steps

  __device__ __forceinline__ Index live(Index s) const { return walk.offset[s + 1] - walk.offset[s]; }
  __device__ __forceinline__ T* row(Index s, Index i) const { return exchange + (s & 1) * other + i * pitch; }
  __device__ __forceinline__ void leave(Index s, Index i, Index column, T value) const {
    T* const to = row(s, i);
    if (sizeof(T) == 4 && operands == Operands::bf16)
      reinterpret_cast<__nv_bfloat16*>(to)[column] = __float2bfloat16_rn(float(value));
    else to[column] = rounded(value, operands);
  }
};

// The weights of all blocks as their lanes take them; zeros where there is no row or column. A thread makes a chunk.
template <class T> struct Packing {
  const T* w_hh;  // [G * H, H]
  Shares shares;
  int G, units;
  Index H;
  Operands operands;
  bool backward;
  Chunk<T>* to;

  // Of a block's rows and columns
  __device__ T weight(Index block, int row, Index column) const {
    const int gate = backward ? 0 : row / units, unit = row - gate * units;
    const Index k = block * units + unit;
    if (gate >= G || unit >= units || k >= H || column >= (backward ? G * H : H)) return T(0);
    return backward ? w_hh[column * H + k] : w_hh[(gate * H + k) * H + column];
  }
};
template <class T> __global__ void pack(Packing<T> p, Index fragments) {
  const Element e;
  if (!e.in(fragments, 32)) return;
  const Shares& of = p.shares;
  const int lane = int(e.column), q = int(e.row % of.round_size()), warps = of.row_groups * of.column_groups;
  const Index rounds = e.row / of.round_size(), block = rounds / of.rounds / warps;
  const int n = int(rounds % of.rounds), warp = int(rounds / of.rounds % warps), column_group = warp / of.row_groups;
  const int piece = of.begin(column_group) + n * of.round_pieces + of.piece(q);
  const int row = (warp % of.row_groups * of.tiles + q - of.piece(q) * of.tiles) * 8 + lane / 4;
  constexpr int count = 16 / sizeof(T);
  const Index column = (Index(piece) * 4 + lane % 4) * count;
  Chunk<T> chunk{};
  for (int v = 0; v < count && piece < of.begin(column_group + 1); ++v) {
    if (sizeof(T) == 4 && p.operands == Operands::bf16) {
      unsigned both = 0;
      for (int half = 0; half < 2; ++half) {
        const __nv_bfloat16 w = __float2bfloat16_rn(float(p.weight(block, row, 2 * (column + v) + half)));
        both |= unsigned(__bfloat16_as_ushort(w)) << 16 * half;
      }
      chunk.numbers[v] = T(__uint_as_float(both));
    } else {
      chunk.numbers[v] = rounded(p.weight(block, row, column + v), p.operands);
    }
  }
  p.to[e.row * 32 + lane] = chunk;
}

// How a warp multiplies a fragment of weights with rows of what is exchanged. Lane l has row l / 4 of the weights, from
// byte 16 (l % 4) on, and fetches the same bytes of h.

// As it is, 4 sequences at a time: sum[n] of sequence n, over the lane's own columns
template <class T> struct Exact {
  static constexpr int sequences = 4;
  Chunk<T> h[4];

  static __device__ __forceinline__ Index own_row(int) { return 0; }
  __device__ __forceinline__ void fetch(const T* from, Index pitch) {
#pragma unroll
    for (int n = 0; n < 4; ++n) h[n] = *reinterpret_cast<const Chunk<T>*>(from + n * pitch);
  }
  __device__ __forceinline__ void multiply(T (&sum)[4], const Chunk<T>& w) const {
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int v = 0; v < int(16 / sizeof(T)); ++v) sum[n] = fma(h[n].numbers[v], w.numbers[v], sum[n]);
  }
  // The four lanes of a row exchange sums of four tiles, so that each has the whole sum of one.
  static __device__ __forceinline__ void store(const T (&sum)[4][4], int tiles, T* to, Index pitch, int lane) {
    const bool upper = lane & 2, odd = lane & 1;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const T given[] = {upper ? sum[0][n] : sum[2][n], upper ? sum[1][n] : sum[3][n]};
      T kept[] = {upper ? sum[2][n] : sum[0][n], upper ? sum[3][n] : sum[1][n]};
      for (int q = 0; q < 2; ++q) kept[q] = kept[q] + __shfl_xor_sync(~0u, given[q], 2);
      const T whole = (odd ? kept[1] : kept[0]) + __shfl_xor_sync(~0u, odd ? kept[0] : kept[1], 1);
      if (lane % 4 < tiles) to[n * pitch + lane % 4 * 8 + lane / 4] = whole;
    }
  }
};

// By tensor cores, 16 sequences at a time: sum[i] as mma_tf32 has it. The four registers of a lane are two operands.
template <bool bf16> struct Tensor {
  static constexpr int sequences = 16;
  Chunk<float> h[2];  // of sequences g and g + 8

  static __device__ __forceinline__ Index own_row(int lane) { return lane / 4; }
  __device__ __forceinline__ void fetch(const float* from, Index pitch) {
    for (int n = 0; n < 2; ++n) h[n] = *reinterpret_cast<const Chunk<float>*>(from + 8 * n * pitch);
  }
  __device__ __forceinline__ void multiply(float (&sum)[4], const Chunk<float>& w) const {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const unsigned a[] = {__float_as_uint(h[0].numbers[k]), __float_as_uint(h[1].numbers[k]),
                            __float_as_uint(h[0].numbers[k + 1]), __float_as_uint(h[1].numbers[k + 1])};
      const unsigned b[] = {__float_as_uint(w.numbers[k]), __float_as_uint(w.numbers[k + 1])};
      if constexpr (bf16) mma_bf16(sum, a, b);
      else mma_tf32(sum, a, b);
    }
  }
  static __device__ __forceinline__ void store(const float (&sum)[4][4], int tiles, float* to, Index pitch, int lane) {
#pragma unroll
    for (int q = 0; q < round_fragments; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (q < tiles) to[(lane / 4 + i / 2 * 8) * pitch + q * 8 + lane % 4 * 2 + i % 2] = sum[q][i];
  }
};

// A block's part of the loop: its weights, and the sums that its cells wait for
template <class T, bool backward, int G> class Block {
 public:
  const Recurrence<T>& loop;
  const Index first;  // unit
  const int units;    // that are the block's

  __device__ __forceinline__ Block(const Recurrence<T>& loop, SharedMemory& memory)
      : loop(loop), first(Index(blockIdx.x) * loop.units),
        units(int(loop.walk.H - first < loop.units ? loop.walk.H - first : loop.units)), warp_(int(threadIdx.x) / 32),
        lane_(int(threadIdx.x) % 32) {
    const Shares& of = loop.shares;
    const int apart = of.rounds > kept_rounds ? of.rounds - kept_rounds : 0;  // rounds in shared memory
    const int row_group = warp_ % of.row_groups, column_group = warp_ / of.row_groups;
    const bool works = column_group < of.column_groups;
    sums_ = memory.take<T>(of.column_groups * loop.batch_tile * sum_pitch());
    in_shared_ = memory.take<Chunk<T>>(of.row_groups * of.column_groups * apart * round_chunks());
    in_shared_ += warp_ * apart * round_chunks() + lane_;
    own_sums_ = sums_ + column_group * loop.batch_tile * sum_pitch() + row_group * of.tiles * 8;
    begin_ = works ? of.begin(column_group) : 0, end_ = works ? of.begin(column_group + 1) : 0;

    const int warps = of.row_groups * of.column_groups;
    const Chunk<T>* const from =
        loop.weights + (Index(blockIdx.x) * warps + (works ? warp_ : 0)) * of.rounds * round_chunks() + lane_;
#pragma unroll
    for (int n = 0; n < kept_rounds; ++n)
#pragma unroll
      for (int q = 0; q < round_fragments; ++q)
        kept_[n][q] = n < of.rounds && q < of.round_size() ? from[n * round_chunks() + q * 32] : Chunk<T>{};
    for (int n = 0; works && n < apart * of.round_size(); ++n)
      in_shared_[n * 32] = from[kept_rounds * round_chunks() + n * 32];
  }

  // sums [rows][rows of weights] of the rows of a batch tile that begins at `from`
  __device__ __forceinline__ void multiply(const T* from, int rows) const {
    if constexpr (sizeof(T) == 4) {
      if (loop.operands == Operands::tf32) return multiply_by<Tensor<false>>(from, rows);
      if (loop.operands == Operands::bf16) return multiply_by<Tensor<true>>(from, rows);
    }
    multiply_by<Exact<T>>(from, rows);
  }
  // Of the n-th sequence of the tile, of a row of weights
  __device__ __forceinline__ T sum(int n, int row) const {
    const T* const from = sums_ + n * sum_pitch() + row;
    T total = *from;
    for (int c = 1; c < loop.shares.column_groups; ++c) total = total + from[c * loop.batch_tile * sum_pitch()];
    return total;
  }
  // f(i, rows, pass) for every batch tile of so many sequences
  template <class F> __device__ __forceinline__ void each_tile(Index count, F f) const {
    int pass = 0;
    for (Index i = 0; i < count; i += loop.batch_tile, ++pass)
      f(i, int(count - i < loop.batch_tile ? count - i : loop.batch_tile), pass);
  }
  // f(slot, n, k): the cells of this thread in a batch tile of so many rows, the `pass`-th: their n in the tile, their
  // unit
  template <class F> __device__ __forceinline__ void each_cell(int pass, int rows, F f) const {
    int slot = pass * ((loop.batch_tile * loop.units + int(blockDim.x) - 1) / int(blockDim.x));
    for (int e = int(threadIdx.x); e < rows * loop.units; e += int(blockDim.x), ++slot) {
      const int n = e / loop.units, unit = e % loop.units;
      if (unit < units) f(slot, n, unit);
    }
  }

 private:
  static constexpr int kept_rounds = int(weight_registers(sizeof(T))) / round_registers;

  __device__ __forceinline__ int round_chunks() const { return loop.shares.round_size() * 32; }
  __device__ __forceinline__ int sum_pitch() const { return loop.shares.rows() + int(sum_padding); }
  template <class Math> __device__ __forceinline__ void multiply_by(const T* from, int rows) const {
    constexpr int piece_numbers = int(fragment_row_bytes / sizeof(T)), chunk_numbers = 16 / sizeof(T);
    const Shares& of = loop.shares;
    if (begin_ == end_) return;  // of a warp as a whole
    for (int n = 0; n < rows; n += Math::sequences) {
      const T* const own = from + (n + Math::own_row(lane_)) * loop.pitch + lane_ % 4 * chunk_numbers;
      T sum[round_fragments][4] = {};
      Math math;
      const auto round = [&](int first_piece, const auto& w) {
#pragma unroll
        for (int q = 0; q < round_fragments; ++q) {
          const int piece = first_piece + of.piece(q);
          if (q >= of.round_size() || piece >= end_) continue;
          if (q == of.piece(q) * of.tiles) math.fetch(own + piece * piece_numbers, loop.pitch);
          math.multiply(sum[q], w(q));
        }
      };
#pragma unroll
      for (int r = 0; r < kept_rounds; ++r)
        if (r < of.rounds) round(begin_ + r * of.round_pieces, [&](int q) { return kept_[r][q]; });
      for (int r = kept_rounds; r < of.rounds; ++r) {
        const Chunk<T>* const there = in_shared_ + (r - kept_rounds) * round_chunks();
        round(begin_ + r * of.round_pieces, [&](int q) { return there[q * 32]; });
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (of.tiles == 1) sum[0][i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
        if (of.tiles == 2) sum[0][i] = sum[0][i] + sum[2][i], sum[1][i] = sum[1][i] + sum[3][i];
      }
      Math::store(sum, of.tiles, own_sums_ + n * sum_pitch(), sum_pitch(), lane_);
    }
  }

  int warp_, lane_;
  Chunk<T>* in_shared_;  // this lane's first
  T *sums_, *own_sums_;  // of the block, of the warp: [column groups][batch tile][rows of weights, filled up]
  int begin_, end_;      // the warp's pieces
  Chunk<T> kept_[kept_rounds][round_fragments];
};

template <class T> struct ForwardLoop {
  Recurrence<T> loop;
  ForwardStep<T> step;  // what all steps have in common; rows of gx and saved from the first packed row of `begin` on
  T *states, *c;        // c after each packed row, or null; [N, H] or null: c after the step
};

template <class Cell, class T> __global__ void __launch_bounds__(most_threads) persistent_forward(ForwardLoop<T> p) {
  constexpr int G = Cell::G;
  GATEWISE_SHARED_MEMORY(shared);
  SharedMemory memory{shared};
  const Recurrence<T>& loop = p.loop;
  const Walk<T>& walk = loop.walk;
  const Block<T, false, G> block(loop, memory);
  GridBarrier barrier(loop.arrivals);

  Slots<T> c;
  block.each_tile(loop.live(loop.begin), [&](Index i0, int rows, int pass) {
    block.each_cell(pass, rows, [&](int slot, int n, int unit) {
      const Index s = loop.begin, i = i0 + n, k = block.first + unit;
      if (Cell::has_c && s > 0) c.set(slot, p.states ? p.states[walk.row(s - 1, i) * walk.H + k] : p.c[i * walk.H + k]);
      loop.leave(s, i, k, walk.previous_h(p.step.y, s, i, k) * walk.mask(i, k));
    });
  });
  barrier.wait();

  for (Index s = loop.begin; s < loop.end; ++s) {
    const Index row = walk.offset[s] - walk.offset[loop.begin], following = s + 1 < loop.end ? loop.live(s + 1) : 0;
    ForwardStep<T> step = p.step;
    step.s = s, step.live = loop.live(s), step.to_stage = false;
    step.gx.numbers += row * step.gx.stride;
    if (step.saved.numbers) step.saved.numbers += row * step.saved.stride;
    step.c_after = p.states ? p.states + walk.offset[s] * walk.H : p.c;
    block.each_tile(step.live, [&](Index i0, int rows, int pass) {
      if (pass > 0) __syncthreads();  // sums of the tile before may still be read
      block.multiply(loop.row(s, i0), rows);
      __syncthreads();
      block.each_cell(pass, rows, [&](int slot, int n, int unit) {
        const Index i = i0 + n, k = block.first + unit;
        T gh[G];
        for (int g = 0; g < G; ++g) gh[g] = block.sum(n, g * loop.units + unit);
        T before = T(0);
        if (Cell::has_c) {
          const bool restarted = walk.restarts(s, i);
          before = s > 0 && !restarted ? c[slot] : walk.start_c(restarted, i, k);
        }
        const State<T> next = element_forward<Cell>(step, i, k, gh, before);
        if (Cell::has_c) c.set(slot, next.c);
        if (i >= following) return;
        const T h = walk.restarts(s + 1, i) ? walk.start_h(true, i, k) : next.h;
        loop.leave(s + 1, i, k, h * walk.mask(i, k));
      });
    });
    if (s + 1 < loop.end) barrier.wait();
  }
}

template <class T> struct BackwardLoop {
  Recurrence<T> loop;
  BackwardStep<T> step;  // what all steps have in common; rows of saved and gates from the first packed row on
  const T* states;
};

template <class Cell, class T> __global__ void __launch_bounds__(most_threads) persistent_backward(BackwardLoop<T> p) {
  constexpr int G = Cell::G;
  GATEWISE_SHARED_MEMORY(shared);
  SharedMemory memory{shared};
  const Recurrence<T>& loop = p.loop;
  const Walk<T>& walk = loop.walk;
  const Block<T, true, G> block(loop, memory);
  GridBarrier barrier(loop.arrivals);

  Slots<T> carry_h, carry_c;
  const auto each_carry = [&](auto f) {
    block.each_tile(walk.N, [&](Index i0, int rows, int pass) {
      block.each_cell(pass, rows, [&](int slot, int n, int unit) { f(slot, (i0 + n) * walk.H + block.first + unit); });
    });
  };
  each_carry([&](int slot, Index at) {
    carry_h.set(slot, p.step.carry_h[at]);
    if (Cell::has_c) carry_c.set(slot, p.step.carry_c[at]);
  });

  for (Index s = loop.end - 1; s >= loop.begin; --s) {
    BackwardStep<T> step = p.step;
    step.s = s, step.live = loop.live(s), step.fed = s + 1 < loop.end ? loop.live(s + 1) : 0, step.in_stage = false;
    step.saved.numbers += walk.offset[s] * step.saved.stride;
    step.gates += walk.offset[s] * (Facts<Cell>::D * walk.H);
    step.c_before = Cell::has_c && s > 0 ? p.states + walk.offset[s - 1] * walk.H : nullptr;
    block.each_tile(step.live, [&](Index i0, int rows, int pass) {
      const int fed = int(step.fed - i0 < rows ? step.fed - i0 : rows);  // negative: none
      if (pass > 0) __syncthreads();
      block.multiply(loop.row(s + 1, i0), fed);
      __syncthreads();
      block.each_cell(pass, rows, [&](int slot, int n, int unit) {
        const Index i = i0 + n, k = block.first + unit;
        const T through = n < fed ? block.sum(n, unit) * walk.mask(i, k) : T(0);
        T dgx[G], dgh[G];
        const State<T> carry{carry_h[slot], Cell::has_c ? carry_c[slot] : T(0)};
        const State<T> before = element_backward<Cell>(step, i, k, through, carry, dgx, dgh);
        carry_h.set(slot, before.h);
        if (Cell::has_c) carry_c.set(slot, before.c);
        for (int g = 0; g < G; ++g) loop.leave(s, i, g * walk.H + k, Cell::split && g == G - 1 ? dgh[g] : dgx[g]);
      });
    });
    if (s > loop.begin) barrier.wait();
  }
  each_carry([&](int slot, Index at) {
    p.step.carry_h[at] = carry_h[slot];
    if (Cell::has_c) p.step.carry_c[at] = carry_c[slot];
  });
}

// --- On the host

// Whether a cell's step is one product and the cell
template <class Cell> constexpr bool can_persist = Cell::has_product && Cell::middle == Middle::none && !Cell::normed;

// How a layer's loop runs: its plan, and where that is persistent and possible, its scratch. Throws
// std::invalid_argument where a caller wants it persistent and no plan is.
template <class Cell, class T> struct PersistentLoop {
  StepProblem problem;
  Plan plan;
  Operands operands;
  bool chosen;
  T* exchange = nullptr;
  Chunk<T>* weights = nullptr;
  unsigned* arrivals = nullptr;

  template <class Arena>
  PersistentLoop(const Problem<T>& p, bool projects, bool backward, const Execution& execution, Arena& arena)
      : operands(sizeof(T) == 4 && execution.device.major >= 8 ? execution.operands : Operands::exact) {
    const Index size = sizeof(T), storage = operands == Operands::bf16 ? 2 : size;
    const bool has_middle = Cell::middle != Middle::none || Cell::normed;
    const Dims& d = p.dims;
    // A projection may leave as many numbers as there are units, and takes its barrier yet
    const Index R = projects ? d.R - 1 : d.H;
    problem = StepProblem{Cell::G, Cell::has_c, Cell::has_product, has_middle, d.N, d.H, R, storage, size, backward};
    plan = plan_layer(execution.device, problem);
    if (execution.loop == Loop::persistent && !plan.persistent())
      throw std::invalid_argument(std::string("loop: expected one that can be persistent; ") + sentence(plan.reason));
    // A loop of one launch keeps or reads all gates, or all c: no checkpoints, and backward no chunks
    const bool possible = backward ? p.save == Save::all : p.save != Save::checkpoints;
    chosen = possible && can_persist<Cell> && execution.loop != Loop::stepwise && plan.persistent();
    if (!chosen) return;
    exchange = arena.template take<T>(exchange_bytes(problem) / Index(sizeof(T)));
    weights = arena.template take<Chunk<T>>(fragments() * 32);
    arrivals = arena.template take<unsigned>(1);
  }

  Index fragments() const { return plan.grid_units * plan.fragments; }
  Shares shares() const { return share_out(problem, plan.units, plan.block); }

  void start(const T* w_hh, cudaStream_t stream) const {
    // Rows and columns that nobody writes are zeros
    GATEWISE_CUDA_CHECK(cudaMemsetAsync(exchange, 0, std::size_t(exchange_bytes(problem)), stream));
    const Packing<T> packing{w_hh,      shares(), int(Cell::G),     int(plan.units),
                             problem.H, operands, problem.backward, weights};
    launch(pack<T>, pointwise(fragments(), 32), stream, packing, fragments());
  }
  Recurrence<T> steps(Index begin, Index end, const Walk<T>& walk) const {
    const Index numbers = exchange_bytes(problem) / Index(sizeof(T)) / 2;
    return {walk,
            shares(),
            int(plan.units),
            int(plan.batch_tile),
            operands,
            begin,
            end,
            weights,
            arrivals,
            exchange,
            row_pieces(problem) * fragment_row_bytes / Index(sizeof(T)),
            numbers};
  }
  template <class Call> void run(void (*kernel)(Call), const Call& call, cudaStream_t stream) const {
    constexpr Index without_asking = 48 << 10;
    if (plan.shared_bytes > without_asking)
      GATEWISE_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes)));
    GATEWISE_CUDA_CHECK(cudaMemsetAsync(arrivals, GridBarrier::first_byte, sizeof *arrivals, stream));
    launch(kernel, {dim3(unsigned(plan.grid_units)), dim3(unsigned(plan.block)), std::size_t(plan.shared_bytes), true},
           stream, call);
  }
};

}  // namespace gatewise::cuda
