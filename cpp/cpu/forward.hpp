// The layer forward, a chunk of steps at a time: gx = W_ih x + b of the whole chunk, then step by step the product
// W_hh h, every tile of it finished by the cell while it is in L1. Where the cell waits for a stage in the middle, or a
// projection follows it, a second product or a normalisation and a second epilogue complete the step.
//
// Buffers, W lanes to a register, P = ceil(H / W) panels, R packed rows (rows.hpp):
//   saved  [P][R][S][W], behind it scales [3][R] of a normed cell, then [R][H] what went through the stage of a product
//   states [P][N + R][W], c0 in the first N rows, or [P][checkpoints][N][W]     (the tape: these two)
//   gx     [P][chunk][G][W]                                                     (scratch)
//
// The weights of a normed cell are packed less the mean of each column: the mean of their product with anything is
// zero, and its variance the mean of the squares, which are summed while the product is in L1. What is saved behind its
// gates are these products as they come, and they wait there for the cell; whoever reads them multiplies them with the
// row's scale. Lanes past H hold junk.
#pragma once
#include "pass.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH { namespace {

// The weights as forward reads them. bias [P][G + 1][W] is what is added to gx, and to gh of a split cell's last gate.
template <class Cell, class T> struct PackedWeights {
  using Facts = CellFacts<Cell, T>;
  using V = Vec<T>;
  static constexpr Index W = Facts::W;
  static constexpr int G = Facts::G, U = Facts::U, product_gates = Facts::product_gates;

  Dims d;
  Index P;
  Index stage_units;  // of the product in the stage: H of the last gate, R of the projection, 0: there is none
  T *w_ih, *w_hh, *w_stage, *bias, *unit;
  T *mean_ih, *mean_hh;  // of a normed cell's columns, in two parts: column_means()

  PackedWeights(const Problem<T>& p, Arena& arena)
      : d(p.dims), P(ceil_div(d.H, W)), stage_units(Cell::middle == Middle::product        ? d.H
                                                    : Facts::may_project && p.weights.w_hr ? d.R
                                                                                           : 0),
        w_ih(arena.take<T>(P * G * W * d.I)), w_hh(arena.take<T>(Cell::has_product ? P * product_gates * W * d.R : 0)),
        w_stage(arena.take<T>(ceil_div(stage_units, W) * W * d.H)), bias(arena.take<T>(P * (G + 1) * W)),
        unit(arena.take<T>(P * U * W)), mean_ih(Cell::normed ? arena.take<T>(2 * d.I) : nullptr),
        mean_hh(Cell::normed ? arena.take<T>(2 * d.R) : nullptr) {}

  Index bytes() const { return P * G * W * (d.I + d.R) * Index(sizeof(T)); }

  // What all parts of fill() read
  void prepare(const Weights<T>& w) {
    if (!Cell::normed) return;
    column_means(w.w_ih, G * d.H, d.I, mean_ih);
    column_means(w.w_hh, G * d.H, d.R, mean_hh);
  }
  // Where a group lies
  T* ih(Index group) const { return w_ih + Panels<G>::place(group, W, d.I); }
  T* hh(Index group) const { return w_hh + Panels<product_gates>::place(group, W, d.R); }
  T* stage(Index group) const { return w_stage + Panels<1>::place(group, W, d.H); }
  // One group, to the place of any
  void pack_ih(const Weights<T>& w, Index group, Index place) const {
    pack<T, G>(w.w_ih, d.H, d.I, Facts::h_gate, group, ih(place), mean_ih);
  }
  void pack_hh(const Weights<T>& w, Index group, Index place) const {
    if constexpr (Cell::has_product) pack<T, product_gates>(w.w_hh, d.H, d.R, Facts::h_gate, group, hh(place), mean_hh);
  }

  // This thread's part of everything; of the two large matrices only if they are wanted
  void fill(const Weights<T>& w, int id, int parts, bool matrices = true) {
    const Range groups = share(matrices ? ceil_div(P, Facts::group) : 0, id, parts);
    for (Index q = groups.begin; q < groups.end; ++q) pack_ih(w, q, q);
    const Range of_h = share(matrices ? ceil_div(P, Panels<product_gates>::per_group) : 0, id, parts);
    for (Index q = of_h.begin; q < of_h.end; ++q) pack_hh(w, q, q);
    if constexpr (Cell::middle == Middle::product || Facts::may_project) {
      const T* from = Facts::may_project ? w.w_hr : w.w_hh + (G - 1) * d.H * d.R;
      const Range own = share(ceil_div(ceil_div(stage_units, W), Panels<1>::per_group), id, parts);
      for (Index q = own.begin; q < own.end; ++q) pack<T, 1>(from, stage_units, d.H, Facts::h_gate, q, stage(q));
    }
    const Range panels = share(P, id, parts);
    for (Index p = panels.begin; p < panels.end; ++p) {
      for (int g = 0; g <= G; ++g) {
        const Index gate = least(g, G - 1) * d.H + p * W, n = d.H - p * W;
        const V ih = w.b_ih ? V::load(w.b_ih + gate, n) : V(0), hh = w.b_hh ? V::load(w.b_hh + gate, n) : V(0);
        const bool apart = Cell::split && g == G - 1;  // r acts on b_hh too: it cannot move into gx
        (g == G ? hh : apart ? ih : ih + hh).store(bias + (p * (G + 1) + g) * W);
      }
      for (int u = 0; u < U; ++u) V::load(w.w_unit + u * d.H + p * W, d.H - p * W).store(unit + (p * U + u) * W);
    }
  }

  GATEWISE_FN Unit<V, U> of(Index p, T clip, bool clips) const {
    Unit<V, U> own;
    for (int u = 0; u < U; ++u) own.w[u] = V::load(unit + (p * U + u) * W);
    own.clip = V(clip), own.clips = clips;
    return own;
  }
};

