// A program that runs the CUDA library's kernels, and with GATEWISE_TRIAL_LAYERS its layers, on a few numbers of its
// own: small enough for the race detector, and without Python, of which the sanitizers know nothing.
//   trial [multiply | add_parts | column_sums | standardise | d_standardise | gather]...
//   trial [persistent_forward | persistent_backward | persistent_tf32]...
//   trial [lstm | gru | gru_persistent | lstm_norm | gru_reset_before]...
// It prints a line for each: its name and the numbers it computed. test_cuda_races.py runs it.
#include <cstdio>
#include <cstring>
#include <deque>

#ifndef GATEWISE_WEIGHT_REGISTERS
#define GATEWISE_WEIGHT_REGISTERS 16
#endif
#include "cuda/persistent.hpp"
#include "device_memory.hpp"
#ifdef GATEWISE_TRIAL_LAYERS
#include "cuda/layer.hpp"
#endif

namespace gatewise::cuda {

// Arrays of numbers of order 1, and results, which are printed
class Arrays {
 public:
  void print(const char* name) {
    device_.fetch();
    std::printf("%s", name);
    for (const std::vector<float>& result : results_)
      for (const float value : result) std::printf(" %.9g", double(value));
    std::puts("");
  }
  const float* some(Index n) {
    std::vector<float> numbers(n);
    for (float& number : numbers) number = float(++drawn_ * 37 % 101) / 101 - 0.5f;
    return device_.send<float>(numbers.data(), n);
  }
  template <class T> const T* these(const std::vector<T>& numbers) {
    return device_.send<T>(numbers.data(), Index(numbers.size()));
  }
  float* result(Index n, bool added_to = false) {
    results_.emplace_back(n);
    return device_.result<float>(results_.back().data(), n, added_to);
  }
  template <class T> T* take(std::size_t n) { return static_cast<T*>(device_.take(n * sizeof(T))); }

