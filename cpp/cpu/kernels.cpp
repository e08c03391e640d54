// Built once per arch (CMakeLists.txt: add_arch). Its only symbol is the table of what it can do.
#include "layer.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH {
namespace {

template <class T, class F> void map(const T* x, T* y, std::size_t n, F f) {
  const FlushSubnormals flush;
  constexpr std::size_t W = Vec<T>::width;
  for (std::size_t i = 0; i < n; i += W) f(Vec<T>::load(x + i, Index(n - i))).store(y + i, Index(n - i));
}
template <class T> T fma_chains(std::size_t rounds) {
  const Vec<T> factor(T(0.999)), addend(T(0.001));
  Vec<T> chain[kAccumulators];
  GATEWISE_UNROLL
  for (int i = 0; i < kAccumulators; ++i) chain[i] = Vec<T>(T(i));
  for (std::size_t r = 0; r < rounds; ++r) {
    GATEWISE_UNROLL
    for (int i = 0; i < kAccumulators; ++i) chain[i] = fma(chain[i], factor, addend);
  }
  T sum = 0;  // returned, so that none of it can be left out
  for (const Vec<T>& c : chain) sum += c.native[0];
  return sum;
}

template <class T> void dropout(const T* x, T* y, Index n, std::uint64_t key, double p) {
  using V = Vec<T>;
  const V scale(T(1 / (1 - p)));
  for (Index k = 0; k < n; k += V::width) {
    const auto bits = random_bits(key, V::lane_numbers() + std::uint32_t(k));
    const V kept = select((typename V::Integer)(bits >> 1) < random_limit(p), V(0), scale);
    (V::load(x + k, n - k) * kept).store(y + k, n - k);
  }
}

template <class T> constexpr Functions<T> functions() {
  return {[](const T* x, T* y, std::size_t n) { map(x, y, n, [](Vec<T> v) { return exp(v); }); },
          [](const T* x, T* y, std::size_t n) { map(x, y, n, [](Vec<T> v) { return tanh(v); }); },
          [](const T* x, T* y, std::size_t n) { map(x, y, n, [](Vec<T> v) { return sigmoid(v); }); },
          dropout<T>,
          fma_chains<T>,
          2 * kAccumulators * int(Vec<T>::width)};
}

template <class Cell, class T> constexpr CellKernels<T> cell_kernels() {
  return {sizes<Cell, T>, pack_weights<Cell, T>, forward<Cell, T>, backward<Cell, T>};
}
template <class List> struct Table;
template <class... Cell> struct Table<List<Cell...>> {
  static constexpr Kernels rows[] = {{info_of<Cell>(), cell_kernels<Cell, float>(), cell_kernels<Cell, double>()}...};
};

}  // namespace

extern const ArchKernels kernels;
const ArchKernels kernels = {Table<Cells>::rows, int(sizeof(Table<Cells>::rows) / sizeof(Kernels)),
                             functions<float>(), functions<double>(),
                             Vec<float>::width,  Vec<double>::width};

}}  // namespace gatewise::GATEWISE_ARCH
