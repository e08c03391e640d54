// The layer: any cell through time, forward and backward. Written once for all cells, dtypes and arches.
//
// Forward, a chunk of steps at a time: gx = W_ih x + b of the whole chunk, then step by step the product W_hh h, every
// tile of it finished by the cell while it is in L1. Backward, chunks from the end: step by step the product
// dgates W_hh, its tiles finished by the cell's backward of the step before, then dx and the weight gradients of the
// chunk, while its gate gradients are still in cache. Rows, or panels when rows are few, are shared among a team of
// threads; no element is ever summed by two of them.
//
// Buffers of the layer's own, W lanes to a register, P = ceil(H / W) panels, R packed rows (rows.hpp):
//   saved  [P][R][S][W]      states [P][N + R][W], c0 in the first N rows      (the tape)
//   gx     [P][chunk][G][W]  dgates [P][chunk][D][units of the panel]          (scratch)
// Lanes past H hold junk. A row of dgates takes D * W numbers; in a last panel of few units its end is never written.
#pragma once
#include "gatewise/cells.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH { namespace {

template <class T> void copy(const T* from, T* to, Index n) { std::memcpy(to, from, std::size_t(n) * sizeof(T)); }
// Asks for lines that will be written, and that no cache can have yet
template <class T> GATEWISE_FN void prefetch(const T* lines, Index n) {
  for (Index i = 0; i < n; i += 64 / Index(sizeof(T))) __builtin_prefetch(lines + i, 1);
}
template <class T> void zero(T* to, Index n) { std::memset(to, 0, std::size_t(n) * sizeof(T)); }

// Compile-time facts about a cell in this build.
template <class Cell, class T> struct CellFacts {
  using V = Vec<T>;
  static constexpr Index W = V::width;
  static constexpr int G = Cell::G, S = Cell::S;
  // Blocks of gate gradients in a row. A split cell stores its last gate twice, [dgx of the last | the gates before |
  // dgh of the last], so that the G blocks from x_block and the G from h_block are each contiguous.
  static constexpr int D = Cell::split ? G + 1 : G, x_block = 0, h_block = D - G;
  static constexpr int group = Panels<G>::per_group;

  GATEWISE_FN static int x_gate(int slot) { return Cell::split ? (slot + G - 1) % G : slot; }
  GATEWISE_FN static int h_gate(int slot) { return slot; }
  GATEWISE_FN static int x_slot(int gate) { return Cell::split ? (gate + 1) % G : gate; }
};

// Rows of a chunk: enough to pay for reading the packed weights again, few enough to stay in cache. Backward wants
// longer ones, for the weights' gradients are summed over them.
struct ChunkSize { Index bytes, least_rows, most_rows; };
constexpr ChunkSize kForwardChunk{1 << 18, 96, 1024}, kBackwardChunk{1 << 19, 256, 1024};

constexpr Index kCacheBytes = 1 << 20;  // a core's own: 1 to 2 MB on servers

// How a team shares the steps of a sequence.
enum class Sharing { alone, rows, panels };
struct Plan {
  Sharing sharing;
  int threads;
};

// Waking a thread that sleeps takes up to 50 microseconds, and a barrier in every step takes one.
template <class Cell> Plan plan(const Dims& d, Index rows, int threads) {
  const double step_flops = 2.0 * double(d.N) * Cell::G * double(d.H) * double(d.H);
  const double flops = 2.0 * double(rows) * Cell::G * double(d.H) * double(d.I + d.H);
  if (threads < 2 || flops < 8e6) return {Sharing::alone, 1};
  if (d.N >= 8 * threads && d.H < 256) return {Sharing::rows, threads};
  if (step_flops >= (d.N < 2 * threads ? 5e4 : 1e6)) return {Sharing::panels, threads};
  if (d.N >= threads) return {Sharing::rows, threads};
  return {Sharing::alone, 1};
}

// Attributes the time of a call's first thread to its parts, if the caller wants to know.
class Meter {
 public:
  explicit Meter(Ticks* ticks) : ticks_(ticks), last_(ticks ? now() : 0) {}
  void start() {
    if (ticks_) last_ = now();
  }
  // What has passed since the last start() or stop() belongs to `part`.
  void stop(std::uint64_t Ticks::* part) {
    if (!ticks_) return;
    const std::uint64_t time = now();
    ticks_->*part += time - last_, last_ = time;
  }

 private:
  Ticks* ticks_;
  std::uint64_t last_;
};

// The groups of a range in turn, backwards in every other step: it begins with the weights that the last one left in
// cache. A single row of an LSTM with H = 256 gains a sixth.
inline Index there_and_back(Index step, Index turn, Range range) {
  return step % 2 ? range.begin + range.end - 1 - turn : turn;
}

