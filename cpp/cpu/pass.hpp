// What the two directions of the layer have in common: the problem, the order of its rows, how a team shares them, and
// where a state is to be found. The layer is any cell through time, written once for all cells, dtypes and arches.
#pragma once
#include "gatewise/cells.hpp"
#include "gatewise/random.hpp"
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
  static constexpr int G = Cell::G, S = Cell::S, U = Cell::U;
  static constexpr bool staged = Cell::middle != Middle::none;  // the cell is called twice a step
  // The unit's weights whose gradients `backward` makes; those of the rest `d_output`
  static constexpr int cell_units = staged ? Cell::output_unit : U;
  static constexpr bool may_project = Cell::has_c && !staged;
  // Gates whose hidden part is a product with h; that of the last may have to wait for the stage
  static constexpr int product_gates = Cell::middle == Middle::product ? G - 1 : G;
  // Blocks of gate gradients in a row: of gx, of gh where they differ. A split cell stores its last gate twice, [dgx of
  // the last | the gates before | dgh of the last], so that the G blocks from x_block and the G from h_block are each
  // contiguous.
  static constexpr int x_block = 0, h_block = Cell::normed ? G : Cell::split ? 1 : 0, D = h_block + G;
  static constexpr int group = Panels<G>::per_group;

  static int x_gate(int slot) { return Cell::split ? (slot + G - 1) % G : slot; }
  static int h_gate(int slot) { return slot; }
  static int x_slot(int gate) { return Cell::split ? (gate + 1) % G : gate; }
  static int h_slot(int gate) { return Cell::split || Cell::normed ? h_block + gate : gate; }
};

// Rows of a chunk: enough to pay for reading the packed weights again, few enough to stay in cache. Backward has the
// same number whatever a row takes, for the weights' gradients are summed over them: more were no faster, only larger.
struct ChunkSize { Index bytes, least_rows, most_rows; };
constexpr ChunkSize kForwardChunk{1 << 18, 96, 1024}, kBackwardChunk{0, 256, 256};

constexpr Index kCacheBytes = 1 << 20;  // a core's own: 1 to 2 MB on servers

// How a team shares the steps of a sequence.
enum class Sharing { alone, rows, panels };
struct Plan {
  Sharing sharing;
  int threads;
};