// Where forward leaves what backward needs, [P][stride][S][W]: of all rows; or, when backward computes it again, of the
// rows of a chunk; or nowhere but until the end of the step, by sorted position, where the cell itself needs it there.
template <class T> struct SavedRows {
  T* numbers = nullptr;
  Index stride = 0, first = 0;
};

template <class Cell, class T> struct ForwardPass : Pass<Cell, T> {
  using Base = Pass<Cell, T>;
  using Base::d, Base::G, Base::how, Base::P, Base::problem, Base::projects, Base::rows, Base::S, Base::U, Base::W;
  using typename Base::Facts;
  using typename Base::V;
  static constexpr int product_gates = Facts::product_gates;

  Forward<T> call;
  bool again;  // computes for backward what the tape does not hold, from the states that it does
  PackedWeights<Cell, T> weights;
  T* gx;
  T* masked;            // [N][R] by sorted position: h times its mask, or null
  T* hidden;            // [P][N][G][W] by sorted position: a normed cell's products with h, where they are not kept
  T* row_sums;          // [N][W] by sorted position: sums in the lanes of a normed row
  T *x_sums, *x_scale;  // [chunk][W], [chunk]: likewise of gx, and by what it is to be multiplied
  T* middle;            // [N][H] by sorted position: what goes through the stage, where it is not kept
  SavedRows<T> saved;
  CellStates<T> states;
  bool writes_states = true;
  bool unpacked = false;  // reads the large matrices as they are
  Index place = -1;       // or of the group in use, where each is packed when its turn comes

  ForwardPass(const Forward<T>& call, Arena& arena) : ForwardPass(call, arena, Arena(const_cast<void*>(call.packed))) {}
  ForwardPass(const Forward<T>& call, Arena& arena, Arena packed)
      : ForwardPass(Base(call.problem, arena, call.threads, kForwardChunk), call, arena, call.packed ? packed : arena) {
    if (call.saved) saved = {call.saved, rows.count, 0};
    else if (Facts::staged) saved = {arena.take<T>(P * d.N * S * W), d.N, -1};
    if (!Cell::has_c) return;
    T* current = arena.take<T>(P * d.N * W);
    states = {current, d.N, 0, true};
    if (call.states && problem.save != Save::checkpoints) states = {call.states, this->state_rows(), 0, false};
  }
  // Backward's: it shares the rows, and says where results go
  ForwardPass(const Base& base, Arena& arena, bool needed, Arena nowhere = Arena(nullptr))
      : ForwardPass(base, Forward<T>{base.problem, {}, {}, {}, {}, {}, {}, 1}, needed ? arena : nowhere,
                    needed ? arena : nowhere) {
    again = true, this->plain = false;
  }

  void fill() {
    Base::fill();
    if (!call.packed) weights.prepare(problem.weights);
  }
  Index state_row(Index s) const { return Base::state_row(states, s); }
  bool keeps_gates() const { return saved.numbers && !(Facts::staged && saved.first < 0); }
  GATEWISE_FN Index saved_row(Index s, Index i) const {
    return Facts::staged && saved.first < 0 ? i : rows.offset[s] + i - saved.first;
  }
  GATEWISE_FN T* saved_at(Index p, Index row) const { return saved.numbers + (p * saved.stride + row) * S * W; }
  // A normed cell's products, `pitch` from row to row
  GATEWISE_FN T* gx_at(Index p, Index row, Index chunk) const {
    return Cell::normed && keeps_gates() ? saved_at(p, row - saved.first) + G * W
                                         : gx + (p * this->chunk_capacity + row - chunk) * G * W;
  }
  GATEWISE_FN T* gh_at(Index p, Index s, Index i) const {
    return keeps_gates() ? saved_at(p, saved_row(s, i)) + 2 * G * W : hidden + (p * d.N + i) * G * W;
  }
  GATEWISE_FN Index pitch() const { return Cell::normed && keeps_gates() ? S * W : G * W; }
  // Of a normed cell: the scales of gx, gh and c
  GATEWISE_FN T* scale_at(int which, Index row) const { return saved_at(P, 0) + which * saved.stride + row; }
  // What goes through the stage before a product is kept behind everything else: the product's weights need it.
  static constexpr Index kScales = Cell::normed ? 3 : 0;
  bool keeps_middle() const { return weights.stage_units && keeps_gates(); }
  GATEWISE_FN T* middle_at(Index s, Index i) const {
    if (!keeps_middle()) return middle + i * d.H;
    return saved_at(P, 0) + kScales * saved.stride + saved_row(s, i) * d.H;
  }
  static Index saved_size(const PackedWeights<Cell, T>& weights, Index rows) {
    return rows * (weights.P * S * W + kScales + (weights.stage_units ? weights.d.H : 0));
  }

  // A tile's rows times a group of one of the two large matrices as it is, [G * H, K]. Apart from the loops that call
  // it seldom, so that it costs them no registers.
  template <int Gates> __attribute__((noinline)) void multiply_by_unpacked(const T* const* operand, Index height,
                                                                           Index K, const T* w, Index group,
                                                                           Tile<T>& tile) const {
    const Index registers = Panels<Gates>::registers(group, d.H, W);
    for_each_register<T, Gates>(d.H, Facts::h_gate, group, [&](Index v, const Index* rows, Index lanes) {
      kMultiplyUnpacked<T>[height - 1](operand, K, w, rows, lanes, tile.numbers + v* W, registers* W);
    });
  }
  Index place_of(Index group) const { return place < 0 ? group : place; }
  Index most_rows(Index registers) const { return unpacked ? kUnpackedRows<T> : rows_per_tile(int(registers)); }

  // gx of packed rows [begin, end), in a chunk that starts at row `chunk`, for the given groups of panels
  void project(Index chunk, Range packed, Range groups) {
    if (Cell::normed) zero(x_sums + (packed.begin - chunk) * W, packed.size() * W);
    for (Index q = groups.begin; q < groups.end; ++q) {
      const Index panels = this->group_panels(q), registers = this->group_registers(q);
      const Segments row_of_x = one_segment(d.I);
      const T* w_ih = weights.ih(place_of(q));
      for_each_tile(packed.size(), most_rows(registers), [&](Index first, Index height) {
        const Index row = packed.begin + first;
        const T* x[kMaxRows] = {};
        for (Index r = 0; r < height; ++r) x[r] = problem.sequence.x + rows.x_at[row + r];
        Tile<T> tile;
        this->meter.start();
        if (Cell::normed && keeps_gates())
          for (Index r = 0; r < height; ++r) prefetch(gx_at(q * Facts::group, row + r, chunk), G * W);
        if (__builtin_expect(unpacked, 0)) multiply_by_unpacked<G>(x, height, d.I, problem.weights.w_ih, q, tile);
        else kMultiplyRows<T>[registers - 1][height - 1](x, row_of_x, w_ih, tile, w_ih);
        this->meter.stop(&Ticks::products);
        for (Index r = 0; r < height; ++r)
          for (Index b = 0; b < panels; ++b) {
            const Index p = q * Facts::group + b;
            const T* product = tile.numbers + (r * registers + b * G) * W;
            T* out = gx_at(p, row + r, chunk);
            this->with_units(p, [&](auto units) {
              if constexpr (Cell::normed) return store_products(product, units, out, x_sums + (row + r - chunk) * W);
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
    if constexpr (Cell::normed)
      for (Index row = packed.begin; row < packed.end; ++row) {
        const T scale = norm_scale(V::load(x_sums + (row - chunk) * W), G * d.H);
        x_scale[row - chunk] = scale;
        if (keeps_gates()) *scale_at(0, row - saved.first) = scale;
      }
  }
  // A row of a normed cell's products on one panel, and their squares
  template <class Lanes> GATEWISE_FN void store_products(const T* product, Lanes units, T* out, T* squares) const {
    V sum(0);
    GATEWISE_UNROLL
    for (int g = 0; g < G; ++g) {
      const V number = V::load(product + g * units, units);
      number.store(out + g * W);
      sum = fma(number, number, sum);
    }
    add_to(squares, sum);
  }

  // h before step s times its mask, of sorted positions [begin, end)
  void mask(Index s, Range positions) {
    for (Index i = positions.begin; i < positions.end; ++i) {
      const T *h = this->previous_h(call.y, s, i), *mask = this->mask_of(i);
      for (Index k = 0; k < d.R; ++k) masked[i * d.R + k] = h ? h[k] * mask[k] : T(0);
    }
  }

  // One step of sorted positions [begin, end), for the given groups of panels
  void step(Index s, Index chunk, Range positions, Range groups) {
    if (!call.saved && call.states && problem.save == Save::checkpoints) keep_checkpoint(s, positions, groups);
    if (Cell::normed && positions.size() > 0) zero(row_sums + positions.begin * W, positions.size() * W);
    constexpr int per_group = Panels<product_gates>::per_group;
    if (per_group != Facts::group) groups = {0, ceil_div(P, per_group)};  // the gates of a staged cell: never shared
    for (Index turn = groups.begin; turn < groups.end; ++turn) {
      const Index q = there_and_back<Cell>(s, turn, groups);
      const Index panels = Panels<product_gates>::in_group(q, P);
      const Index registers = Panels<product_gates>::registers(q, d.H, W);
      const Segments row_of_h = one_segment(d.R);
      const T* w_hh = weights.hh(place_of(q));
      const bool asks = turn + 1 < groups.end && place < 0 && weights.bytes() > kCacheBytes;
      const T* next = asks ? weights.hh(there_and_back<Cell>(s, turn + 1, groups)) : nullptr;
      for_each_tile(positions.size(), most_rows(registers), [&](Index first, Index height) {
        const Index i = positions.begin + first;
        const T *h[kMaxRows] = {}, *others[kMaxRows], *const *operand = h;
        bool any = Cell::has_product;
        if (__builtin_expect(this->plain, 1)) {
          for (Index r = 0; r < height; ++r) h[r] = this->previous_h(call.y, s, i + r, false);
          any = any && h[0];
        } else {
          for (Index r = 0; r < height; ++r) {
            h[r] = this->previous_h(call.y, s, i + r);
            others[r] = !h[r] ? this->zeros : masked ? masked + (i + r) * d.R : h[r];
          }
          operand = others;
        }
        Tile<T> tile;
        this->meter.start();
        if (keeps_gates())
          for (Index b = 0, row = saved_row(s, i); b < panels; ++b)
            prefetch(saved_at(q * per_group + b, row), height * S * W);
        if (!any) zero(tile.numbers, height * registers * W);
        else if (__builtin_expect(unpacked, 0))
          multiply_by_unpacked<product_gates>(operand, height, d.R, problem.weights.w_hh, q, tile);
        else
          kMultiplyRows<T>[registers - 1][height - 1](operand, row_of_h, w_hh, tile,
                                                      this->ahead(w_hh, next, first, height, registers, d.R));
        this->meter.stop(&Ticks::products);
        for (Index b = 0; b < panels; ++b) {
          const Index p = q * per_group + b;
          const T* products = tile.numbers + b * product_gates * W;
          if constexpr (Cell::normed) {
            this->with_units(p, [&](auto units) {
              for (Index r = 0; r < height; ++r)
                store_products(products + r * registers * W, units, gh_at(p, s, i) + r * pitch(),
                               row_sums + (i + r) * W);
            });
          } else {
            finish(s, chunk, i, height, p, h, products, registers * W);
          }
        }
        this->meter.stop(&Ticks::epilogues);
      });
    }
    if constexpr (Cell::normed) normed_step(s, chunk, positions);
    if constexpr (Cell::middle == Middle::product || Facts::may_project)
      if (weights.stage_units) product_stage(s, chunk, positions);
  }

  // The rest of the step of a normed cell, whose products are all there
  void normed_step(Index s, Index chunk, Range positions) {
    for_each_tile(positions.size(), kMaxRows, [&](Index first, Index height) {
      const Index i = positions.begin + first;
      const T* h[kMaxRows] = {};
      T scale[kMaxRows];
      for (Index r = 0; r < height; ++r) {
        h[r] = this->previous_h(call.y, s, i + r);
        scale[r] = norm_scale(V::load(row_sums + (i + r) * W), G * d.H);
        if (keeps_gates()) *scale_at(1, saved_row(s, i + r)) = scale[r];
      }
      if (Cell::middle == Middle::norm) zero(row_sums + i * W, height * W);  // now of c
      for (Index p = 0; p < P; ++p) finish(s, chunk, i, height, p, h, gh_at(p, s, i), pitch(), scale);
      if constexpr (Cell::middle == Middle::norm) {
        T* c = middle + i * d.H;
        for (Index r = 0; r < height; ++r) {
          scale[r] = less_mean(c + r * d.H, lane_sum(V::load(row_sums + (i + r) * W)) / T(d.H));
          if (keeps_gates()) *scale_at(2, saved_row(s, i + r)) = scale[r];
        }
        for (Index p = 0; p < P; ++p) finish_output(s, chunk, i, height, p, c + p * W, d.H, scale);
      }
    });
  }

  // H numbers less their mean, and the scale of what remains
  T less_mean(T* numbers, T mean) const {
    V squares(0);
    for (Index p = 0; p < P; ++p)
      this->with_units(p, [&](auto units) {
        const V rest = first_of(V::load(numbers + p * W, units) - V(mean), units);
        rest.store(numbers + p * W, units);
        squares = fma(rest, rest, squares);
      });
    return norm_scale(squares, d.H);
  }

  // The product in the middle of a step, or the projection at its end
  void product_stage(Index s, Index chunk, Range positions) {
    constexpr int per_group = Panels<1>::per_group;
    const Index panels = ceil_div(weights.stage_units, W);
    for (Index q = 0; q < ceil_div(panels, per_group); ++q) {
      const Index registers = Panels<1>::registers(q, weights.stage_units, W);
      const Segments row = one_segment(d.H);
      for_each_tile(positions.size(), rows_per_tile(registers), [&](Index first, Index height) {
        const Index i = positions.begin + first;
        const T* operand[kMaxRows] = {};
        for (Index r = 0; r < height; ++r) operand[r] = middle_at(s, i + r);
        Tile<T> tile;
        this->meter.start();
        const T* w = weights.stage(q);
        kMultiplyRows<T>[registers - 1][height - 1](operand, row, w, tile, w);
        this->meter.stop(&Ticks::products);
        for (Index b = 0; b < registers; ++b)
          finish_output(s, chunk, i, height, q * per_group + b, tile.numbers + b * W, registers * W);
        this->meter.stop(&Ticks::epilogues);
      });
    }
  }

  // A chunk of one step goes through all the weights just once. It takes both matrices side by side, so that where they
  // fill more than the cache, a call that walks them the other way begins with what the last one left there: LSTM,
  // I = H = 512, N = 1: 75 -> 47 µs a call.
  void only_step(Index s, Range positions, Range groups) {
    const Index chunk = rows.offset[s];
    for (Index turn = groups.begin; turn < groups.end; ++turn) {
      const Index q = there_and_back<Cell>(call.from_the_last, turn, groups);
      if (place >= 0) weights.pack_ih(problem.weights, q, place);
      project(chunk, {chunk + positions.begin, chunk + positions.end}, {q, q + 1});
      if (place >= 0) weights.pack_hh(problem.weights, q, place);
      step(s, chunk, positions, {q, q + 1});
    }
  }

  // The epilogue: the cell on a tile's rows of one panel. products [height] rows, `stride` apart; h the states before;
  // of a normed cell, scale [height] of the products
  GATEWISE_FN void finish(Index s, Index chunk, Index i, Index height, Index p, const T* const* h, const T* products,
                          Index stride, const T* scale = nullptr) {
    const Index row = rows.offset[s] + i, unit = p * W, gx_stride = pitch();
    const T* gx_row = gx_at(p, row, chunk);
    const T* c_prev = states.numbers + (p * states.stride + state_row(s - 1) + i) * W;
    T* c_next = states.numbers + (p * states.stride + state_row(s) + i) * W;
    T* kept = saved_at(p, saved_row(s, i));
    const Index* place = rows.place + row;
    // Here and below: what is not read from the pass again after every store, which the compiler must think may change
    // it
    T *const y = call.y + unit, *const numbers = saved.numbers;
    const Index H = d.H;
    const V b_hh = Cell::split ? V::load(weights.bias + (p * (G + 1) + G) * W) : V(0);
    this->epilogue(d.H - unit, [&](auto units, auto options) {
      const bool zones = options && this->zones(), to_stage = Facts::staged || (options && projects);
      const Unit<V, U> own = weights.of(p, problem.cell_clip, options);
      for (Index r = 0; r < height; ++r) {
        V x[G], gh[G] = {}, to_save[S];
        GATEWISE_UNROLL
        for (int g = 0; g < G; ++g) x[g] = V::load(gx_row + r * gx_stride + g * W);
        GATEWISE_UNROLL
        for (int g = 0; g < product_gates; ++g)
          gh[g] =
              Cell::normed ? V::load(products + r * stride + g * W) : V::load(products + r * stride + g * units, units);
        if constexpr (Cell::normed) {
          const V of_x(x_scale[row + r - chunk]), of_h(scale[r]);
          GATEWISE_UNROLL
          for (int g = 0; g < G; ++g) x[g] = x[g] * of_x, gh[g] = gh[g] * of_h;
        }
        if (Cell::split) gh[G - 1] = gh[G - 1] + b_hh;
        State<V> prev{h[r] && !(options && projects) ? V::load(h[r] + unit, units) : V(0), V(0)};
        if (options && Cell::middle == Middle::product && problem.h_mask)
          prev.h = prev.h * V::load(this->mask_of(i + r) + unit, units);
        if (Cell::has_c)
          prev.c =
              V::load(options && this->restarts(s, i + r) ? this->start_c + (p * d.N + i + r) * W : c_prev + r * W);
        State<V> next = Cell::forward(x, gh, own, prev, to_save);
        if (to_stage) next.h.store(middle_at(s, i + r) + unit, units);
        if (Cell::middle == Middle::norm) add_to(row_sums + (i + r) * W, first_of(next.h, units));
        if (zones) {
          const State<V> keep = this->zoneout(s, i + r, p);
          if (!to_stage) next.h = fma(keep.h, prev.h, (V(1) - keep.h) * next.h);
          if (Cell::has_c) next.c = fma(keep.c, prev.c, (V(1) - keep.c) * next.c);
        }
        if (!to_stage && !(options && again)) next.h.store(y + place[r] * H, units);
        if (Cell::has_c && (!options || writes_states)) next.c.store(c_next + r * W);
        if (!numbers) continue;
        GATEWISE_UNROLL
        for (int k = 0; k < S; ++k)
          if (k != Cell::output_saved && !is_product(k)) to_save[k].store(kept + (r * S + k) * W);
      }
    });
  }
  // Whether this saved number of a normed cell stands there before the cell is called
  static constexpr bool is_product(int k) { return Cell::normed && G <= k && k < 3 * G; }

  // The epilogue of the stage: h from what came back, [height] rows, `stride` apart, to be multiplied with scale, or
  // null
  GATEWISE_FN void finish_output(Index s, Index chunk, Index i, Index height, Index p, const T* values, Index stride,
                                 const T* scale = nullptr) {
    const Index row = rows.offset[s] + i, unit = p * W;
    this->epilogue(d.R - unit, [&](auto lanes, auto options) {
      const Unit<V, U> own = weights.of(p, problem.cell_clip, options);
      for (Index r = 0; r < height; ++r) {
        V h = V::load(values + r * stride, lanes);
        const T* before = this->previous_h(call.y, s, i + r, options);
        const State<V> prev{before ? V::load(before + unit, lanes) : V(0), V(0)};
        if constexpr (Facts::staged) {
          T* kept = saved_at(p, saved_row(s, i + r));
          const T* gx_row = gx_at(p, row + r, chunk);
          V x[G], to_save[S];
          for (int g = 0; g < G; ++g) x[g] = V::load(gx_row + g * W);
          for (int k = 0; k < S; ++k) to_save[k] = V::load(kept + k * W);
          if constexpr (Cell::middle == Middle::norm) h = h * V(scale[r]);
          h = Cell::output(x, h, own, prev, to_save);
          to_save[Cell::output_saved].store(kept + Cell::output_saved * W);
        }
        if (options && again) continue;
        if (options && this->zones()) {
          const V keep = this->zoneout(s, i + r, p).h;
          h = fma(keep, prev.h, (V(1) - keep) * h);
        }
        h.store(call.y + rows.place[row + r] * d.R + unit, lanes);
      }
    });
  }

  void keep_checkpoint(Index s, Range positions, Range groups) {
    if (!Cell::has_c || s % problem.checkpoint || positions.size() <= 0) return;
    for (Index p = groups.begin * Facts::group; p < least(groups.end * Facts::group, P); ++p)
      copy(states.numbers + (p * states.stride + positions.begin) * W,
           call.states + ((p * this->checkpoints() + s / problem.checkpoint) * d.N + positions.begin) * W,
           positions.size() * W);
  }

  void final_states(Range positions) {
    for (Index i = positions.begin; i < positions.end; ++i) {
      const Index n = rows.order[i], length = length_of(problem, n);
      if (length > 0) copy(call.y + rows.place[rows.offset[length - 1] + i] * d.R, call.hn + n * d.R, d.R);
      else if (problem.sequence.h0) copy(problem.sequence.h0 + n * d.R, call.hn + n * d.R, d.R);
      else zero(call.hn + n * d.R, d.R);
      if (Cell::has_c) this->scatter(states.numbers, states.stride, state_row(length - 1) + i, call.cn, n);
    }
  }

  // A chunk of steps [begin, end) in the making: gx of all, then step by step
  void run_chunk(Team& team, int id, Index begin, Index end, Range own, Range own_groups) {
    const bool by_panels = how.sharing == Sharing::panels;
    const Index chunk = rows.offset[begin];
    const Range part = share(rows.offset[end] - chunk, id, team.size);
    project(chunk, {chunk + part.begin, chunk + part.end}, {0, this->groups});
    team.barrier();
    for (Index s = begin; s < end; ++s) {
      if (masked) {
        mask(s, by_panels ? share(rows.live(s), id, team.size) : Range{own.begin, least(own.end, rows.live(s))});
        if (by_panels) team.barrier();
      }
      step(s, chunk, {own.begin, least(own.end, rows.live(s))}, own_groups);
      if (by_panels) team.barrier();
    }
  }

  void run(Team& team, int id) {
    const FlushSubnormals flush;
    const Range sequences = share(d.N, id, team.size);
    const bool by_panels = how.sharing == Sharing::panels;
    const Range own = by_panels ? Range{0, d.N} : own_positions(problem, rows, id, team.size);
    const Range own_groups = by_panels ? share(this->groups, id, team.size) : Range{0, this->groups};

    const bool stages = Facts::staged || Cell::normed || projects || masked;
    // What is read once need not be packed: a few rows take it as it is, and for more each group is packed when its
    // turn comes, from where the product takes it while it is in cache.
    const bool once = !call.packed && !again && d.T == 1 && !stages && how.sharing != Sharing::rows;
    unpacked = once && d.N <= kUnpackedRows<T>;
    if (once && !unpacked) place = own_groups.begin;
    if (!call.packed) weights.fill(problem.weights, id, team.size, !once);
    zero_padding(problem, call.y, d.R, sequences);
    if (Cell::has_c) this->gather(problem.sequence.c0, d.H, states.numbers, states.stride, sequences);
    team.barrier();
    for (Index s = 0, end; s < d.T && rows.live(s) > 0; s = end) {
      const Index chunk = rows.offset[s];
      for (end = s + 1; end < d.T && rows.live(end) > 0 && rows.offset[end] - chunk < this->chunk_target;) ++end;
      if (once || (end == s + 1 && !stages && weights.bytes() > kCacheBytes))
        only_step(s, {own.begin, least(own.end, rows.live(s))}, own_groups);
      else run_chunk(team, id, s, end, own, own_groups);
      team.barrier();
    }
    final_states(sequences);
  }

 private:
  ForwardPass(const Base& base, const Forward<T>& call, Arena& arena, Arena& packed)
      : Base(base), call(call), again(false), weights(problem, packed),
        gx(arena.take<T>(P * this->chunk_capacity * G * W)),
        masked(problem.h_mask ? arena.take<T>(d.N * d.R) : nullptr),
        hidden(arena.take<T>(Cell::normed ? P * d.N * G * W : 0)), row_sums(arena.take<T>(Cell::normed ? d.N * W : 0)),
        x_sums(arena.take<T>(Cell::normed ? this->chunk_capacity * W : 0)),
        x_scale(arena.take<T>(Cell::normed ? this->chunk_capacity : 0)),
        middle(arena.take<T>(Facts::staged || projects ? d.N * d.H : 0)) {}
};

}}}  // namespace gatewise::GATEWISE_ARCH