// What forward and backward have in common: the problem, its rows, and how to find things in it.
template <class Cell, class T> struct Pass {
  using Facts = CellFacts<Cell, T>;
  using V = Vec<T>;
  static constexpr Index W = Facts::W;
  static constexpr int G = Facts::G, S = Facts::S, D = Facts::D;

  Problem<T> problem;
  Dims d;
  Index P;       // panels
  Index groups;  // of panels
  Rows rows;
  Plan how;
  Index chunk_target, chunk_capacity;  // rows: a chunk ends at the first step that reaches the target
  Meter meter{nullptr};

  Pass(const Problem<T>& p, Arena& arena, int threads, ChunkSize chunk)
      : problem(p), d(p.dims), P(ceil_div(d.H, W)), groups(ceil_div(P, Facts::group)),
        rows(arena, d.T, d.N, count_rows(p)), how(plan<Cell>(d, rows.count, threads)),
        chunk_target(between(chunk.least_rows, chunk.bytes / (P * W * D * Index(sizeof(T))), chunk.most_rows)),
        chunk_capacity(least(rows.count, chunk_target + d.N)) {}

  Index group_panels(Index group) const { return Panels<G>::in_group(group, P); }
  Index group_registers(Index group) const { return Panels<G>::registers(group, d.H, W); }
  Index units(Index panel) const { return least(W, d.H - panel * W); }
  // f(units of a panel): a constant where it is full, for which no lane is masked
  template <class F> GATEWISE_FN void with_units(Index panel, F f) const {
    const Index n = units(panel);
    if (n == W) f(std::integral_constant<Index, W>());
    else f(n);
  }

  // The hidden state before step s of sorted position i, or null for zeros.
  GATEWISE_FN const T* previous_h(const T* y, Index s, Index i) const {
    if (s > 0) return y + rows.time_row[rows.offset[s - 1] + i] * d.H;
    return problem.sequence.h0 ? problem.sequence.h0 + rows.order[i] * d.H : nullptr;
  }

  // Row of `states` that holds c after step s of position 0; s = -1 is the initial state.
  Index state_row(Index s) const { return s < 0 ? 0 : d.N + rows.offset[s]; }
  Index state_rows() const { return d.N + rows.count; }

  // [N, H] in the caller's order <-> [P][stride][W] by sorted position. A null source reads as zeros.
  void gather(const T* from, T* panels, Index stride, Range positions) const {
    for (Index p = 0; p < P; ++p)
      for (Index i = positions.begin; i < positions.end; ++i)
        (from ? V::load(from + rows.order[i] * d.H + p * W, d.H - p * W) : V(0)).store(panels + (p * stride + i) * W);
  }
  void scatter(const T* panels, Index stride, Index row, T* to, Index n) const {
    for (Index p = 0; p < P; ++p) V::load(panels + (p * stride + row) * W).store(to + n * d.H + p * W, d.H - p * W);
  }
};

// Zeros the rows of a [T, N, width] array that lie past the end of their sequence.
template <class T> void zero_padding(const Problem<T>& p, T* array, Index width, Range sequences) {
  if (!p.sequence.lengths) return;
  for (Index t = 0; t < p.dims.T; ++t)
    for (Index n = sequences.begin; n < sequences.end; ++n)
      if (t >= p.sequence.lengths[n]) zero(array + (t * p.dims.N + n) * width, width);
}

// ---------------------------------------------------------------------------------------------------- forward

// The weights as forward reads them. bias [P][G + 1][W] is what is added to gx, and to gh of a split cell's last gate.
template <class Cell, class T> struct PackedWeights {
  using Facts = CellFacts<Cell, T>;
  using V = Vec<T>;
  static constexpr Index W = Facts::W;
  static constexpr int G = Facts::G;

  Dims d;
  Index P;
  T *w_ih, *w_hh, *bias;

  PackedWeights(const Dims& d, Arena& arena)
      : d(d), P(ceil_div(d.H, W)), w_ih(arena.take<T>(P * G * W * d.I)), w_hh(arena.take<T>(P * G * W * d.H)),
        bias(arena.take<T>(P * (G + 1) * W)) {}

  Index bytes() const { return P * G * W * (d.I + d.H) * Index(sizeof(T)); }

  void fill(const Weights<T>& w, Range groups) {
    for (Index q = groups.begin; q < groups.end; ++q) {
      pack<T, G>(w.w_ih, d.H, d.I, Facts::h_gate, q, w_ih);
      pack<T, G>(w.w_hh, d.H, d.H, Facts::h_gate, q, w_hh);
      for (Index p = q * Facts::group; p < q * Facts::group + Panels<G>::in_group(q, P); ++p)
        for (int g = 0; g <= G; ++g) {
          const Index gate = least(g, G - 1) * d.H + p * W, n = d.H - p * W;
          const V ih = w.b_ih ? V::load(w.b_ih + gate, n) : V(0), hh = w.b_hh ? V::load(w.b_hh + gate, n) : V(0);
          const bool apart = Cell::split && g == G - 1;  // r acts on b_hh too: it cannot move into gx
          (g == G ? hh : apart ? ih : ih + hh).store(bias + (p * (G + 1) + g) * W);
        }
    }
  }
};

