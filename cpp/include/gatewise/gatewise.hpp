// The public face of the kernel library: plain pointers in, plain pointers out. It never allocates results
// and never keeps a pointer: the caller owns every buffer, and `sizes()` says how large the opaque ones are.
//
// Shapes, in elements, C-contiguous: T steps, N sequences, I inputs, H hidden units, G gates, U weights of a unit's
// own, R numbers in h: H, or fewer where a projection follows the cell. Shapes with a step, [T, N, ...] below, are in
// the layout of the call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gatewise {

using Index = std::int64_t;
constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

struct Dims { Index T, N, I, H, R; };

template <class T> struct Weights {
  const T* w_ih;    // [G*H, I]
  const T* w_hh;    // [G*H, R]; null for a cell without a product
  const T* b_ih;    // [G*H] or null: zeros
  const T* b_hh;    // [G*H] or null: zeros
  const T* w_unit;  // [U*H]; null if U = 0
  const T* w_hr;    // [R, H], the projection, or null: none
};

// How the (step, sequence) pairs of y, dy, dx and reset lie in memory. Packed: only those that exist, step by step,
// longest sequence first, as in torch's PackedSequence.
enum class Layout { time_major, batch_major, packed };

// Which state a reset restarts from.
enum class ResetTo { initial, zero };

template <class T> struct Sequence {
  const T* x;            // rows of I; in packed layout one every step_stride
  const T* h0;           // [N, R] or null: zeros
  const T* c0;           // [N, H] or null: zeros; cells with c only
  const Index* lengths;  // [N] in 0..T, any order, or null: T for all. In packed layout longest first
  bool reverse;          // walk each sequence from its own last step to step 0
  Layout layout = Layout::time_major;
  Index step_stride = 0, sequence_stride = 0;  // of x, in elements
  const unsigned char* reset = nullptr;  // [T, N] true where a new segment begins that knows nothing of the one before
  ResetTo reset_to = ResetTo::initial;
};

// Zoneout: a unit keeps its state in a step with probability h (of c: c). A drawn mask is a function of seed, step,
// sequence and unit (random.hpp); without `drawn` the state is the expectation.
struct Zoneout {
  double h = 0, c = 0;
  bool drawn = false;
  std::uint64_t seed = 0;
};

// What the tape keeps for backward: gates and c of every step; c of every step; c before every `checkpoint`-th step.
enum class Save { all, states, checkpoints };

template <class T> struct Problem {
  Dims dims;
  Weights<T> weights;
  Sequence<T> sequence;
  const T* h_mask = nullptr;  // [N, R] h is multiplied by it before it meets w_hh, or null
  Zoneout zoneout = {};
  T cell_clip = T(__builtin_inf());
  Save save = Save::all;
  Index checkpoint = 0;  // steps
};

// Elements of the tape's opaque buffers, and bytes of the others. Their layout belongs to the arch that wrote them.
struct Sizes { std::size_t saved, states, packed, forward_scratch, backward_scratch; };

// Where the time of a call's first thread went, in ticks of the CPU's clock: into products, into what is done to
// their tiles (mostly the cells), into all. A call adds to them.
struct Ticks { std::uint64_t products, epilogues, all; };

template <class T> struct Forward {
  Problem<T> problem;
  T* y;           // [T, N, R], zero past a sequence's end
  T* hn;          // [N, R]
  T* cn;          // [N, H]; cells with c only
  T* saved;       // the tape, or null: no gates are kept
  T* states;      // the tape's cell states, or null: nothing is kept for backward
  void* scratch;  // Sizes::forward_scratch bytes
  int threads;
  const void* packed = nullptr;  // what pack() made of the weights on this arch, which then are not read, or null
  Ticks* ticks = nullptr;        // or null: not measured
  bool from_the_last = false;    // of the weights: a stream of single steps is faster if every other call says so
};

template <class T> struct Backward {
  Problem<T> problem;
  const T *y, *saved, *states;       // what forward wrote
  const T *dy, *dhn, *dcn;           // incoming, each may be null: zeros
  T *dx, *dh0, *dc0;                 // outgoing, each may be null: not wanted; overwritten
  T *dw_ih, *dw_hh, *db_ih, *db_hh;  // outgoing, each may be null: not wanted; added to
  T *dw_unit, *dw_hr;                // likewise
  void* scratch;                     // Sizes::backward_scratch bytes
  int threads;
  Ticks* ticks = nullptr;  // or null: not measured
};

struct CellInfo {
  const char* name;
  int G, S, U;
  bool has_c, split, has_product, normed;
  const char* middle;  // none, product, norm: see cells.hpp
};

template <class T> struct CellKernels {
  Sizes (*sizes)(const Problem<T>&);
  void (*pack)(const Problem<T>&, void* packed);  // the weights for forward, into Sizes::packed bytes
  void (*forward)(const Forward<T>&);
  void (*backward)(const Backward<T>&);
};

// y[k] = f(x[k]): the kernels' own elementary functions, exposed so that their error can be measured.
template <class T> using Map = void (*)(const T* x, T* y, std::size_t n);
// fma_chains does `rounds` times flops_per_round of nothing but independent multiply-adds on registers: the rate no
// kernel of this arch can pass, to be measured beside whatever is timed.
template <class T> struct Functions {
  Map<T> exp, tanh, sigmoid;
  // y[k] = 0 with probability p, else x[k] / (1 - p); key: random_key() of the row
  void (*dropout)(const T* x, T* y, Index n, std::uint64_t key, double p);
  T (*fma_chains)(std::size_t rounds);
  int flops_per_round;
};

struct Kernels {
  CellInfo info;
  CellKernels<float> f32;
  CellKernels<double> f64;
};  // one row a cell

struct ArchKernels {
  const Kernels* cells;
  int cell_count;
  Functions<float> f32;
  Functions<double> f64;
  int lanes_f32, lanes_f64;  // units in a register: the width of the tape's panels
};

struct Arch {
  const char* name;
  bool (*runs_here)();
  const ArchKernels* kernels;
};

struct ArchList {
  const Arch* begin;
  const Arch* end;
};
ArchList archs();           // best first; the last one runs everywhere
const Arch& choose_arch();  // GATEWISE_ARCH if set, else the best that runs here; throws std::invalid_argument

// From now on calls with several threads run on OpenMP's, if the process has an OpenMP that all of it can see, as
// PyTorch's is. Two pools are in each other's way: OpenMP's threads wait for their next task at full speed, for up to
// 15 ms, and what another pool does meanwhile takes twice as long. A forked child goes back to a pool of its own.
// False: there is none.
bool share_openmp();

// The order in which kernels walk the valid (t, n) pairs: sequences longest first, step by step. Writes the
// time-major row t*N + n of each to rows[] (as many as the lengths add up to).
template <class T> void row_order(const Problem<T>&, Index* rows);

}  // namespace gatewise
