// The layer backward, chunks from the end: step by step the product dgates W_hh, its tiles finished by the cell's
// backward of the step before, then dx and the weights' gradients of the chunk, while its gate gradients are still in
// cache. Rows, or panels when rows are few, are shared among a team of threads; no element is ever summed by two of
// them. What forward did not keep of the gates is computed again, a chunk at a time.
//
//   dgates [P][chunk][D][units of the panel]     (scratch)
// A row of dgates takes D * W numbers; in a last panel of few units its end is never written.
#pragma once
#include "forward.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH { namespace {

// Rows of gradients, [panel][capacity][D][units of the panel]
template <class T> struct Gradients {
  static constexpr Index W = Vec<T>::width;
  T* numbers;
  int D;
  Index H, capacity;  // H: units in all panels

  GATEWISE_FN T* row(Index p, Index r) const { return numbers + (p * capacity + r) * D * W; }
  Gradients from(Index r) const { return {numbers + r * D * W, D, H, capacity}; }
  // Where slots from `block` on start in a row
  GATEWISE_FN Index slot(Index p, Index block) const { return block * least(W, H - p * W); }
};

template <class Cell, class T> struct BackwardPass : Pass<Cell, T> {
  using Base = Pass<Cell, T>;
  using Base::d, Base::D, Base::G, Base::how, Base::P, Base::problem, Base::projects, Base::rows, Base::S, Base::U,
      Base::W;
  using typename Base::Facts;
  using typename Base::V;
  static constexpr int product_gates = Facts::product_gates;
  static constexpr bool may_stage = Cell::middle == Middle::product || Facts::may_project;

  // One of the weight matrices, or what its gradient needs. Gates: how many of its rows belong to a unit.
  template <int Gates_> struct Side {
    static constexpr int Gates = Gates_;
    static constexpr int kRows = rows_per_tile(Panels<Gates>::per_group * Gates);  // weight-gradient tile: of x or h

    Index columns, units;  // the matrix is [Gates * units, columns]; no columns: there is none
    int block;             // the slot of the gradients with which its gates start
    int (*gate)(int slot);
    const T* weights;
    T* d_weights;  // the caller's, or null
    T* packed;     // for products with the gradients, or null
    T* mean;       // of a normed cell's columns, as in forward: the gradients of products have none, so nothing is lost
    T* sums;       // d_weights in packed layout, or null
    T* operand;    // the chunk's rows of what the weights are multiplied with, [tile of kRows columns][row][kRows]

    Side(Arena& arena, Index capacity, Index columns, Index units, int block, int (*gate)(int), const T* weights,
         T* d_weights, bool product)
        : columns(columns), units(units), block(block), gate(gate), weights(weights), d_weights(d_weights),
          packed(product ? arena.take<T>(Gates * units * ceil_div(columns, W) * W) : nullptr),
          mean(Cell::normed && product ? arena.take<T>(2 * columns) : nullptr),
          sums(d_weights ? arena.take<T>(size()) : nullptr),
          operand(d_weights ? arena.take<T>(ceil_div(columns, kRows) * kRows * capacity) : nullptr) {}

    Index size() const { return ceil_div(units, W) * Gates * W * columns; }
    Index groups() const { return columns ? ceil_div(ceil_div(units, W), Panels<Gates>::per_group) : 0; }
  };

  Backward<T> call;
  Side<G> x;
  Side<product_gates> h;
  Side<1> stage;             // the last gate's part of w_hh, or the projection
  T* bias_sums;              // [P], each like a row of dgates
  int unit_shift = 0;        // 1 << unit_shift sequences share the sums of their units' weights
  Index unit_blocks;         // of so many sequences
  T* unit_sums;              // [P][unit_blocks][U][W]
  Gradients<T> dgates[2];    // of this chunk and of the one after it, whose first step is still needed
  Gradients<T> dh_of;        // [R units], D = 1: of the chunk's h, where a projection makes it
  T *carry_h, *carry_c;      // [P][N][W] gradients that reach the state past the product
  T *restart_h, *restart_c;  // [P][N][W] what resets send to the initial state, or null
  T* d_middle;               // [N][H] by sorted position, of what came back from a normalisation, or null
  T* norm_sums;              // [N][4][W] by sorted position, sums in the lanes of a normed row
  SavedRows<T> saved;
  CellStates<T> states;
  ForwardPass<Cell, T> again;

  BackwardPass(const Backward<T>& call, Arena& arena)
      : Base(call.problem, arena, call.threads, kBackwardChunk), call(call),
        x(arena, this->chunk_capacity, d.I, d.H, Facts::x_block, Facts::x_gate, problem.weights.w_ih, call.dw_ih,
          call.dx),
        h(arena, this->chunk_capacity, Cell::has_product ? d.R : 0, d.H, Facts::h_block, Facts::h_gate,
          problem.weights.w_hh, call.dw_hh, true),
        stage(arena, this->chunk_capacity, stage_columns(), projects ? d.R : d.H, projects ? 0 : G - 1, Facts::h_gate,
              projects ? problem.weights.w_hr : past_h(problem.weights.w_hh),
              projects          ? call.dw_hr
              : stage_columns() ? past_h(call.dw_hh)
                                : nullptr,
              true),
        bias_sums(arena.take<T>(P * D * W)), carry_h(arena.take<T>(P * d.N * W)), carry_c(arena.take<T>(P * d.N * W)),
        again(*this, arena, recomputes(call)) {
    const Index capacity = this->chunk_capacity;
    dgates[0] = {arena.take<T>(P * capacity * D * W), D, d.H, capacity};
    dgates[1] = capacity < rows.count ? Gradients<T>{arena.take<T>(P * capacity * D * W), D, d.H, capacity} : dgates[0];
    dh_of = {arena.take<T>(projects ? ceil_div(d.R, W) * W * capacity : 0), 1, d.R, capacity};
    const bool restarts = problem.sequence.reset && problem.sequence.reset_to == ResetTo::initial;
    restart_h = restarts ? arena.take<T>(P * d.N * W) : nullptr;
    restart_c = restarts && Cell::has_c ? arena.take<T>(P * d.N * W) : nullptr;
    d_middle = Cell::middle == Middle::norm ? arena.take<T>(d.N * d.H) : nullptr;
    while (U && d.N >> unit_shift >= 32) ++unit_shift;
    unit_blocks = ceil_div(d.N, Index(1) << unit_shift);
    unit_sums = arena.take<T>(P * unit_blocks * U * W);
    norm_sums = arena.take<T>(Cell::normed ? d.N * 4 * W : 0);

    saved = {const_cast<T*>(call.saved), rows.count, 0};
    states = {const_cast<T*>(call.states), this->state_rows(), 0, false};
    if (recomputes(call)) {
      saved = {arena.take<T>(ForwardPass<Cell, T>::saved_size(again.weights, capacity)), capacity, 0};
      again.writes_states = Cell::has_c && problem.save == Save::checkpoints;
      if (again.writes_states) states = {arena.take<T>(P * (d.N + capacity) * W), d.N + capacity, 0, false};
      again.call.y = const_cast<T*>(call.y);
    }
    again.saved = saved;
  }

  void fill() {
    Base::fill();
    if (recomputes(call)) again.weights.prepare(problem.weights);
    for_each_side([&](auto& side) {
      if (side.mean && side.columns) column_means(side.weights, side.Gates * side.units, side.columns, side.mean);
    });
  }
  static bool recomputes(const Backward<T>& call) { return call.problem.save != Save::all; }
  Index stage_columns() const { return projects || Cell::middle == Middle::product ? d.H : 0; }
  // The rows of w_hh behind those that h is multiplied with at once
  template <class E> E* past_h(E* w_hh) const {
    return w_hh && Cell::middle == Middle::product ? w_hh + product_gates * d.H * d.R : nullptr;
  }
  template <class F> void for_each_side(F f) {
    f(x), f(h);
    if constexpr (may_stage) f(stage);
  }

  // Products of rows of gradients with one side's weights, in tiles: f(first row, how many, register of columns, their
  // values, the values' stride). Without gates, null, they are zeros.
  template <class Side, class F>
  void product(const Side& side, const Gradients<T>* gates, Index columns, Index count, Range groups, Index step, F f) {
    constexpr int Gates = Side::Gates;
    for (Index turn = groups.begin; turn < groups.end; ++turn) {
      const Index q = there_and_back<Cell>(step, turn, groups);
      const Index first_register = q * kColumnRegisters;
      const Index registers = least(kColumnRegisters, ceil_div(columns, W) - first_register);
      const Index K = Gates * side.units;
      const auto group = [&](Index which) { return side.packed + which * kColumnRegisters * W * K; };
      const bool asks = turn + 1 < groups.end && columns * K * Index(sizeof(T)) > kCacheBytes / 2;
      const T *weights = group(q), *next = asks ? group(there_and_back<Cell>(step, turn + 1, groups)) : nullptr;
      const Index last = ceil_div(side.units, W) - 1, last_units = side.units - last * W;
      const Segments row_of_gates{Gates * W, last, gates ? gates->row(1, 0) - gates->row(0, 0) : 0, Gates * last_units,
                                  side.block * (last_units - W)};
      for_each_tile(count, rows_per_tile(registers), [&](Index first, Index height) {
        Tile<T> tile;
        this->meter.start();
        if (gates) {
          const T* a[kMaxRows] = {};
          for (Index r = 0; r < height; ++r) a[r] = gates->row(0, first + r) + side.block * W;
          kMultiplyRows<T>[registers - 1][height - 1](a, row_of_gates, weights, tile,
                                                      this->ahead(weights, next, first, height, registers, K));
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
  void step(Index s, const Gradients<T>& later, const Gradients<T>& gates, Index chunk, Range own, Range groups) {
    const Index live = rows.live(s), continuing = s + 1 < d.T ? rows.live(s + 1) : 0;
    const Range fed{least(own.begin, continuing), least(own.end, continuing)};
    const Range all{own.begin, least(own.end, live)};
    const Range last{own.begin > continuing ? own.begin : continuing, least(own.end, live)};  // s is their last step
    if (Cell::normed && all.size() > 0) zero_norm_sums(all);
    const auto finish_from = [&](Index i) {
      return [=](Index first, Index height, Index p, const T* dh, Index stride) {
        if (Facts::staged || projects) finish_output(s, gates, chunk, i + first, height, p, dh, stride);
        else finish(s, gates, chunk, i + first, height, p, dh, stride);
      };
    };
    const Gradients<T> fed_gates = later.from(fed.begin);
    product(h, Cell::has_product ? &fed_gates : nullptr, d.R, fed.size(), groups, s, finish_from(fed.begin));
    product(h, nullptr, d.R, last.size(), groups, s, finish_from(last.begin));
    if constexpr (may_stage) {
      if (stage.columns) {
        const Gradients<T> of_stage = (projects ? dh_of : gates).from(rows.offset[s] + all.begin - chunk);
        product(stage, &of_stage, d.H, all.size(), {0, column_groups<T>(d.H)}, s,
                [&](Index first, Index height, Index p, const T* dh, Index stride) {
                  finish(s, gates, chunk, all.begin + first, height, p, dh, stride);
                });
      }
    }
    if constexpr (Cell::normed) d_normed_step(s, gates, chunk, all);
  }

  // The rest of the step of a normed cell: back through what was standardised. If x are n numbers less their mean,
  // times their scale, then the gradient d of x becomes that of the numbers so: scale (d - mean(d) - x mean(d x)).
  void d_normed_step(Index s, const Gradients<T>& gates, Index chunk, Range positions) {
    for_each_tile(positions.size(), kMaxRows, [&](Index first, Index height) {
      const Index i = positions.begin + first, row = rows.offset[s] + i, kept_row = row - saved.first;
      if constexpr (Cell::middle == Middle::norm) {
        FromStandard of_c[kMaxRows];
        for (Index r = 0; r < height; ++r)
          of_c[r] = from_standard(*again.scale_at(2, kept_row + r), norm_sum(0, i + r), norm_sum(1, i + r), d.H);
        zero_norm_sums({i, i + height});
        for (Index p = 0; p < P; ++p) finish(s, gates, chunk, i, height, p, d_middle + i * d.H + p * W, d.H, of_c);
      }
      FromStandard of_x[kMaxRows], of_h[kMaxRows];
      for (Index r = 0; r < height; ++r) {
        of_x[r] = from_standard(*again.scale_at(0, kept_row + r), norm_sum(0, i + r), norm_sum(1, i + r), G * d.H);
        of_h[r] = from_standard(*again.scale_at(1, kept_row + r), norm_sum(2, i + r), norm_sum(3, i + r), G * d.H);
      }
      for (Index p = 0; p < P; ++p)
        this->with_units(p, [&](auto units) {
          for (Index r = 0; r < height; ++r) {
            const T* products = again.saved_at(p, kept_row + r) + G * W;
            T* dgx = gates.row(p, row + r - chunk) + Facts::x_block * units;
            T* dgh = gates.row(p, row + r - chunk) + Facts::h_block * units;
            const V x_scale(of_x[r].scale), h_scale(of_h[r].scale);
            GATEWISE_UNROLL
            for (int g = 0; g < G; ++g) {
              const V x = V::load(products + g * W) * x_scale, h = V::load(products + (G + g) * W) * h_scale;
              of_x[r].apply(V::load(dgx + g * units, units), x).store(dgx + g * units, units);
              of_h[r].apply(V::load(dgh + g * units, units), h).store(dgh + g * units, units);
            }
          }
        });
    });
  }
  struct FromStandard {
    T scale, less_mean, along;
    GATEWISE_FN V apply(V gradient, V x) const { return fma(x, V(along), fma(gradient, V(scale), V(less_mean))); }
  };
  static FromStandard from_standard(T scale, T sum, T sum_along, Index n) {
    return {scale, -scale * (sum / T(n)), -scale * (sum_along / T(n))};
  }
  // Of sorted position i: 0, 1: the gradients of X or, first, of C, and their products with these numbers; 2, 3: of Hh
  GATEWISE_FN T* norm_sums_at(Index i) const { return norm_sums + i * 4 * W; }
  GATEWISE_FN T norm_sum(int which, Index i) const { return lane_sum(V::load(norm_sums_at(i) + which * W)); }
  void zero_norm_sums(Range positions) const { zero(norm_sums_at(positions.begin), positions.size() * 4 * W); }

  // What a tile's row of the product says of the gradient of h after step s, with all else that reaches it. units:
  // lanes
  template <class Lanes> GATEWISE_FN V total_dh(Index s, Index i, Index p, const T* product, const T* carry,
                                                const T* dy, Lanes lanes, bool options) {
    V dh = V::load(product);
    if (options && problem.h_mask) dh = dh * V::load(this->mask_of(i) + p * W, lanes);
    dh = dh + V::load(carry);
    if (options && cut(s, i)) dh = send(dh, restart_h, p, i);
    if (dy) dh = dh + V::load(dy, lanes);
    return dh;
  }
  // Whether the state after step s ends there, because the next step starts anew
  GATEWISE_FN bool cut(Index s, Index i) const {
    return problem.sequence.reset && s + 1 < d.T && i < rows.live(s + 1) && this->restarts(s + 1, i);
  }
  // The gradient is the initial state's, or nobody's; zero goes on
  GATEWISE_FN V send(V gradient, T* restarts, Index p, Index i) {
    if (!restarts) return V(0);
    T* sum = restarts + (p * d.N + i) * W;
    (V::load(sum) + gradient).store(sum);
    return V(0);
  }

  // The epilogue: the cell's backward on a tile's rows of one panel. of_c [height]: how dh, of standardised c, is made
  // that of c
  GATEWISE_FN void finish(Index s, const Gradients<T>& gates, Index chunk, Index i, Index height, Index p, const T* dh,
                          Index stride, const FromStandard* of_c = nullptr) {
    const Index row = rows.offset[s] + i, unit = p * W;
    const T* kept = again.saved_at(p, row - saved.first);
    // A normed cell's row is long: the step that comes next is asked for while this one is computed.
    const T* ahead = again.saved_at(p, (s > 0 ? rows.offset[s - 1] + i : row) - saved.first);
    const T* c_prev = states.numbers + (p * states.stride + this->state_row(states, s - 1) + i) * W;
    T *h_carry = carry_h + (p * d.N + i) * W, *c_carry = carry_c + (p * d.N + i) * W;
    T* out = gates.row(p, row - chunk);
    const Index *place = rows.place + row, R = d.R;
    const T *const dy = call.dy ? call.dy + unit : nullptr, *const y = call.y;
    this->epilogue(d.H - unit, [&](auto units, auto options) {
      const bool zones = options && this->zones(), in_stage = Facts::staged || (options && projects);
      const Unit<V, U> own = unit_of(p, options);
      for (Index r = 0; r < height; ++r, out += D * W) {
        const T* h_prev = this->previous_h(y, s, i + r, options);
        V to_save[S], dgx[G], dgh[G], dw[U ? U : 1];
        GATEWISE_UNROLL
        for (int k = 0; k < S; ++k) to_save[k] = V::load(kept + (r * S + k) * W);
        if constexpr (Cell::normed) {
          GATEWISE_UNROLL
          for (int k = 0; k < S; ++k) __builtin_prefetch(ahead + (r * S + k) * W);
          const V of_x(*again.scale_at(0, row - saved.first + r)), of_h(*again.scale_at(1, row - saved.first + r));
          GATEWISE_UNROLL
          for (int g = 0; g < G; ++g)
            to_save[G + g] = to_save[G + g] * of_x, to_save[2 * G + g] = to_save[2 * G + g] * of_h;
        }
        State<V> prev{h_prev && !(options && projects) ? V::load(h_prev + unit, units) : V(0), V(0)};
        State<V> grad{in_stage ? V::load(dh + r * stride, units)
                               : total_dh(s, i + r, p, dh + r * stride, h_carry + r * W,
                                          dy ? dy + place[r] * R : nullptr, units, options),
                      V(0)};
        if constexpr (Cell::middle == Middle::norm) grad.h = of_c[r].apply(grad.h, to_save[Cell::output_saved]);
        State<V> bypass{V(0), V(0)};
        if (Cell::has_c) {
          prev.c =
              V::load(options && this->restarts(s, i + r) ? this->start_c + (p * d.N + i + r) * W : c_prev + r * W);
          grad.c = V::load(c_carry + r * W);
          if (options && cut(s, i + r)) grad.c = send(grad.c, restart_c, p, i + r);
        }
        if (zones) {
          const State<V> keep = this->zoneout(s, i + r, p);
          if (!in_stage) bypass.h = keep.h * grad.h, grad.h = (V(1) - keep.h) * grad.h;
          if (Cell::has_c) bypass.c = keep.c * grad.c, grad.c = (V(1) - keep.c) * grad.c;
        }
        if constexpr (Facts::staged) {  // the stage's own have been there
          GATEWISE_UNROLL
          for (int g = 0; g < G; ++g) dgx[g] = V::load(out + Facts::x_slot(g) * units, units);
          bypass.h = V::load(h_carry + r * W);
        }
        const bool masked = options && Cell::middle == Middle::product && problem.h_mask;
        const V mask = masked ? V::load(this->mask_of(i + r) + unit, units) : V(1);
        if (masked) prev.h = prev.h * mask;
        State<V> before = Cell::backward(to_save, own, prev, grad, dgx, dgh, dw);
        if (masked) before.h = before.h * mask;
        if (zones || Facts::staged) before = {before.h + bypass.h, before.c + bypass.c};
        if (!(options && projects)) before.h.store(h_carry + r * W);
        if (Cell::has_c) before.c.store(c_carry + r * W);
        GATEWISE_UNROLL
        for (int g = 0; g < G; ++g) dgx[g].store(out + Facts::x_slot(g) * units, units);
        if (Cell::split) dgh[G - 1].store(out + Facts::h_slot(G - 1) * units, units);
        if (Cell::normed) {
          GATEWISE_UNROLL
          for (int g = 0; g < G; ++g) dgh[g].store(out + Facts::h_slot(g) * units, units);
          V sum_x(0), along_x(0), sum_h(0), along_h(0);
          GATEWISE_UNROLL
          for (int g = 0; g < G; ++g) {
            const V of_x = first_of(dgx[g], units), of_h = first_of(dgh[g], units);
            sum_x = sum_x + of_x, along_x = fma(of_x, to_save[G + g], along_x);
            sum_h = sum_h + of_h, along_h = fma(of_h, to_save[2 * G + g], along_h);
          }
          T* sums = norm_sums_at(i + r);
          add_to(sums, sum_x), add_to(sums + W, along_x), add_to(sums + 2 * W, sum_h), add_to(sums + 3 * W, along_h);
        }
        if (U && call.dw_unit) add_unit(p, i + r, dw, 0, Facts::cell_units);
      }
    });
  }

  // The gradients of the units' weights are summed by blocks of sequences, which no two threads share, whatever their
  // number: few enough to stay in cache, enough of them for sixteen threads.
  GATEWISE_FN void add_unit(Index p, Index i, const V (&dw)[U ? U : 1], int begin, int end) {
    T* sum = unit_sums + (p * unit_blocks + (i >> unit_shift)) * U * W;
    GATEWISE_UNROLL
    for (int u = begin; u < end; ++u) add_to(sum + u * W, dw[u]);
  }

  // Back through what makes h of what came back from the stage, or of the projection
  GATEWISE_FN void finish_output(Index s, const Gradients<T>& gates, Index chunk, Index i, Index height, Index p,
                                 const T* dh, Index stride) {
    const Index row = rows.offset[s] + i, unit = p * W, *place = rows.place + row, R = d.R;
    const T *const dy = call.dy ? call.dy + unit : nullptr, *const carry = carry_h + (p * d.N + i) * W;
    this->epilogue(d.R - unit, [&](auto lanes, auto options) {
      const Unit<V, U> own = unit_of(p, options);
      for (Index r = 0; r < height; ++r) {
        V total =
            total_dh(s, i + r, p, dh + r * stride, carry + r * W, dy ? dy + place[r] * R : nullptr, lanes, options);
        V bypass(0);
        if (options && this->zones()) {
          const V keep = this->zoneout(s, i + r, p).h;
          bypass = keep * total, total = (V(1) - keep) * total;
        }
        if constexpr (Facts::staged) {
          const T *kept = again.saved_at(p, row + r - saved.first),
                  *h_prev = this->previous_h(call.y, s, i + r, options);
          V to_save[S], dgx[G] = {}, dw[U ? U : 1] = {};
          for (int k = 0; k < S; ++k) to_save[k] = V::load(kept + k * W);
          const State<V> prev{h_prev ? V::load(h_prev + unit, lanes) : V(0), V(0)};
          const Staged<V> d_stage = Cell::d_output(to_save, own, prev, total, dgx, dw);
          bypass = bypass + d_stage.prev_h;
          T* out = gates.row(p, row + r - chunk);
          for (int g = Cell::output_gate; g < G; ++g) dgx[g].store(out + Facts::x_slot(g) * lanes, lanes);
          if (U && call.dw_unit) add_unit(p, i + r, dw, Facts::cell_units, U);
          if constexpr (Cell::middle == Middle::norm) {
            d_stage.middle.store(d_middle + (i + r) * d.H + unit, lanes);
            const V of_c = first_of(d_stage.middle, lanes);
            add_to(norm_sums_at(i + r), of_c), add_to(norm_sums_at(i + r) + W, of_c * to_save[Cell::output_saved]);
          }
        } else {
          total.store(dh_of.row(p, row + r - chunk), lanes);
        }
        bypass.store(carry_h + (p * d.N + i + r) * W);
      }
    });
  }

  GATEWISE_FN Unit<V, U> unit_of(Index p, bool options) const {
    Unit<V, U> own;
    for (int u = 0; u < U; ++u) own.w[u] = V::load(problem.weights.w_unit + u * d.H + p * W, d.H - p * W);
    own.clip = V(problem.cell_clip), own.clips = options;
    return own;
  }

  // Copies the chunk's rows of x, of the state before each step, or of what went through the stage, into the order in
  // which their tiles read them
  template <class Side> void pack_operand(const Side& side, Index first_step, Index end_step, int id, int parts) {
    constexpr Index kRows = Side::kRows;
    const Range tiles = share(ceil_div(side.columns, kRows), id, parts);
    const Index chunk = rows.offset[first_step], capacity = this->chunk_capacity;
    const bool is_h = static_cast<const void*>(&side) == &h, is_x = static_cast<const void*>(&side) == &x;
    for (Index s = first_step; s < end_step; ++s)
      for (Index i = 0; i < rows.live(s); ++i) {
        const Index row = rows.offset[s] + i;
        const T* from = is_x   ? problem.sequence.x + rows.x_at[row]
                        : is_h ? this->previous_h(call.y, s, i)
                               : again.middle_at(s, i);
        const T* mask = is_h ? this->mask_of(i) : nullptr;
        for (Index tile = tiles.begin; tile < tiles.end; ++tile) {
          const Index column = tile * kRows, n = least(kRows, side.columns - column);
          T* to = side.operand + (tile * capacity + row - chunk) * kRows;
          if (!from) zero(to, n);
          else if (mask)
            for (Index k = 0; k < n; ++k) to[k] = from[column + k] * mask[column + k];
          else if (n == kRows) copy(from + column, to, kRows);  // of a size the compiler knows
          else copy(from + column, to, n);
        }
      }
  }

  // sums += operand^T gradients. Each chunk is summed apart and then added, which also bounds the rounding error.
  template <class Side>
  void weight_gradient(const Side& side, const Gradients<T>& gates, Index count, int id, int parts) {
    constexpr int Gates = Side::Gates, per_group = Panels<Gates>::per_group, kRows = Side::kRows;
    const Range groups = share(side.groups(), id, parts);
    for (Index q = groups.begin; q < groups.end; ++q) {
      const Index registers = Panels<Gates>::registers(q, side.units, W);
      const T* b[kMaxRegisters] = {};
      for (Index v = 0; v < registers; ++v) {
        const Index p = q * per_group + v / Gates;
        b[v] = gates.row(p, 0) + gates.slot(p, side.block) + v % Gates * W;
      }
      T* sums = side.sums + Panels<Gates>::place(q, W, side.columns);
      for (Index column = 0; column < side.columns; column += kRows) {
        const Index height = least(kRows, side.columns - column);
        const T* a = side.operand + column * this->chunk_capacity;
        Tile<T> tile;
        this->meter.start();
        kMultiplyColumns<T>[registers - 1][height - 1](a, kRows, count, b, W* gates.D, tile);
        this->meter.stop(&Ticks::products);
        T* sum = sums + column * registers * W;
        for (Index v = 0; v < height * registers; ++v, sum += W)
          (V::load(sum) + V::load(tile.numbers + v * W)).store(sum);
        this->meter.stop(&Ticks::epilogues);
      }
    }
  }

  void bias_gradient(const Gradients<T>& gates, Index count, Range panels) {
    for (Index p = panels.begin; p < panels.end; ++p) {
      V sum[D];
      GATEWISE_UNROLL
      for (int g = 0; g < D; ++g) sum[g] = V(0);
      for (Index r = 0; r < count; ++r) {
        GATEWISE_UNROLL
        for (int g = 0; g < D; ++g) sum[g] = sum[g] + V::load(gates.row(p, r) + g * W);
      }
      GATEWISE_UNROLL
      for (int g = 0; g < D; ++g) {
        T* total = bias_sums + (p * D + g) * W;
        (V::load(total) + sum[g]).store(total);
      }
    }
  }

  void write_weight_gradients(int id, int parts) {
    for_each_side([&](auto& side) {
      if (!side.d_weights) return;
      constexpr int Gates = std::remove_reference_t<decltype(side)>::Gates;
      const Range groups = share(side.groups(), id, parts);
      for (Index q = groups.begin; q < groups.end; ++q)
        unpack_add<T, Gates>(side.sums + Panels<Gates>::place(q, W, side.columns), side.units, side.columns, side.gate,
                             q, side.d_weights);
    });
    const Range panels = share(P, id, parts);
    for (Index p = panels.begin; p < panels.end; ++p) {
      const Index n = this->units(p);
      const auto add = [&](T* gradient, int block, int slot) {
        if (!gradient) return;
        T* to = gradient + block * d.H + p * W;
        (V::load(to, n) + V::load(bias_sums + p * D * W + slot * n, n)).store(to, n);
      };
      for (int g = 0; g < G; ++g) add(call.db_ih, g, Facts::x_slot(g)), add(call.db_hh, g, Facts::h_slot(g));
      for (int u = 0; u < U && call.dw_unit; ++u) {
        V sum(0);
        for (Index i = 0; i < unit_blocks; ++i) sum = sum + V::load(unit_sums + ((p * unit_blocks + i) * U + u) * W);
        T* to = call.dw_unit + u * d.H + p * W;
        (V::load(to, n) + sum).store(to, n);
      }
    }
  }

  // Packs weights and clears sums: this thread's part of each
  void prepare(int id, int parts) {
    const Range sequences = share(d.N, id, parts), panels = share(P, id, parts);
    for_each_side([&](auto& side) {
      constexpr int Gates = std::remove_reference_t<decltype(side)>::Gates;
      const Range columns = share(column_groups<T>(side.columns), id, parts);
      for (Index q = columns.begin; q < columns.end && side.packed; ++q)
        pack_columns<T, Gates>(side.weights, side.units, side.columns, side.gate, q, side.packed, side.mean);
      const Range sums = share(side.sums ? side.size() : 0, id, parts);
      if (side.sums) zero(side.sums + sums.begin, sums.size());
    });
    if (call.dx) zero_padding(problem, call.dx, d.I, sequences);
    zero(unit_sums + panels.begin * unit_blocks * U * W, panels.size() * unit_blocks * U * W);
    zero(bias_sums + panels.begin * D * W, panels.size() * D * W);
    this->gather(call.dhn, d.R, carry_h, d.N, sequences);
    if (Cell::has_c) this->gather(call.dcn, d.H, carry_c, d.N, sequences);
    if (restart_h) this->gather(nullptr, d.R, restart_h, d.N, sequences);
    if (restart_c) this->gather(nullptr, d.H, restart_c, d.N, sequences);
    if (recomputes(call)) again.weights.fill(problem.weights, id, parts);
  }

  // What follows from the gate gradients of a chunk of `count` rows that starts at row `chunk`
  void finish_chunk(const Gradients<T>& gates, Index chunk, Index count, int id, int parts) {
    const Range part = share(count, id, parts);
    const Gradients<T> own = gates.from(part.begin);
    if (call.dx)
      product(x, &own, d.I, part.size(), {0, column_groups<T>(d.I)}, 0,
              [&](Index first, Index height, Index v, const T* dx, Index stride) {
                for (Index r = 0; r < height; ++r)
                  V::load(dx + r * stride)
                      .store(call.dx + rows.place[chunk + part.begin + first + r] * d.I + v * W, d.I - v * W);
              });
    if (x.d_weights) weight_gradient(x, gates, count, id, parts);
    if (h.d_weights) weight_gradient(h, gates, count, id, parts);
    if constexpr (may_stage)
      if (stage.d_weights) weight_gradient(stage, projects ? dh_of : gates, count, id, parts);
    if (call.db_ih || call.db_hh) bias_gradient(gates, count, share(P, id, parts));
  }

  // The gates of steps [begin, end), and c if only checkpoints of it were kept, once more
  void recompute(Team& team, int id, Index begin, Index end, Range own, Range own_groups) {
    const Index chunk = rows.offset[begin];
    saved.first = chunk;
    again.saved = saved;
    if (Cell::has_c && problem.save == Save::checkpoints) {
      states.first_step = begin;
      const Range positions = share(rows.live(begin), id, team.size);
      for (Index p = 0; p < P; ++p)
        copy(call.states + ((p * this->checkpoints() + begin / problem.checkpoint) * d.N + positions.begin) * W,
             states.numbers + (p * states.stride + positions.begin) * W, positions.size() * W);
    }
    again.states = states;
    again.run_chunk(team, id, begin, end, own, own_groups);
    team.barrier();
  }

  void run(Team& team, int id) {
    const FlushSubnormals flush;
    const Range sequences = share(d.N, id, team.size);
    const Range h_columns = share(column_groups<T>(d.R), id, team.size);
    const bool by_panels = how.sharing == Sharing::panels;
    const Range own = by_panels ? Range{0, d.N} : own_positions(problem, rows, id, team.size, Index(1) << unit_shift);
    const Range own_columns = by_panels ? h_columns : Range{0, column_groups<T>(d.R)};
    const Range own_groups = by_panels ? share(this->groups, id, team.size) : Range{0, this->groups};
    const Index every = problem.save == Save::checkpoints ? problem.checkpoint : 0;

    prepare(id, team.size);
    team.barrier();
    Index end = 0;
    while (end < d.T && rows.live(end) > 0) ++end;
    int current = 0;
    for (Index begin; end > 0; end = begin, current = 1 - current) {
      begin = end - 1;
      if (every) begin -= begin % every;
      else
        while (begin > 0 && rows.offset[end] - rows.offset[begin] < this->chunk_target) --begin;
      const Index chunk = rows.offset[begin], count = rows.offset[end] - chunk;
      const Gradients<T> gates = dgates[current];
      if (recomputes(call)) recompute(team, id, begin, end, own, own_groups);
      for (Index s = end - 1; s >= begin; --s) {
        const Gradients<T> later = s == end - 1 ? dgates[1 - current] : gates.from(rows.offset[s + 1] - chunk);
        step(s, later, gates, chunk, own, own_columns);
        if (by_panels) team.barrier();
      }
      for_each_side([&](auto& side) {
        if (side.d_weights) pack_operand(side, begin, end, id, team.size);
      });
      team.barrier();
      finish_chunk(gates, chunk, count, id, team.size);
      team.barrier();
    }
    write_weight_gradients(id, team.size);
    if (call.dh0) initial_state_gradient(dgates[1 - current], h_columns);
    if (Cell::has_c && call.dc0)
      for (Index i = sequences.begin; i < sequences.end; ++i) {
        if (restart_c || starts_from_zero(i)) add_restarts(carry_c, restart_c, i, d.H);
        this->scatter(carry_c, d.N, i, call.dc0, rows.order[i]);
      }
  }

  // Whether a reset at the very first step drops the initial state
  bool starts_from_zero(Index i) const {
    return problem.sequence.reset && problem.sequence.reset_to == ResetTo::zero &&
           length_of(problem, rows.order[i]) > 0 && this->restarts(0, i);
  }
  void add_restarts(T* carry, const T* restarts, Index i, Index width) const {
    for (Index p = 0; p < ceil_div(width, W); ++p) {
      T* to = carry + (p * d.N + i) * W;
      const V from_start = starts_from_zero(i) ? V(0) : V::load(to);
      (restarts ? from_start + V::load(restarts + (p * d.N + i) * W) : from_start).store(to);
    }
  }

  void initial_state_gradient(const Gradients<T>& first_step, Range columns) {
    const Index live = d.T > 0 ? rows.live(0) : 0;
    const auto store_from = [&](Index from) {
      return [=](Index first, Index height, Index p, const T* dh, Index stride) {
        for (Index r = 0; r < height; ++r) {
          const Index i = from + first + r, lanes = d.R - p * W;
          V total = V::load(dh + r * stride);
          if (problem.h_mask) total = total * V::load(this->mask_of(i) + p * W, lanes);
          total = total + V::load(carry_h + (p * d.N + i) * W);
          if (starts_from_zero(i)) total = V(0);
          if (restart_h) total = total + V::load(restart_h + (p * d.N + i) * W);
          total.store(call.dh0 + rows.order[i] * d.R + p * W, lanes);
        }
      };
    };
    product(h, Cell::has_product ? &first_step : nullptr, d.R, live, columns, 0, store_from(0));
    product(h, nullptr, d.R, d.N - live, columns, 0, store_from(live));
  }
};

}}}  // namespace gatewise::GATEWISE_ARCH
