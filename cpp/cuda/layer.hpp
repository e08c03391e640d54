// The layer on a CUDA stream, any cell through time: products of all steps at once before and after the loop; the loop
// is one launch (persistent.hpp), or, step by step, one product with w_hh and one kernel that runs the cell on its
// rows. Calls take the structs of gatewise.hpp with the device's pointers in them, except for the lengths, which are
// the host's; they enqueue work and return.
//
// Buffers, R packed rows (cpu/rows.hpp):
//   saved  [R][S][H], behind it scales [3][R] of a normed cell, then [R][H] what went through a product in a stage or
//          the projection
//   states [R][H], c after each row's step, or [checkpoints][N][H], c before one       (the tape: these two)
//   gates  [chunk][D][H] gradients of gates, as Facts::D says                          (backward's scratch)
// Where the tape has no gates, backward runs forward again, a chunk of steps at a time: the same kernels on the same
// numbers, which leave the same bits, y's too.
#pragma once
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cublas.hpp"
#include "persistent.hpp"
#include "rows.hpp"

namespace gatewise::cuda { namespace {

// Launches one thread an element, if there are any.
template <class... P, class... A>
void each(void (*kernel)(P...), Index rows, Index columns, cudaStream_t stream, const A&... args) {
  if (rows > 0 && columns > 0) launch(kernel, pointwise(rows, columns), stream, args...);
}

// What forward keeps of packed rows from `first` on: gates and what else backward reads, or c
template <class T> struct KeptRows {
  T* numbers = nullptr;  // null: nothing
  Index first = 0, room = 0;
  const T* before = nullptr;  // c of the step before the first row
};

// Both directions: the problem, the order of its rows, and what the kernels know of it
template <class Cell, class T> struct Pass {
  using F = Facts<Cell>;
  static constexpr Index G = Cell::G, S = Cell::S, D = F::D, U = Cell::U;

  static constexpr Index kMostRows = (Index(1) << 31) - (1 << 16);  // a tile past them is counted yet
#ifdef GATEWISE_CHUNK_BYTES                                         // so few that a test has several chunks
  static constexpr Index kChunkBytes = GATEWISE_CHUNK_BYTES;
#else
  static constexpr Index kChunkBytes = 64 << 20;  // enough rows for every multiprocessor, little of a device's memory
#endif

  Problem<T> problem;
  Dims d;
  bool projects;
  Index stage_units;  // of the product in the stage, or R of the projection; 0: there is none
  cudaStream_t stream;
  LargeProducts<T> products;
  Rows rows;      // on the device
  Index* length;  // [N] on the device, by sorted position
  std::vector<Index> memory;
  Rows on_host;  // in `memory`: order and offset
  Walk<T> walk;

  Pass(const Problem<T>& p, const Execution& execution, Arena& arena, cudaStream_t stream)
      : problem(p), d(p.dims), projects(F::may_project && p.weights.w_hr),
        stage_units(Cell::middle == Middle::product ? d.H
                    : projects                      ? d.R
                                                    : 0),
        stream(stream), products(execution, arena, stream), rows(arena, d.T, d.N, count_rows(p)),
        length(arena.take<Index>(d.N)), on_host(rows) {
    if (p.save == Save::checkpoints && execution.loop == Loop::persistent)
      throw std::invalid_argument("loop: expected one that is stepwise, for save is \"checkpoints\"; got persistent");
    for (const Index count : {rows.count, d.N, d.T, D * d.H, d.I})
      if (count > kMostRows)
        throw std::invalid_argument("x: the CUDA kernels count rows and columns in 32 bits; got " +
                                    std::to_string(count) + " of one kind");
  }

  // Orders the rows, on the host as far as the loop needs it, and on the device
  void prepare() {
    Arena counts(nullptr);
    (void)Rows(counts, d.T, d.N, 0);
    memory.resize(counts.bytes() / sizeof(Index) + 1);
    Arena arena(memory.data());
    on_host = Rows(arena, d.T, d.N, 0);
    on_host.sort(problem);
    const Sequence<T>& of = problem.sequence;
    const RowOrder order{d.T,        d.N,    !of.lengths, of.reverse, of.layout, of.step_stride, of.sequence_stride,
                         rows.order, length, rows.offset, rows.place, rows.x_at};
    for (Index begin = 0; of.lengths && begin < d.N; begin += SomeSequences::most) {
      const Index count = least(SomeSequences::most, d.N - begin);
      SomeSequences some{};
      for (Index k = 0; k < count; ++k) {
        const Index n = on_host.order[begin + k];
        some.of[k] = {std::int32_t(n), std::int32_t(of.lengths[n])};
      }
      each(put_sequences<RowOrder>, 1, count, stream, some, begin, count, order);
    }
    each(start_rows<RowOrder>, 1, d.T + 1 > d.N ? d.T + 1 : d.N, stream, order);
    each(place_rows<RowOrder>, d.T, d.N, stream, order);

    walk = {d.T,
            d.N,
            d.H,
            d.R,
            rows.order,
            rows.offset,
            rows.place,
            length,
            of.h0,
            of.c0,
            problem.h_mask,
            problem.weights.w_unit,
            of.reset,
            of.reverse,
            of.reset_to == ResetTo::initial,
            problem.cell_clip < T(__builtin_inf()),
            problem.cell_clip,
            problem.zoneout};
  }

  // Rows of x and of dx, of packed row `begin` on: evenly strided, where all sequences walk in the order of memory
  bool in_order() const { return !problem.sequence.reverse && rows.count == d.T * d.N; }
  RowsAt<const T> x_rows(Index begin) const {
    const Sequence<T>& of = problem.sequence;
    const bool packed = of.layout == Layout::packed;
    const Index step = of.step_stride, each = packed || d.N == 1 ? step : of.sequence_stride;
    if (packed ? !of.reverse : in_order() && (d.N == 1 || d.T == 1 || step == d.N * each))
      return {of.x + begin * each, each};
    return {of.x, 1, rows.x_at + begin};
  }
  RowsAt<T> dx_rows(T* dx, Index begin) const {
    const Layout layout = problem.sequence.layout;
    if (layout == Layout::packed ? !problem.sequence.reverse
                                 : in_order() && (layout == Layout::time_major || d.N == 1 || d.T == 1))
      return {dx + begin * d.I, d.I};
    return {dx, d.I, rows.place + begin};
  }

  Index at(Index s) const { return on_host.offset[s]; }  // first packed row of step s
  Index live(Index s) const { return s < d.T ? on_host.live(s) : 0; }
  const T* stage_weights() const {
    return projects ? problem.weights.w_hr : problem.weights.w_hh + F::product_gates * d.H * d.R;
  }
  // Of a packed row: what the cell saved; scales of gx, gh, c; what goes through the stage
  RowsAt<T> saved_rows(const KeptRows<T>& kept, Index row) const {
    return {kept.numbers + (row - kept.first) * S * d.H, S * d.H};
  }
  T* scales(const KeptRows<T>& kept, int which, Index row) const {
    return kept.numbers + kept.room * (S * d.H + which) + row - kept.first;
  }
  T* kept_middle(const KeptRows<T>& kept, Index row) const {
    return kept.numbers + kept.room * (S * d.H + (Cell::normed ? 3 : 0)) + (row - kept.first) * d.H;
  }
  Index saved_size(Index rows) const { return rows * (S * d.H + (Cell::normed ? 3 : 0) + (stage_units ? d.H : 0)); }

  // c before and after a step's rows
  T* c_after(const KeptRows<T>& states, Index s) const { return states.numbers + (at(s) - states.first) * d.H; }
  const T* c_before(const KeptRows<T>& states, Index s) const {
    if (!Cell::has_c || s == 0) return nullptr;
    return at(s) == states.first ? states.before : c_after(states, s - 1);
  }
  Index checkpoint_size() const { return d.N * d.H; }
  Index checkpoints() const { return ceil_div(d.T, problem.checkpoint); }
  Index live_steps() const {
    Index steps = 0;
    while (live(steps) > 0) ++steps;
    return steps;
  }

  void zero_past_end(T* array, Index width) const {
    if (!problem.sequence.lengths || problem.sequence.layout == Layout::packed) return;
    const bool time_major = problem.sequence.layout == Layout::time_major;
    each(zero_padding<T>, d.T * d.N, width, stream, walk, time_major ? d.N : Index(1), time_major ? Index(1) : d.T,
         width, array);
  }
  void zero(T* numbers, Index n) const {
    if (n > 0) GATEWISE_CUDA_CHECK(cudaMemsetAsync(numbers, 0, std::size_t(n) * sizeof(T), stream));
  }
  // A block for each of so many rows of n numbers
  static LaunchShape blocks(Index rows, Index n) {
    return {dim3(unsigned(rows)), dim3(threads_of_row(n)), threads_of_row(n) * sizeof(T), false};
  }
};

// A product of a step: its parts, and where they go
template <class T> struct StepProduct {
  Index N, K, rows;
  PartsOf of;
  T* numbers;  // [parts][rows][N]

  StepProduct(Arena& arena, Index N, Index K, Index rows)
      : N(N), K(K), rows(rows), of(ceil_div(N, SmallTile<T>::columns), K, 128),
        numbers(arena.take<T>(of.count * rows * N)) {}
  Parts<T> result() const { return {numbers, N, rows * N, of.count}; }
  template <bool b_by_k> Parts<T> run(Index live, RowsAt<const T> a, RowsAt<const T> b, cudaStream_t stream) const {
    multiply_rows<false, b_by_k>(
        Product<T>{int(live), int(N), int(K), a, b, {numbers, N}, nullptr, false, of.count, of.k, rows * N}, stream);
    return result();
  }
};

template <class Cell, class T> struct ForwardPass : Pass<Cell, T> {
  using Base = Pass<Cell, T>;
  using Base::d, Base::G, Base::problem, Base::products, Base::projects, Base::rows, Base::S, Base::stage_units,
      Base::stream, Base::walk;
  using typename Base::F;

  Forward<T> call;
  KeptRows<T> kept, states;
  Index chunk_target;  // rows whose gx is made at once: a chunk ends at the first step that reaches it
  T* bias;             // [G * H]
  T* gx;               // [chunk][G * H], or null: in `saved`
  PersistentLoop<Cell, T> loop;
  StepProduct<T> gh, stage;
  T* entering;  // [N, R], or null: h as it lies
  T* c;         // [N, H] or null: every c is kept
  T* middle;    // [N, H] or null: kept
  T* saved;     // [N][S][H] of a step, or null

  ForwardPass(const Forward<T>& call, const Execution& execution, Arena& arena, cudaStream_t stream)
      : ForwardPass(Base(call.problem, execution, arena, stream), call,
                    call.problem.save == Save::all ? call.saved : nullptr,
                    call.problem.save == Save::checkpoints ? nullptr : call.states, execution, arena) {}
  // saved, states: of all rows, or of others that the caller will name; null: not kept
  ForwardPass(const Base& base, const Forward<T>& call, T* saved_of_all, T* states_of_all, const Execution& execution,
              Arena& arena)
      : Base(base), call(call), kept{saved_of_all, 0, rows.count}, states{states_of_all, 0, rows.count},
        chunk_target(x_in_saved() ? rows.count : least(rows.count, Base::kChunkBytes / (G * d.H * Index(sizeof(T))))),
        bias(arena.take<T>(G * d.H)),
        gx(x_in_saved() ? nullptr : arena.take<T>(least(rows.count, chunk_target + d.N) * G * d.H)),
        loop(problem, projects, false, execution, arena),
        gh(arena, F::product_gates * d.H, d.R, Cell::has_product && !loop.chosen ? d.N : 0),
        stage(arena, stage_units, d.H, stage_units ? d.N : 0),
        entering(Cell::has_product && !loop.chosen && (problem.h_mask || problem.sequence.reset)
                     ? arena.take<T>(d.N * d.R)
                     : nullptr),
        c(Cell::has_c && !states.numbers ? arena.take<T>(d.N * d.H) : nullptr),
        middle((F::staged || projects) && !keeps_middle() ? arena.take<T>(d.N * d.H) : nullptr),
        saved(F::staged && !kept.numbers ? arena.take<T>(d.N * S * d.H) : nullptr) {}

  bool x_in_saved() const { return F::x_in_saved && kept.numbers; }
  bool keeps_middle() const { return kept.numbers && stage_units; }
  RowsAt<T> gx_rows(Index row, Index chunk) const {
    if (x_in_saved()) return {this->saved_rows(kept, row).numbers + F::x_at * d.H, S * d.H};
    return {gx + (row - chunk) * G * d.H, G * d.H};
  }
  T* scale_of(int which, Index row) const { return kept.numbers ? this->scales(kept, which, row) : nullptr; }

  // gx of packed rows [begin, end)
  void project(Index begin, Index end) const {
    if (begin == end) return;
    Product<T> product{int(end - begin),     int(G * d.H), int(d.I), this->x_rows(begin), {problem.weights.w_ih, d.I},
                       gx_rows(begin, begin)};
    product.bias = Cell::normed ? nullptr : bias;
    products.template multiply<false, false>(product);
    if (!Cell::normed) return;
    const RowsAt<T> to = product.c;
    launch(standardise<T>, this->blocks(end - begin, G * d.H), stream, Parts<T>{to.numbers, to.stride}, to, G * d.H,
           scale_of(0, begin));
  }

  // W_hh h of a step's rows
  Parts<T> hidden_part(Index s, Index live) const {
    if (!Cell::has_product) return {};
    const bool any = s > 0 || problem.sequence.h0;
    if (!any && !Cell::normed) return {};
    Parts<T> product = gh.result();
    if (any) {
      RowsAt<const T> h{call.y, d.R, s > 0 ? rows.place + this->at(s - 1) : nullptr};
      if (s == 0) h = {problem.sequence.h0, d.R, rows.order};
      if (entering) {
        each(enter<T>, live, d.R, stream, walk, s, live, static_cast<const T*>(call.y), entering);
        h = {entering, d.R};
      }
      gh.template run<false>(live, h, {problem.weights.w_hh, d.R}, stream);
    } else {
      this->zero(gh.numbers, live * gh.N);
      product.count = 1;
    }
    if (!Cell::normed) return product;
    launch(standardise<T>, this->blocks(live, gh.N), stream, product, RowsAt<T>{gh.numbers, gh.N}, gh.N,
           scale_of(1, this->at(s)));
    product.count = 1;
    return product;
  }

  // What steps from packed row `row` on have in common
  ForwardStep<T> step_from(Index row, Index chunk) const {
    ForwardStep<T> p{};
    p.walk = walk;
    p.gx = gx_rows(row, chunk);
    p.b_hh_last = Cell::split && problem.weights.b_hh ? problem.weights.b_hh + (G - 1) * d.H : nullptr;
    p.y = call.y;
    p.saved = kept.numbers ? this->saved_rows(kept, row) : RowsAt<T>{saved, S * d.H};
    return p;
  }
  void steps(Index begin, Index end, Index chunk) const {
    if constexpr (can_persist<Cell>)
      if (loop.chosen)
        return loop.run(persistent_forward<Cell, T>,
                        {loop.steps(begin, end, walk), step_from(this->at(begin), chunk), states.numbers, c}, stream);
    for (Index s = begin; s < end; ++s) step(s, chunk);
  }
  void keep_checkpoint(Index s) const {
    if (!Cell::has_c || !call.states || problem.save != Save::checkpoints || s == 0 || s % problem.checkpoint) return;
    GATEWISE_CUDA_CHECK(cudaMemcpyAsync(call.states + s / problem.checkpoint * this->checkpoint_size(), c,
                                        std::size_t(this->live(s) * d.H) * sizeof(T), cudaMemcpyDeviceToDevice,
                                        stream));
  }
  void step(Index s, Index chunk) const {
    const Index live = this->live(s), row = this->at(s);
    keep_checkpoint(s);
    ForwardStep<T> p = step_from(row, chunk);
    p.s = s, p.live = live;
    p.gh = hidden_part(s, live);
    p.middle = keeps_middle() ? this->kept_middle(kept, row) : middle;
    p.c_before = states.numbers ? this->c_before(states, s) : c;
    p.c_after = states.numbers ? this->c_after(states, s) : c;
    p.to_stage = F::staged || projects;
    each(cell_forward<Cell, T>, live, d.H, stream, p);
    if constexpr (F::staged || F::may_project) {
      if (!p.to_stage) return;
      Parts<T> back{p.middle, d.H};
      if (stage_units) back = stage.template run<false>(live, {p.middle, d.H}, {this->stage_weights(), d.H}, stream);
      else
        launch(standardise<T>, this->blocks(live, d.H), stream, back, RowsAt<T>{p.middle, d.H}, d.H, scale_of(2, row));
      each(output_forward<Cell, T>, live, d.R, stream, p, back);
    }
  }

  void start() const {
    each(add_biases<T>, 1, Cell::normed ? 0 : G * d.H, stream, problem.weights.b_ih, problem.weights.b_hh,
         (Cell::split ? G - 1 : G) * d.H, G * d.H, bias);
    if (loop.chosen) loop.start(problem.weights.w_hh, stream);
  }
  void run_steps(Index begin, Index end) const {
    for (Index s = begin, last; s < end; s = last) {
      const Index chunk = this->at(s);
      for (last = s + 1; last < end && this->at(last) - chunk < chunk_target;) ++last;
      project(chunk, this->at(last));
      steps(s, last, chunk);
    }
  }
  void run() {
    this->prepare();
    this->zero_past_end(call.y, d.R);
    start();
    run_steps(0, this->live_steps());
    const bool of_all = states.numbers;
    const FinalStates<T> last{walk,   call.y,  of_all ? states.numbers : c,
                              of_all, call.hn, Cell::has_c ? call.cn : nullptr};
    each(final_states<T>, d.N, d.H, stream, last);
  }
};

template <class Cell, class T> struct BackwardPass : Pass<Cell, T> {
  using Base = Pass<Cell, T>;
  using Base::d, Base::D, Base::G, Base::problem, Base::products, Base::projects, Base::rows, Base::S,
      Base::stage_units, Base::stream, Base::U, Base::walk;
  using typename Base::F;

  Backward<T> call;
  PersistentLoop<Cell, T> loop;
  Index chunk_target, capacity;  // rows: a chunk, walked backwards, ends at the step that reaches the target
  Index chunk = 0;               // first row of the one at hand
  T* gates;                      // [capacity][D][H]
  StepProduct<T> dh, stage;      // [N, R] through w_hh; [N, H] through the stage's weights
  T* d_out;                      // [capacity, R] of a projection, [N, R] of a stage
  T *carry_h, *carry_c;          // [N, R], [N, H]
  T *restart_h, *restart_c;      // likewise, or null
  T* unit_sums;                  // [N][U][H], or null
  T* hidden;                     // [capacity, R], or null
  T* sums;                       // of columns, part by part
  T* weight_parts;               // of gradients of weights
  KeptRows<T> kept, states;
  std::optional<ForwardPass<Cell, T>> again;  // where the tape has no gates

  BackwardPass(const Backward<T>& call, const Execution& execution, Arena& arena, cudaStream_t stream)
      : Base(call.problem, execution, arena, stream), call(call), loop(problem, projects, true, execution, arena),
        chunk_target(loop.chosen
                         ? rows.count
                         : least(rows.count, largest(kLeastChunk, Base::kChunkBytes / (D * d.H * Index(sizeof(T)))))),
        capacity(least(rows.count, problem.save == Save::checkpoints ? problem.checkpoint * d.N : chunk_target + d.N)),
        gates(arena.take<T>(capacity * D * d.H)), dh(arena, d.R, F::product_gates * d.H, Cell::has_product ? d.N : 0),
        stage(arena, d.H, stage_units, stage_units ? d.N : 0), d_out(arena.take<T>(projects    ? capacity * d.R
                                                                                   : F::staged ? d.N * d.R
                                                                                               : 0)),
        carry_h(arena.take<T>(d.N * d.R)), carry_c(arena.take<T>(Cell::has_c ? d.N * d.H : 0)),
        restart_h(restarts() ? arena.take<T>(d.N * d.R) : nullptr),
        restart_c(Cell::has_c && restarts() ? arena.take<T>(d.N * d.H) : nullptr),
        unit_sums(U && call.dw_unit ? arena.take<T>(d.N * U * d.H) : nullptr),
        hidden(Cell::has_product && call.dw_hh ? arena.take<T>(capacity * d.R) : nullptr),
        sums(arena.take<T>(largest(ceil_div(capacity, kRowsOfASum) * D, ceil_div(d.N, kRowsOfASum) * U) * d.H)),
        weight_parts(arena.take<T>(largest(largest(parts_size(G * d.H, d.I), parts_size(F::product_gates * d.H, d.R)),
                                           parts_size(projects ? d.R : d.H, stage_units ? d.H : 0)))),
        kept{const_cast<T*>(call.saved), 0, rows.count}, states{const_cast<T*>(call.states), 0, rows.count} {
    if (problem.save == Save::all) return;
    kept = {arena.take<T>(this->saved_size(capacity)), 0, capacity};
    if (Cell::has_c && problem.save == Save::checkpoints) states = {arena.take<T>(capacity * d.H), 0, capacity};
    Forward<T> forward{};
    forward.problem = problem, forward.y = const_cast<T*>(call.y);
    again.emplace(*this, forward, kept.numbers, states.numbers, execution, arena);
  }

  static constexpr Index kLeastChunk = 512;  // rows: gradients of weights are sums over them
  static Index largest(Index a, Index b) { return a > b ? a : b; }
  bool restarts() const { return problem.sequence.reset && problem.sequence.reset_to == ResetTo::initial; }
  T* gates_at(Index row, Index block) const { return gates + ((row - chunk) * D + block) * d.H; }
  static constexpr int last_x_slot = F::x_slot(int(G) - 1);

  // Gradients of weights are sums over all rows, in some parts where the matrix is small
  static PartsOf parts_of(Index M, Index N, Index rows) {
    return PartsOf(ceil_div(M, SmallTile<T>::rows) * ceil_div(N, SmallTile<T>::columns), rows, 256);
  }
  Index parts_size(Index M, Index N) const {
    const Index parts = M * N > 0 ? parts_of(M, N, capacity).wanted : 0;
    return parts > 1 ? parts * M * N : 0;
  }
  // gradient [M, N] += a^T b, over the rows of the chunk; row r of it is found at (r + turn) mod M
  void weight_gradient(Index count, Index M, Index N, RowsAt<const T> a, RowsAt<const T> b, T* gradient,
                       Index turn = 0) const {
    const RowsAt<T> to{gradient, N, nullptr, turn, M};
    const PartsOf of = parts_of(M, N, count);
    const Product<T> whole{int(M), int(N), int(count), a, b, to, nullptr, true};
    if (of.count == 1 || products.template by_cublas<true, true>(whole))
      return products.template multiply<true, true>(whole);
    multiply_rows<true, true>(
        Product<T>{int(M), int(N), int(count), a, b, {weight_parts, N}, nullptr, false, of.count, of.k, M * N}, stream);
    each(add_parts<T>, M, N, stream, weight_parts, Index(of.count), M, N, to);
  }

  // Gradients that come back through w_hh, from the gates of step s, if anybody wants them
  Parts<T> through_hidden(Index s) const {
    const Index fed = this->live(s);
    if (!Cell::has_product || !fed || (s == 0 && !call.dh0)) return {};
    return dh.template run<true>(fed, {gates_at(this->at(s), F::h_block), D * d.H}, {problem.weights.w_hh, d.R},
                                 stream);
  }

  // What steps from packed row `row` on have in common
  BackwardStep<T> step_from(Index row) const {
    BackwardStep<T> p{};
    p.walk = walk;
    const RowsAt<T> saved = this->saved_rows(kept, row);
    p.y = call.y, p.dy = call.dy, p.saved = {saved.numbers, saved.stride};
    p.gates = gates_at(row, 0);
    p.carry_h = carry_h, p.carry_c = carry_c, p.restart_h = restart_h, p.restart_c = restart_c;
    p.unit_sums = unit_sums;
    return p;
  }
  // The gradients of gates of steps [begin, end). dh: what comes back from step `end` through w_hh; returns what comes
  // back from `begin`
  Parts<T> steps(Index begin, Index end, Parts<T> dh) const {
    if constexpr (can_persist<Cell>)
      if (loop.chosen) {
        loop.start(problem.weights.w_hh, stream);
        loop.run(persistent_backward<Cell, T>, {loop.steps(begin, end, walk), step_from(0), call.states}, stream);
        return through_hidden(begin);
      }
    for (Index s = end - 1; s >= begin; --s) {
      step(s, dh);
      dh = through_hidden(s);
    }
    return dh;
  }
  void step(Index s, Parts<T> dh) const {
    const Index live = this->live(s), row = this->at(s);
    BackwardStep<T> p = step_from(row);
    const RowsAt<const T> saved = p.saved;
    p.s = s, p.live = live, p.fed = this->live(s + 1);
    p.c_before = this->c_before(states, s);
    p.dh = dh;
    p.d_out = projects ? d_out + (row - chunk) * d.R : d_out;
    p.in_stage = F::staged || projects;
    if constexpr (F::staged || F::may_project) {
      if (p.in_stage) {
        each(output_backward<Cell, T>, live, d.R, stream, p);
        p.d_stage = {p.d_out, d.H};
        if (stage_units)
          p.d_stage = stage.template run<true>(live, {p.d_out, d.R}, {this->stage_weights(), d.H}, stream);
        else
          launch(d_standardise<T>, this->blocks(live, d.H), stream,
                 RowsAt<const T>{saved.numbers + Cell::output_saved * d.H, S * d.H}, this->scales(kept, 2, row),
                 RowsAt<T>{p.d_out, d.H}, d.H);
      }
    }
    each(cell_backward<Cell, T>, live, d.H, stream, p);
    for (int h = 0; h < (Cell::normed ? 2 : 0); ++h)  // of gx, of gh
      launch(d_standardise<T>, this->blocks(live, G * d.H), stream,
             RowsAt<const T>{saved.numbers + (1 + h) * G * d.H, S * d.H}, this->scales(kept, h, row),
             RowsAt<T>{gates_at(row, h ? F::h_block : F::x_block), D * d.H}, G * d.H);
  }

  void start() const {
    if (call.dx) this->zero_past_end(call.dx, d.I);
    each(gather<T>, d.N, d.R, stream, walk, call.dhn, d.R, carry_h);
    if (Cell::has_c) each(gather<T>, d.N, d.H, stream, walk, call.dcn, d.H, carry_c);
    if (restart_h) this->zero(restart_h, d.N * d.R);
    if (restart_c) this->zero(restart_c, d.N * d.H);
    if (unit_sums) this->zero(unit_sums, d.N * U * d.H);
  }

  // Of steps [begin, end), from the gradients of their gates
  void gradients_of_inputs_and_weights(Index begin, Index end) const {
    const Index count = this->at(end) - chunk;
    const RowsAt<const T> x = this->x_rows(chunk);
    const RowsAt<const T> dgx{gates_at(chunk, F::x_block), D * d.H}, dgh{gates_at(chunk, F::h_block), D * d.H};
    const Index turn = Cell::split ? (G - 1) * d.H : 0;  // dgx begins with the last gate
    if (call.dx)
      products.template multiply<false, true>({int(count),
                                               int(d.I),
                                               int(G * d.H),
                                               dgx,
                                               {problem.weights.w_ih, d.I, nullptr, turn, G * d.H},
                                               this->dx_rows(call.dx, chunk)});
    if (call.dw_ih) weight_gradient(count, G * d.H, d.I, dgx, x, call.dw_ih, turn);
    if (hidden) {
      LaunchShape shape = pointwise(this->live(begin), d.R);
      shape.grid.z = unsigned(least(end - begin, 1024));
      launch(hidden_rows<T>, shape, stream, walk, begin, end, call.y, hidden);
      weight_gradient(count, F::product_gates * d.H, d.R, dgh, {hidden, d.R}, call.dw_hh);
    }
    const RowsAt<const T> through_stage{stage_units ? this->kept_middle(kept, chunk) : nullptr, d.H};
    if (Cell::middle == Middle::product && call.dw_hh)
      weight_gradient(count, d.H, d.H, {gates_at(chunk, last_x_slot), D * d.H}, through_stage,
                      call.dw_hh + F::product_gates * d.H * d.R);
    if (projects && call.dw_hr) weight_gradient(count, d.R, d.H, {d_out, d.R}, through_stage, call.dw_hr);
    if (call.db_ih || call.db_hh) sum_columns(gates, count, D * d.H);
    const Index sums_of_gates = ceil_div(count, kRowsOfASum);
    if (call.db_ih) add_columns(sums_of_gates, D * d.H, F::x_block * d.H, G * d.H, turn, call.db_ih);
    if (call.db_hh) add_columns(sums_of_gates, D * d.H, F::h_block * d.H, G * d.H, 0, call.db_hh);
  }
  void sum_columns(const T* numbers, Index count, Index columns) const {
    if (!count) return;
    const LaunchShape shape{dim3(unsigned(ceil_div(columns, kSumColumns)), unsigned(ceil_div(count, kRowsOfASum))),
                            dim3(kSumColumns, kSumRows), kSumColumns * kSumRows * sizeof(T), false};
    launch(column_sums<T>, shape, stream, numbers, count, columns, sums);
  }
  void add_columns(Index count, Index columns, Index first, Index size, Index turn, T* gradient) const {
    each(add_sums<T>, 1, size, stream, sums, count, columns, first, size, turn, gradient);
  }

  // What the tape does not hold of steps [begin, end)
  void recompute(Index begin, Index end) {
    kept.first = chunk;
    if (Cell::has_c && problem.save == Save::checkpoints)
      states.first = chunk, states.before = call.states + begin / problem.checkpoint * this->checkpoint_size();
    again->kept = kept, again->states = states;
    again->run_steps(begin, end);
  }

  void run() {
    this->prepare();
    start();
    if (again) static_cast<Base&>(*again) = *this, again->start();
    const Index every = problem.save == Save::checkpoints ? problem.checkpoint : 0;
    Parts<T> through{};
    for (Index end = this->live_steps(), begin; end > 0; end = begin) {
      begin = end - 1;
      if (every) begin -= begin % every;
      else
        while (begin > 0 && this->at(end) - this->at(begin) < chunk_target) --begin;
      chunk = this->at(begin);
      if (again) recompute(begin, end);
      through = steps(begin, end, through);
      gradients_of_inputs_and_weights(begin, end);
    }
    if (unit_sums) {
      sum_columns(unit_sums, d.N, U * d.H);
      add_columns(ceil_div(d.N, kRowsOfASum), U * d.H, 0, U * d.H, 0, call.dw_unit);
    }
    if (call.dh0) {
      const InitialGradient<T> of_h{walk,    d.R, this->live(0), through, carry_h, restart_h, problem.h_mask != nullptr,
                                    call.dh0};
      each(initial_gradient<T>, d.N, d.R, stream, of_h);
    }
    if (Cell::has_c && call.dc0) {
      const InitialGradient<T> of_c{walk, d.H, 0, {}, carry_c, restart_c, false, call.dc0};
      each(initial_gradient<T>, d.N, d.H, stream, of_c);
    }
  }
};

template <class Cell, class T> void forward(const Forward<T>& call, const Execution& execution, cudaStream_t stream) {
  if (!call.problem.dims.N) return;
  Arena arena(call.scratch);
  ForwardPass<Cell, T>(call, execution, arena, stream).run();
}
template <class Cell, class T> void backward(const Backward<T>& call, const Execution& execution, cudaStream_t stream) {
  if (!call.problem.dims.N) return;
  Arena arena(call.scratch);
  BackwardPass<Cell, T>(call, execution, arena, stream).run();
}

// Scratch as it is when everything is wanted, with a tape or without
template <class Cell, class T> Sizes sizes(const Problem<T>& problem, const Execution& execution) {
  T any;
  Arena with(nullptr), without(nullptr), back(nullptr);
  Forward<T> kept{};
  kept.problem = problem;
  const ForwardPass<Cell, T> f(kept, execution, without, nullptr);
  kept.saved = kept.states = &any;
  (void)ForwardPass<Cell, T>(kept, execution, with, nullptr);
  Backward<T> everything{};
  everything.problem = problem;
  everything.states = &any;
  everything.dx = everything.dw_ih = everything.dw_hh = everything.dw_hr = everything.dw_unit = &any;
  (void)BackwardPass<Cell, T>(everything, execution, back, nullptr);
  const std::size_t most = with.bytes() > without.bytes() ? with.bytes() : without.bytes();
  const Index states = problem.save == Save::checkpoints ? f.checkpoints() * f.checkpoint_size() : f.rows.count * f.d.H;
  return {std::size_t(problem.save == Save::all ? f.saved_size(f.rows.count) : 0),
          std::size_t(Cell::has_c ? states : 0), 0, most, back.bytes()};
}

}}  // namespace gatewise::cuda