template <class Cell, class T> struct ForwardPass : Pass<Cell, T> {
  using Base = Pass<Cell, T>;
  using Base::d, Base::G, Base::how, Base::P, Base::problem, Base::rows, Base::S, Base::W;
  using typename Base::Facts;
  using typename Base::V;

  Forward<T> call;
  PackedWeights<Cell, T> weights;
  T* gx;
  T* states;  // the tape's, or only the current ones
  Index states_stride;

  ForwardPass(const Forward<T>& call, Arena& arena) : ForwardPass(call, arena, Arena(const_cast<void*>(call.packed))) {}
  ForwardPass(const Forward<T>& call, Arena& arena, Arena packed)
      : Base(call.problem, arena, call.threads, kForwardChunk), call(call), weights(d, call.packed ? packed : arena),
        gx(arena.take<T>(P * this->chunk_capacity * G * W)), states(call.states), states_stride(this->state_rows()) {
    if (!Cell::has_c) return;
    T* current = arena.take<T>(P * d.N * W);
    if (!call.saved) states = current, states_stride = d.N;
  }

  bool keeps_tape() const { return call.saved != nullptr; }
  Index state_row(Index s) const { return keeps_tape() ? Base::state_row(s) : 0; }

  // gx of packed rows [begin, end), in a chunk that starts at row `chunk`, for the given groups of panels
  void project(Index chunk, Range packed, Range groups) {
    for (Index q = groups.begin; q < groups.end; ++q) {
      const Index panels = this->group_panels(q), registers = this->group_registers(q);
      const Segments row_of_x = one_segment(d.I);
      const T* w_ih = weights.w_ih + q * Facts::group * G * W * d.I;
      for_each_tile(packed.size(), rows_per_tile(registers), [&](Index first, Index height) {
        const Index row = packed.begin + first;
        const T* x[kMaxRows] = {};
        for (Index r = 0; r < height; ++r) x[r] = problem.sequence.x + rows.time_row[row + r] * d.I;
        Tile<T> tile;
        this->meter.start();
        kMultiplyRows<T>[registers - 1][height - 1](x, row_of_x, w_ih, tile);
        this->meter.stop(&Ticks::products);
        for (Index r = 0; r < height; ++r)
          for (Index b = 0; b < panels; ++b) {
            const Index p = q * Facts::group + b;
            const T* product = tile.numbers + (r * registers + b * G) * W;
            T* out = gx + (p * this->chunk_capacity + row + r - chunk) * G * W;
            this->with_units(p, [&](auto units) {
              GATEWISE_UNROLL
              for (int g = 0; g < G; ++g) {
                const V bias = V::load(weights.bias + (p * (G + 1) + g) * W);
                (V::load(product + g * units, units) + bias).store(out + g * W);
              }
            });
          }
        this->meter.stop(&Ticks::epilogues);
      });
    }
  }

  // One step of sorted positions [begin, end), for the given groups of panels
  void step(Index s, Index chunk, Range positions, Range groups) {
    for (Index turn = groups.begin; turn < groups.end; ++turn) {
      const Index q = there_and_back(s, turn, groups);
      const Index panels = this->group_panels(q), registers = this->group_registers(q);
      const Segments row_of_h = one_segment(d.H);
      const T* w_hh = weights.w_hh + q * Facts::group * G * W * d.H;
      for_each_tile(positions.size(), rows_per_tile(registers), [&](Index first, Index height) {
        const Index i = positions.begin + first;
        const T* h[kMaxRows] = {};
        for (Index r = 0; r < height; ++r) h[r] = this->previous_h(call.y, s, i + r);
        Tile<T> tile;
        this->meter.start();
        for (Index b = 0; b < panels && keeps_tape(); ++b)
          prefetch(call.saved + ((q * Facts::group + b) * rows.count + rows.offset[s] + i) * S * W, height * S * W);
        if (h[0]) kMultiplyRows<T>[registers - 1][height - 1](h, row_of_h, w_hh, tile);
        else zero(tile.numbers, height * registers * W);
        this->meter.stop(&Ticks::products);
        for (Index b = 0; b < panels; ++b)
          finish(s, chunk, i, height, q * Facts::group + b, h, tile.numbers + b * G * W, registers * W);
        this->meter.stop(&Ticks::epilogues);
      });
    }
  }

  // A chunk of one step goes through all the weights just once. Where they fill more than the cache, it takes both
  // matrices side by side, so that a call that walks them the other way begins with what the last one left there:
  // LSTM, I = H = 512, N = 1: 75 -> 47 µs a call.
  void only_step(Index s, Range positions, Range groups) {
    const Index chunk = rows.offset[s];
    for (Index turn = groups.begin; turn < groups.end; ++turn) {
      const Index q = there_and_back(call.from_the_last, turn, groups);
      project(chunk, {chunk + positions.begin, chunk + positions.end}, {q, q + 1});
      step(s, chunk, positions, {q, q + 1});
    }
  }

  // The epilogue: the cell on a tile's rows of one panel. products [height] rows, `stride` apart
  GATEWISE_FN void finish(Index s, Index chunk, Index i, Index height, Index p, const T* const* h, const T* products,
                          Index stride) {
    const Index row = rows.offset[s] + i, unit = p * W;
    const T* gx_row = gx + (p * this->chunk_capacity + row - chunk) * G * W;
    const T* c_prev = states + (p * states_stride + state_row(s - 1) + i) * W;
    T* c_next = states + (p * states_stride + state_row(s) + i) * W;
    T* kept = call.saved + (p * rows.count + row) * S * W;
    const Index* time_row = rows.time_row + row;
    const V b_hh = Cell::split ? V::load(weights.bias + (p * (G + 1) + G) * W) : V(0);
    this->with_units(p, [&](auto units) {
      for (Index r = 0; r < height; ++r) {
        V x[G], hidden[G], saved[S];
        GATEWISE_UNROLL
        for (int g = 0; g < G; ++g) {
          x[g] = V::load(gx_row + (r * G + g) * W);
          hidden[g] = V::load(products + r * stride + g * units, units);
        }
        if (Cell::split) hidden[G - 1] = hidden[G - 1] + b_hh;
        State<V> prev{h[r] ? V::load(h[r] + unit, units) : V(0), V(0)};
        if (Cell::has_c) prev.c = V::load(c_prev + r * W);
        const State<V> next = Cell::forward(x, hidden, prev, saved);
        next.h.store(call.y + time_row[r] * d.H + unit, units);
        if (Cell::has_c) next.c.store(c_next + r * W);
        if (!keeps_tape()) continue;
        GATEWISE_UNROLL
        for (int k = 0; k < S; ++k) saved[k].store(kept + (r * S + k) * W);
      }
    });
  }

  void final_states(Range positions) {
    for (Index i = positions.begin; i < positions.end; ++i) {
      const Index n = rows.order[i], length = length_of(problem, n);
      if (length > 0) copy(call.y + rows.time_row[rows.offset[length - 1] + i] * d.H, call.hn + n * d.H, d.H);
      else if (problem.sequence.h0) copy(problem.sequence.h0 + n * d.H, call.hn + n * d.H, d.H);
      else zero(call.hn + n * d.H, d.H);
      if (Cell::has_c) this->scatter(states, states_stride, state_row(length - 1) + i, call.cn, n);
    }
  }

  void run(Team& team, int id) {
    const FlushSubnormals flush;
    const Range sequences = share(d.N, id, team.size);
    const bool by_panels = how.sharing == Sharing::panels;
    const Range own = by_panels ? Range{0, d.N} : own_positions(problem, rows, id, team.size);
    const Range own_groups = by_panels ? share(this->groups, id, team.size) : Range{0, this->groups};

    if (!call.packed) weights.fill(problem.weights, share(this->groups, id, team.size));
    zero_padding(problem, call.y, d.H, sequences);
    if (Cell::has_c) this->gather(problem.sequence.c0, states, states_stride, sequences);
    team.barrier();
    for (Index s = 0, end; s < d.T && rows.live(s) > 0; s = end) {
      const Index chunk = rows.offset[s];
      for (end = s + 1; end < d.T && rows.live(end) > 0 && rows.offset[end] - chunk < this->chunk_target;) ++end;
      if (end == s + 1 && weights.bytes() > kCacheBytes) {
        only_step(s, {own.begin, least(own.end, rows.live(s))}, own_groups);
      } else {
        const Range part = share(rows.offset[end] - chunk, id, team.size);
        project(chunk, {chunk + part.begin, chunk + part.end}, {0, this->groups});
        team.barrier();
        for (Index t = s; t < end; ++t) {
          step(t, chunk, {own.begin, least(own.end, rows.live(t))}, own_groups);
          if (by_panels) team.barrier();
        }
      }
      team.barrier();
    }
    final_states(sequences);
  }
};