 private:
  Device device_;
  std::deque<std::vector<float>> results_;
  Index drawn_ = 0;
};

// C += A^T B by the large tile, over its edges
inline void run_multiply(Arrays& arrays) {
  constexpr int M = 130, N = 3, K = 37;
  Product<float> p{M, N, K, {arrays.some(K * M), M}, {arrays.some(K * N), N}, {arrays.result(M * N, true), N}};
  p.add = true, p.part_k = K;
  multiply_by<LargeTile<float>, true, true>(p, nullptr);
}

inline void run_add_parts(Arrays& arrays) {
  constexpr Index M = 2, N = 130, parts = 2;
  const float* const numbers = arrays.some(parts * M * N);
  launch(add_parts<float>, pointwise(M, N), nullptr, numbers, parts, M, N,
         RowsAt<float>{arrays.result(M * N, true), N});
}

inline void run_column_sums(Arrays& arrays) {
  constexpr Index rows = 20, columns = 35;
  const float* const numbers = arrays.some(rows * columns);
  float* const sums = arrays.take<float>(columns);
  launch(column_sums<float>, {dim3(2), dim3(kSumColumns, kSumRows), kSumColumns * kSumRows * sizeof(float), false},
         nullptr, numbers, rows, columns, sums);
  launch(add_sums<float>, pointwise(1, columns), nullptr, static_cast<const float*>(sums), Index(1), columns, Index(0),
         columns, Index(4), arrays.result(columns, true));
}

inline void run_standardise(Arrays& arrays, bool back) {
  constexpr Index rows = 2, n = 150;
  const LaunchShape shape{dim3(rows), dim3(threads_of_row(n)), threads_of_row(n) * sizeof(float), false};
  float* const to = arrays.result(rows * n, back);
  if (back)
    launch(d_standardise<float>, shape, nullptr, RowsAt<const float>{arrays.some(rows * n), n}, arrays.some(rows),
           RowsAt<float>{to, n}, n);
  else
    launch(standardise<float>, shape, nullptr, Parts<float>{arrays.some(rows * n), n}, RowsAt<float>{to, n}, n,
           arrays.result(rows));
}

inline void run_gather(Arrays& arrays) {
  constexpr Index N = 3, width = 130;
  Walk<float> walk{};
  walk.N = N, walk.order = arrays.these<Index>({2, 0, 1});
  launch(gather<float>, pointwise(N, width), nullptr, walk, arrays.some(N * width), width, arrays.result(N * width));
}

// A device for which each of three blocks of 64 threads has some units of a small layer
inline DeviceLimits small_device() { return {3, 64 << 10, 65 << 10, 65536, 64, 1024, 16, 32, 4 << 20, 8, 0}; }

// The loop of an LSTM in one launch: two steps, more sequences than a tile has, some of which end after the first
inline void run_persistent(Arrays& arrays, bool backward, Operands operands) {
  constexpr Index T = 2, N = 34, H = 20, first = N, second = N - 1, rows = first + second, W = 4 * H;
  Walk<float> walk{};
  walk.steps = T, walk.N = N, walk.H = walk.R = H;
  std::vector<Index> order, place;
  for (Index i = 0; i < N; ++i) order.push_back(i), place.push_back(i);
  for (Index i = 0; i < second; ++i) place.push_back(N + i);
  std::vector<Index> length(N, T);
  length.back() = 1;
  walk.order = arrays.these(order), walk.place = arrays.these(place), walk.length = arrays.these(length);
  walk.offset = arrays.these<Index>({0, first, rows});
  walk.h0 = arrays.some(N * H), walk.c0 = arrays.some(N * H), walk.h_mask = arrays.some(N * H);
  Problem<float> p{};
  p.dims = {T, N, 1, H, H};
  const float* const w_hh = arrays.some(W * H);
  const PersistentLoop<Lstm, float> loop(p, false, backward, {small_device(), Loop::persistent, operands}, arrays);
  loop.start(w_hh, nullptr);
  if (!backward) {
    ForwardStep<float> step{};
    step.walk = walk;
    step.gx.stride = W, step.gx.numbers = arrays.take<float>(rows * W);
    GATEWISE_CUDA_CHECK(
        cudaMemcpy(step.gx.numbers, arrays.some(rows * W), rows * W * sizeof(float), cudaMemcpyDeviceToDevice));
    step.y = arrays.result(T * N * H, true), step.saved = {arrays.take<float>(rows * W), W};
    loop.run(persistent_forward<Lstm, float>, {loop.steps(0, T, walk), step, arrays.result(rows * H), nullptr},
             nullptr);
  } else {
    BackwardStep<float> step{};
    step.walk = walk;
    step.y = arrays.some(T * N * H), step.dy = arrays.some(T * N * H), step.saved = {arrays.some(rows * W), W};
    step.gates = arrays.result(rows * W);
    step.carry_h = arrays.result(N * H, true), step.carry_c = arrays.result(N * H, true);
    loop.run(persistent_backward<Lstm, float>, {loop.steps(0, T, walk), step, arrays.some(rows * H)}, nullptr);
  }
}

#ifdef GATEWISE_TRIAL_LAYERS
// A layer forward and backward with every option that the cell has
template <class Cell> void run_layer(Arrays& arrays, bool projects = false, const Execution& execution = {}) {
  constexpr Index T = 3, N = 3, I = 2, H = 5, W = Index(Cell::G) * H;
  const Index R = projects ? 3 : H;
  const std::vector<Index> lengths{2, 3, 1};
  Problem<float> p{};
  p.dims = {T, N, I, H, R};
  p.weights = {arrays.some(W * I),
               Cell::has_product ? arrays.some(W * R) : nullptr,
               Cell::normed ? nullptr : arrays.some(W),
               Cell::normed ? nullptr : arrays.some(W),
               Cell::U ? arrays.some(Cell::U * H) : nullptr,
               projects ? arrays.some(R * H) : nullptr};
  p.sequence.x = arrays.some(T * N * I), p.sequence.step_stride = N * I, p.sequence.sequence_stride = I;
  p.sequence.h0 = arrays.some(N * R), p.sequence.c0 = Cell::has_c ? arrays.some(N * H) : nullptr;
  p.sequence.lengths = lengths.data();
  p.sequence.reset = arrays.these<unsigned char>({0, 0, 1, 1, 0, 0, 0, 0, 0});
  p.h_mask = Cell::has_product ? arrays.some(N * R) : nullptr;
  p.zoneout = {0.3, Cell::has_c ? 0.4 : 0.0, true, 5};
  const Sizes sizes = cuda::sizes<Cell, float>(p, execution);

  Forward<float> f{};
  f.problem = p;
  f.y = arrays.result(T * N * R), f.hn = arrays.result(N * R), f.cn = Cell::has_c ? arrays.result(N * H) : nullptr;
  f.saved = arrays.take<float>(sizes.saved), f.states = Cell::has_c ? arrays.take<float>(sizes.states) : nullptr;
  f.scratch = arrays.take<char>(sizes.forward_scratch);
  forward<Cell, float>(f, execution, nullptr);

  Backward<float> b{};
  b.problem = p, b.y = f.y, b.saved = f.saved, b.states = f.states;
  b.dy = arrays.some(T * N * R), b.dhn = arrays.some(N * R), b.dcn = Cell::has_c ? arrays.some(N * H) : nullptr;
  b.dx = arrays.result(T * N * I), b.dh0 = arrays.result(N * R), b.dc0 = Cell::has_c ? arrays.result(N * H) : nullptr;
  b.dw_ih = arrays.result(W * I, true), b.dw_hh = Cell::has_product ? arrays.result(W * R, true) : nullptr;
  if (!Cell::normed) b.db_ih = arrays.result(W, true), b.db_hh = arrays.result(W, true);
  b.dw_unit = Cell::U ? arrays.result(Cell::U * H, true) : nullptr;
  b.dw_hr = projects ? arrays.result(R * H, true) : nullptr;
  b.scratch = arrays.take<char>(sizes.backward_scratch);
  backward<Cell, float>(b, execution, nullptr);
}
#endif

inline void run(const char* name, Arrays& arrays) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("multiply")) run_multiply(arrays);
  else if (is("add_parts")) run_add_parts(arrays);
  else if (is("column_sums")) run_column_sums(arrays);
  else if (is("standardise")) run_standardise(arrays, false);
  else if (is("d_standardise")) run_standardise(arrays, true);
  else if (is("gather")) run_gather(arrays);
  else if (is("persistent_forward")) run_persistent(arrays, false, Operands::exact);
  else if (is("persistent_backward")) run_persistent(arrays, true, Operands::exact);
  else if (is("persistent_tf32")) run_persistent(arrays, false, Operands::tf32);
#ifdef GATEWISE_TRIAL_LAYERS
  else if (is("lstm")) run_layer<Lstm>(arrays, true);
  else if (is("gru")) run_layer<Gru>(arrays);
  else if (is("gru_persistent")) run_layer<Gru>(arrays, false, {small_device(), Loop::persistent});
  else if (is("lstm_norm")) run_layer<LstmNorm>(arrays);
  else if (is("gru_reset_before")) run_layer<GruResetBefore>(arrays);
#endif
  else throw std::invalid_argument(std::string("trial: there is no ") + name);
}

}  // namespace gatewise::cuda

int main(int argc, char** argv) try {
  for (int i = 1; i < argc; ++i) {
    gatewise::cuda::Arrays arrays;
    gatewise::cuda::run(argv[i], arrays);
    arrays.print(argv[i]);
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