// Waking a thread that sleeps takes up to 50 microseconds, and a barrier in every step takes one. By panels there is
// one a step: where a step has several stages, each would need its own.
template <class Cell> Plan plan(const Dims& d, Index rows, int threads, bool stages) {
  const double step_flops = 2.0 * double(d.N) * Cell::G * double(d.H) * double(d.R);
  const double flops = 2.0 * double(rows) * Cell::G * double(d.H) * double(d.I + d.R);
  if (threads < 2 || flops < 8e6) return {Sharing::alone, 1};
  if (d.N >= 8 * threads && d.H < 256) return {Sharing::rows, threads};
  if (!stages && step_flops >= (d.N < 2 * threads ? 5e4 : 1e6)) return {Sharing::panels, threads};
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
// cache. A single row of an LSTM with H = 256 gains a sixth. Not for a normed cell: what is summed over a row on the
// way would depend on whether the step's number is even.
template <class Cell> Index there_and_back(Index step, Index turn, Range range) {
  return step % 2 && !Cell::normed ? range.begin + range.end - 1 - turn : turn;
}

// Where cell states are kept, [P][stride][W]: the ones before `first_step` by sorted position, then those after each
// step by packed row; or only the current ones, by sorted position.
template <class T> struct CellStates {
  T* numbers = nullptr;
  Index stride = 0, first_step = 0;
  bool current = false;
};

template <class Cell, class T> struct Pass {
  using Facts = CellFacts<Cell, T>;
  using V = Vec<T>;
  static constexpr Index W = Facts::W;
  static constexpr int G = Facts::G, S = Facts::S, D = Facts::D, U = Facts::U;

  Problem<T> problem;
  Dims d;
  Index P;       // panels
  Index groups;  // of panels
  bool projects;
  bool plain;  // without resets, zoneout, masks, bounds of c, projection
  Rows rows;
  Plan how;
  Index chunk_target, chunk_capacity;  // rows: a chunk ends at the first step that reaches the target
  T* zeros;                            // [R]
  T* start_c;                          // [P][N][W] by sorted position, what a reset puts in place of c; null without
  Meter meter{nullptr};

  Pass(const Problem<T>& p, Arena& arena, int threads, ChunkSize chunk)
      : problem(p), d(p.dims), P(ceil_div(d.H, W)), groups(ceil_div(P, Facts::group)),
        projects(Facts::may_project && p.weights.w_hr),
        plain(!projects && !p.sequence.reset && !p.h_mask && !zones() && p.cell_clip == T(__builtin_inf())),
        rows(arena, d.T, d.N, count_rows(p)),
        how(plan<Cell>(d, rows.count, threads, projects || Facts::staged || Cell::normed)),
        chunk_target(between(chunk.least_rows, chunk.bytes / (P * W * D * Index(sizeof(T))), chunk.most_rows)),
        zeros(arena.take<T>(d.R)), start_c(Cell::has_c && p.sequence.reset ? arena.take<T>(P * d.N * W) : nullptr) {
    if (p.save == Save::checkpoints && chunk_target < p.checkpoint * d.N) chunk_target = p.checkpoint * d.N;
    chunk_capacity = least(rows.count, chunk_target + d.N);
  }

  // What all threads will read, written by the one that called
  void fill() {
    rows.fill(problem);
    zero(zeros, d.R);
    if (start_c)
      gather(problem.sequence.reset_to == ResetTo::initial ? problem.sequence.c0 : nullptr, d.H, start_c, d.N,
             {0, d.N});
  }

  // What a tile asks for while it multiplies rows of K numbers with a group of packed weights: its part of the group
  // that is next in turn, where the weights do not fit the cache (LSTM, H = 512, N = 32: a step is a tenth faster);
  // else what it reads anyway.
  GATEWISE_FN const T* ahead(const T* packed, const T* next, Index first, Index height, Index registers,
                             Index K) const {
    if (__builtin_expect(!next, 1)) return packed;
    const Index tile = first / height;
    return tile < registers ? next + tile * K * W : packed;
  }

  Index group_panels(Index group) const { return Panels<G>::in_group(group, P); }
  Index group_registers(Index group) const { return Panels<G>::registers(group, d.H, W); }
  Index units(Index panel) const { return least(W, d.H - panel * W); }
  template <class F> GATEWISE_FN void with_units(Index panel, F f) const { with_lanes<T>(d.H - panel * W, f); }
  // An epilogue, f(lanes, whether it has to look at options), compiled twice: for full registers in a plain pass,
  // where both are constants, and for everything else.
  template <class F> GATEWISE_FN void epilogue(Index lanes, F f) const {
    if (__builtin_expect(plain && lanes >= W, 1)) f(std::integral_constant<Index, W>(), std::false_type());
    else f(least(lanes, W), std::true_type());
  }

  // Whether the state of sorted position i starts anew before step s. Walked backwards, a segment ends after its first
  // step.
  GATEWISE_FN bool restarts(Index s, Index i) const {
    const unsigned char* reset = problem.sequence.reset;
    if (!reset) return false;
    if (problem.sequence.reverse) return s > 0 && reset[rows.place[rows.offset[s - 1] + i]];
    return reset[rows.place[rows.offset[s] + i]];
  }
  // The hidden state before step s of sorted position i, or null for zeros.
  GATEWISE_FN const T* previous_h(const T* y, Index s, Index i, bool options = true) const {
    const bool restarted = options && restarts(s, i);
    if (s > 0 && !restarted) return y + rows.place[rows.offset[s - 1] + i] * d.R;
    if (!problem.sequence.h0 || (restarted && problem.sequence.reset_to == ResetTo::zero)) return nullptr;
    return problem.sequence.h0 + rows.order[i] * d.R;
  }
  GATEWISE_FN const T* mask_of(Index i) const {
    return problem.h_mask ? problem.h_mask + rows.order[i] * d.R : nullptr;
  }

  // Row of `states` that holds c after step s of position 0
  GATEWISE_FN Index state_row(const CellStates<T>& states, Index s) const {
    return states.current || s < states.first_step ? 0 : d.N + rows.offset[s] - rows.offset[states.first_step];
  }
  Index state_rows() const { return d.N + rows.count; }
  Index checkpoints() const { return ceil_div(d.T, problem.checkpoint); }

  // Zoneout, as the weight of the previous state in each lane of panel p: 1 or 0, or its probability
  GATEWISE_FN bool zones() const { return problem.zoneout.h > 0 || problem.zoneout.c > 0; }
  GATEWISE_FN State<V> zoneout(Index s, Index i, Index p) const {
    const Zoneout& z = problem.zoneout;
    if (!z.drawn) return {V(T(z.h)), V(T(z.c))};
    const Index n = rows.order[i];
    const typename V::Unsigned unit = V::lane_numbers() + std::uint32_t(p * W);
    const auto of_h = random_bits(random_key(z.seed, time_of(problem, s, n), n), unit);
    const auto drawn = [](const typename V::Unsigned& bits, double probability) {
      return select((typename V::Integer)(bits >> 1) < random_limit(probability), V(1), V(0));
    };
    return {drawn(of_h, z.h), Cell::has_c ? drawn(more_bits(of_h), z.c) : V(0)};
  }

  // [N, width] in the caller's order <-> [panel][stride][W] by sorted position. A null source reads as zeros.
  void gather(const T* from, Index width, T* panels, Index stride, Range positions) const {
    for (Index p = 0; p < ceil_div(width, W); ++p)
      for (Index i = positions.begin; i < positions.end; ++i)
        (from ? V::load(from + rows.order[i] * width + p * W, width - p * W) : V(0))
            .store(panels + (p * stride + i) * W);
  }
  void scatter(const T* panels, Index stride, Index row, T* to, Index n) const {
    for (Index p = 0; p < P; ++p) V::load(panels + (p * stride + row) * W).store(to + n * d.H + p * W, d.H - p * W);
  }
};

// Zeros the rows of a [T, N, width] array that lie past the end of their sequence.
template <class T> void zero_padding(const Problem<T>& p, T* array, Index width, Range sequences) {
  if (!p.sequence.lengths || p.sequence.layout == Layout::packed) return;
  const bool time_major = p.sequence.layout == Layout::time_major;
  const Index per_step = time_major ? p.dims.N : 1, per_sequence = time_major ? 1 : p.dims.T;
  for (Index t = 0; t < p.dims.T; ++t)
    for (Index n = sequences.begin; n < sequences.end; ++n)
      if (t >= p.sequence.lengths[n]) zero(array + (t * per_step + n * per_sequence) * width, width);
}

// ---- layer normalisation's part without weights: numbers less their mean, over their standard deviation. Sums of a
// row are gathered lane by lane, panel after panel, while its numbers are in registers.

// From the sum of n squares of differences from the mean to the factor; 1e-5 as in torch.nn.LayerNorm
template <class T> GATEWISE_FN T norm_scale(Vec<T> squares, Index n) {
  return T(1) / std::sqrt(lane_sum(squares) / T(n) + T(1e-5));
}
template <class T> GATEWISE_FN void add_to(T* sum, Vec<T> v) { (Vec<T>::load(sum) + v).store(sum); }
// v with zeros past its first lanes
template <class T, class Lanes> GATEWISE_FN Vec<T> first_of(Vec<T> v, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, Index>) {
    T numbers[Vec<T>::width];
    v.store(numbers);
    return Vec<T>::load(numbers, lanes);
  } else {
    return v;
  }
}

}}}  // namespace gatewise::GATEWISE_ARCH