// --------------------------------------------------------------------------------------------------- backward

template <class Cell, class T> struct BackwardPass : Pass<Cell, T> {
  using Base = Pass<Cell, T>;
  using Base::d, Base::D, Base::G, Base::how, Base::P, Base::problem, Base::rows, Base::S, Base::W;
  using typename Base::Facts;
  using typename Base::V;
  static constexpr int kRows = rows_per_tile(Facts::group * G);  // weight-gradient tile: rows of x or h

  // One of the two weight matrices, or what its gradient needs
  struct Side {
    Index columns;  // I or H
    int block;      // the slot of dgates with which its gates start
    int (*gate)(int slot);
    const T* weights;
    T* d_weights;  // the caller's, or null
    T* packed;     // for products with dgates, or null
    T* sums;       // d_weights in packed layout, or null
    T* operand;    // the chunk's rows of x or h_prev, [tile of kRows columns][row][kRows], or null
  };

  Backward<T> call;
  Side sides[2];         // of x, of h
  T* bias_sums;          // [P], each like a row of dgates
  T* dgates[2];          // of this chunk and of the one after it, whose first step is still needed
  T *carry_h, *carry_c;  // [P][N][W] gradients that reach the state past the product

  const Side& x() const { return sides[0]; }
  const Side& h() const { return sides[1]; }

  Side side(Arena& arena, Index columns, int block, int (*gate)(int), const T* weights, T* d_weights, bool product) {
    const Index size = P * G * W * columns;
    return {columns,
            block,
            gate,
            weights,
            d_weights,
            product ? arena.take<T>(G * d.H * ceil_div(columns, W) * W) : nullptr,
            d_weights ? arena.take<T>(size) : nullptr,
            d_weights ? arena.take<T>(ceil_div(columns, kRows) * kRows * this->chunk_capacity) : nullptr};
  }

  BackwardPass(const Backward<T>& call, Arena& arena)
      : Base(call.problem, arena, call.threads, kBackwardChunk), call(call),
        sides{side(arena, d.I, Facts::x_block, Facts::x_gate, problem.weights.w_ih, call.dw_ih, call.dx),
              side(arena, d.H, Facts::h_block, Facts::h_gate, problem.weights.w_hh, call.dw_hh, true)},
        bias_sums(arena.take<T>(P * D * W)), carry_h(arena.take<T>(P * d.N * W)), carry_c(arena.take<T>(P * d.N * W)) {
    dgates[0] = arena.take<T>(P * this->chunk_capacity * D * W);
    dgates[1] = this->chunk_capacity < rows.count ? arena.take<T>(P * this->chunk_capacity * D * W) : dgates[0];
  }

  GATEWISE_FN Index gate_row(Index p, Index chunk_row) const { return (p * this->chunk_capacity + chunk_row) * D * W; }

  // Where slots from `block` on start in a row of dgates
  GATEWISE_FN Index slot(Index p, Index block) const { return block * this->units(p); }

  // Products of rows of dgates with one side's weights, in tiles: f(first row, how many, register of columns, their
  // values, the values' stride). Null gates are zeros.
  template <class F> void product(const Side& side, const T* gates, Index count, Range groups, Index step, F f) {
    for (Index turn = groups.begin; turn < groups.end; ++turn) {
      const Index q = there_and_back(step, turn, groups);
      const Index first_register = q * kColumnRegisters;
      const Index registers = least(kColumnRegisters, ceil_div(side.columns, W) - first_register);
      const T* weights = side.packed + first_register * W * G * d.H;
      const Segments row_of_gates{G * W, P - 1, gate_row(1, 0), G * this->units(P - 1),
                                  slot(P - 1, side.block) - side.block * W};
      for_each_tile(count, rows_per_tile(registers), [&](Index first, Index height) {
        Tile<T> tile;
        this->meter.start();
        if (gates) {
          const T* a[kMaxRows] = {};
          for (Index r = 0; r < height; ++r) a[r] = gates + gate_row(0, first + r) + side.block * W;
          kMultiplyRows<T>[registers - 1][height - 1](a, row_of_gates, weights, tile);
        } else {
          zero(tile.numbers, height * registers * W);
        }
        this->meter.stop(&Ticks::products);
        for (Index v = 0; v < registers; ++v) f(first, height, first_register + v, tile.numbers + v * W, registers * W);
        this->meter.stop(&Ticks::epilogues);
      });
    }
  }

  // Gate gradients of step s from those of step s + 1, for sorted positions that are the thread's own
  void step(Index s, const T* later, T* gates, Index chunk, Range own, Range groups) {
    const Index live = rows.live(s), continuing = s + 1 < d.T ? rows.live(s + 1) : 0;
    const Range fed{least(own.begin, continuing), least(own.end, continuing)};
    const Range last{own.begin > continuing ? own.begin : continuing, least(own.end, live)};  // s is their last step
    const auto finish_from = [&](Index i) {
      return [=](Index first, Index height, Index p, const T* dh, Index stride) {
        finish(s, gates, chunk, i + first, height, p, dh, stride);
      };
    };
    product(h(), later + gate_row(0, fed.begin), fed.size(), groups, s, finish_from(fed.begin));
    product(h(), nullptr, last.size(), groups, s, finish_from(last.begin));
  }

  // The epilogue: the cell's backward on a tile's rows of one panel
  GATEWISE_FN void finish(Index s, T* gates, Index chunk, Index i, Index height, Index p, const T* dh, Index stride) {
    const Index row = rows.offset[s] + i, unit = p * W;
    const T* kept = call.saved + (p * rows.count + row) * S * W;
    const T* c_prev = call.states + (p * this->state_rows() + this->state_row(s - 1) + i) * W;
    const T* c_next = call.states + (p * this->state_rows() + this->state_row(s) + i) * W;
    T *h_carry = carry_h + (p * d.N + i) * W, *c_carry = carry_c + (p * d.N + i) * W;
    T* out = gates + gate_row(p, row - chunk);
    const Index* time_row = rows.time_row + row;
    this->with_units(p, [&](auto units) {
      for (Index r = 0; r < height; ++r, out += D * W) {
        const Index at = time_row[r] * d.H + unit;
        const T* h_prev = this->previous_h(call.y, s, i + r);
        V saved[S], dgx[G], dgh[G];
        GATEWISE_UNROLL
        for (int k = 0; k < S; ++k) saved[k] = V::load(kept + (r * S + k) * W);
        State<V> prev{h_prev ? V::load(h_prev + unit, units) : V(0), V(0)}, next{V::load(call.y + at, units), V(0)};
        State<V> grad{V::load(dh + r * stride) + V::load(h_carry + r * W), V(0)};
        if (call.dy) grad.h = grad.h + V::load(call.dy + at, units);
        if (Cell::has_c) {
          prev.c = V::load(c_prev + r * W);
          next.c = V::load(c_next + r * W);
          grad.c = V::load(c_carry + r * W);
        }
        const State<V> before = Cell::backward(saved, prev, next, grad, dgx, dgh);
        before.h.store(h_carry + r * W);
        if (Cell::has_c) before.c.store(c_carry + r * W);
        GATEWISE_UNROLL
        for (int g = 0; g < G; ++g) dgx[g].store(out + Facts::x_slot(g) * units, units);
        if (Cell::split) dgh[G - 1].store(out + G * units, units);
      }
    });
  }

  // Copies the chunk's rows of x, or of the state before each step, into the order in which their tiles read them
  void pack_operand(const Side& side, Index first_step, Index end_step, Range tiles) {
    const Index chunk = rows.offset[first_step], capacity = this->chunk_capacity;
    for (Index s = first_step; s < end_step; ++s)
      for (Index i = 0; i < rows.live(s); ++i) {
        const Index row = rows.offset[s] + i;
        const T* from = &side == &x() ? problem.sequence.x + rows.time_row[row] * d.I : this->previous_h(call.y, s, i);
        for (Index tile = tiles.begin; tile < tiles.end; ++tile) {
          const Index column = tile * kRows, n = least(kRows, side.columns - column);
          T* to = side.operand + (tile * capacity + row - chunk) * kRows;
          if (!from) zero(to, n);
          else if (n == kRows) copy(from + column, to, kRows);  // of a size the compiler knows
          else copy(from + column, to, n);
        }
      }
  }

  // sums += operand^T dgates. Each chunk is summed apart and then added, which also bounds the rounding error.
  void weight_gradient(const Side& side, const T* gates, Index count, Range groups) {
    for (Index q = groups.begin; q < groups.end; ++q) {
      const Index registers = this->group_registers(q);
      const T* b[kMaxRegisters] = {};
      for (Index v = 0; v < registers; ++v) {
        const Index p = q * Facts::group + v / G;
        b[v] = gates + gate_row(p, 0) + slot(p, side.block) + v % G * W;
      }
      T* sums = side.sums + q * Facts::group * G * W * side.columns;
      for (Index column = 0; column < side.columns; column += kRows) {
        const Index height = least(kRows, side.columns - column);
        const T* a = side.operand + column * this->chunk_capacity;
        Tile<T> tile;
        this->meter.start();
        kMultiplyColumns<T>[registers - 1][height - 1](a, kRows, count, b, W* D, tile);
        this->meter.stop(&Ticks::products);
        T* sum = sums + column * registers * W;
        for (Index v = 0; v < height * registers; ++v, sum += W)
          (V::load(sum) + V::load(tile.numbers + v * W)).store(sum);
        this->meter.stop(&Ticks::epilogues);
      }
    }
  }

  void bias_gradient(const T* gates, Index count, Range panels) {
    for (Index p = panels.begin; p < panels.end; ++p) {
      V sum[D];
      GATEWISE_UNROLL
      for (int g = 0; g < D; ++g) sum[g] = V(0);
      for (Index r = 0; r < count; ++r) {
        GATEWISE_UNROLL
        for (int g = 0; g < D; ++g) sum[g] = sum[g] + V::load(gates + gate_row(p, r) + g * W);
      }
      GATEWISE_UNROLL
      for (int g = 0; g < D; ++g) {
        T* total = bias_sums + (p * D + g) * W;
        (V::load(total) + sum[g]).store(total);
      }
    }
  }

  void write_weight_gradients(Range groups) {
    for (const Side& side : sides) {
      T* d_bias = &side == &x() ? call.db_ih : call.db_hh;
      for (Index q = groups.begin; q < groups.end; ++q) {
        if (side.d_weights) unpack_add<T, G>(side.sums, d.H, side.columns, side.gate, q, side.d_weights);
        if (!d_bias) continue;
        for (Index p = q * Facts::group; p < q * Facts::group + this->group_panels(q); ++p)
          for (int s = 0; s < G; ++s) {
            T* to = d_bias + side.gate(s) * d.H + p * W;
            const Index n = this->units(p);
            const V sum = V::load(bias_sums + p * D * W + slot(p, side.block + s), n);
            (V::load(to, n) + sum).store(to, n);
          }
      }
    }
  }

  // Packs weights and clears sums: this thread's part of each
  void prepare(Range sequences, Range groups, Range h_columns, Range x_columns) {
    const Range panels = panels_of(groups);
    for (Index q = h_columns.begin; q < h_columns.end; ++q)
      pack_columns<T, G>(h().weights, d.H, d.H, h().gate, q, h().packed);
    if (call.dx) {
      for (Index q = x_columns.begin; q < x_columns.end; ++q)
        pack_columns<T, G>(x().weights, d.H, d.I, x().gate, q, x().packed);
      zero_padding(problem, call.dx, d.I, sequences);
    }
    for (const Side& side : sides)
      if (side.sums) {
        const Index per_panel = G * W * side.columns;
        zero(side.sums + panels.begin * per_panel, panels.size() * per_panel);
      }
    zero(bias_sums + panels.begin * D * W, panels.size() * D * W);
    this->gather(call.dhn, carry_h, d.N, sequences);
    if (Cell::has_c) this->gather(call.dcn, carry_c, d.N, sequences);
  }

  Range panels_of(Range groups) const { return {groups.begin * Facts::group, least(groups.end * Facts::group, P)}; }

  // What follows from the gate gradients of a chunk of `count` rows that starts at row `chunk`
  void finish_chunk(const T* gates, Index chunk, Index count, Range part, Range groups) {
    if (call.dx)
      product(x(), gates + gate_row(0, part.begin), part.size(), {0, column_groups<T>(d.I)}, 0,
              [&](Index first, Index height, Index v, const T* dx, Index stride) {
                for (Index r = 0; r < height; ++r)
                  V::load(dx + r * stride)
                      .store(call.dx + rows.time_row[chunk + part.begin + first + r] * d.I + v * W, d.I - v * W);
              });
    for (const Side& side : sides)
      if (side.d_weights) weight_gradient(side, gates, count, groups);
    if (call.db_ih || call.db_hh) bias_gradient(gates, count, panels_of(groups));
  }

  void run(Team& team, int id) {
    const FlushSubnormals flush;
    const Range sequences = share(d.N, id, team.size), groups = share(this->groups, id, team.size);
    const Range h_columns = share(column_groups<T>(d.H), id, team.size);
    const bool by_panels = how.sharing == Sharing::panels;
    const Range own = by_panels ? Range{0, d.N} : own_positions(problem, rows, id, team.size);
    const Range own_columns = by_panels ? h_columns : Range{0, column_groups<T>(d.H)};

    prepare(sequences, groups, h_columns, share(column_groups<T>(d.I), id, team.size));
    team.barrier();
    Index end = 0;
    while (end < d.T && rows.live(end) > 0) ++end;
    int current = 0;
    for (Index begin; end > 0; end = begin, current = 1 - current) {
      for (begin = end - 1; begin > 0 && rows.offset[end] - rows.offset[begin] < this->chunk_target;) --begin;
      const Index chunk = rows.offset[begin], count = rows.offset[end] - chunk;
      T* gates = dgates[current];
      for (Index s = end - 1; s >= begin; --s) {
        const T* later = s == end - 1 ? dgates[1 - current] : gates + gate_row(0, rows.offset[s + 1] - chunk);
        step(s, later, gates, chunk, own, own_columns);
        if (by_panels) team.barrier();
      }
      for (const Side& side : sides)
        if (side.d_weights) pack_operand(side, begin, end, share(ceil_div(side.columns, kRows), id, team.size));
      team.barrier();
      finish_chunk(gates, chunk, count, share(count, id, team.size), groups);
      team.barrier();
    }
    write_weight_gradients(groups);
    if (call.dh0) initial_state_gradient(dgates[1 - current], h_columns);
    if (Cell::has_c && call.dc0)
      for (Index i = sequences.begin; i < sequences.end; ++i) this->scatter(carry_c, d.N, i, call.dc0, rows.order[i]);
  }

  void initial_state_gradient(const T* first_step, Range columns) {
    const Index live = d.T > 0 ? rows.live(0) : 0;
    const auto store_from = [&](Index i) {
      return [=](Index first, Index height, Index p, const T* dh, Index stride) {
        for (Index r = 0; r < height; ++r)
          (V::load(dh + r * stride) + V::load(carry_h + (p * d.N + i + first + r) * W))
              .store(call.dh0 + rows.order[i + first + r] * d.H + p * W, d.H - p * W);
      };
    };
    product(h(), first_step, live, columns, 0, store_from(0));
    product(h(), nullptr, d.N - live, columns, 0, store_from(live));
  }
};

// ------------------------------------------------------------------------------------------------ entry points

// A pass is built from its call and an arena; every thread of the team then runs a copy of it.
template <class PassType> void run_pass(PassType& pass, Ticks* ticks) {
  Meter whole(ticks);
  pass.rows.fill(pass.problem);
  run_team(
      pass.how.threads,
      [](const void* shared, Team& team, int id) {
        PassType own = *static_cast<const PassType*>(shared);
        if (id == 0) own.meter = Meter(own.call.ticks);
        own.run(team, id);
      },
      &pass);
  whole.stop(&Ticks::all);
}

template <class Cell, class T> void forward(const Forward<T>& call) {
  Arena arena(call.scratch);
  ForwardPass<Cell, T> pass(call, arena);
  run_pass(pass, call.ticks);
}
template <class Cell, class T> void backward(const Backward<T>& call) {
  Arena arena(call.scratch);
  BackwardPass<Cell, T> pass(call, arena);
  run_pass(pass, call.ticks);
}
template <class Cell, class T> void pack_weights(const Problem<T>& problem, void* packed) {
  Arena arena(packed);
  PackedWeights<Cell, T> weights(problem.dims, arena);
  weights.fill(problem.weights, {0, ceil_div(weights.P, Panels<Cell::G>::per_group)});
}

// Scratch as it is when everything is wanted
template <class Cell, class T> Sizes sizes(const Problem<T>& problem) {
  T any;
  Arena forward_arena(nullptr), backward_arena(nullptr), packed_arena(nullptr);
  const PackedWeights<Cell, T> weights(problem.dims, packed_arena);
  const ForwardPass<Cell, T> f({problem, {}, {}, {}, {}, {}, {}, 1}, forward_arena);
  const BackwardPass<Cell, T> b({problem, {}, {}, {}, {}, {}, {}, &any, {}, {}, &any, &any, {}, {}, {}, 1},
                                backward_arena);
  const Index panel = Vec<T>::width;
  return {std::size_t(f.P * f.rows.count * Cell::S * panel),
          std::size_t(Cell::has_c ? f.P * f.state_rows() * panel : 0), packed_arena.bytes(), forward_arena.bytes(),
          backward_arena.bytes()};
}

}}}  // namespace gatewise::GATEWISE_ARCH
