// Runs the kernel library by itself on random problems, for the sanitizers: every buffer is a heap block of exactly
// its size, everything written starts as NaN, and one thread's bits are compared with three threads'.
// Prints how many problems ran; exits with 1 if bits differ or a NaN is left. tests/test_kernels_sanitized.py runs it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "gatewise/gatewise.hpp"

using namespace gatewise;

std::mt19937 generator(3);
Index between(Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(generator); }
bool coin() { return between(0, 1) == 1; }

template <class T> using Buffer = std::vector<T>;
template <class T> Buffer<T> random_buffer(Index n, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  Buffer<T> buffer(n);
  for (T& x : buffer) x = T(normal(generator));
  return buffer;
}
template <class T> Buffer<T> nan_buffer(Index n) { return Buffer<T>(n, T(NAN)); }

template <class T> const CellKernels<T>& typed(const Kernels& kernels) {
  if constexpr (sizeof(T) == 4) return kernels.f32;
  else return kernels.f64;
}

// All results of one forward and backward pass, one after the other
template <class T> Buffer<T> run(const Kernels& cell, const Problem<T>& p, const Buffer<T>& dy, const Buffer<T>& dn,
                                 bool wants_x, int threads) {
  const auto [Ts, N, I, H] = p.dims;
  const Index G = cell.info.G;
  const bool has_c = cell.info.has_c;
  const CellKernels<T>& kernels = typed<T>(cell);
  const Sizes sizes = kernels.sizes(p);
  auto y = nan_buffer<T>(Ts * N * H), hn = nan_buffer<T>(N * H), cn = nan_buffer<T>(has_c ? N * H : 0);
  auto saved = nan_buffer<T>(sizes.saved), states = nan_buffer<T>(sizes.states);
  {
    std::vector<unsigned char> scratch(sizes.forward_scratch, 0xff);
    kernels.forward(
        {p, y.data(), hn.data(), has_c ? cn.data() : nullptr, saved.data(), states.data(), scratch.data(), threads});
    // Without a tape the same results must come
    auto y2 = nan_buffer<T>(Ts * N * H), hn2 = nan_buffer<T>(N * H), cn2 = nan_buffer<T>(cn.size());
    kernels.forward(
        {p, y2.data(), hn2.data(), has_c ? cn2.data() : nullptr, nullptr, nullptr, scratch.data(), threads});
    if (y2 != y || hn2 != hn || cn2 != cn) std::puts("inference differs from training"), std::exit(1);
  }
  auto dx = nan_buffer<T>(wants_x ? Ts * N * I : 0), dh0 = nan_buffer<T>(N * H), dc0 = nan_buffer<T>(cn.size());
  Buffer<T> dw_ih(G * H * I), dw_hh(G * H * H), db_ih(G * H), db_hh(G * H);
  std::vector<unsigned char> scratch(sizes.backward_scratch, 0xff);
  kernels.backward({p, y.data(), saved.data(), states.data(), dy.data(), dn.data(), has_c ? dn.data() : nullptr,
                    wants_x ? dx.data() : nullptr, dh0.data(), has_c ? dc0.data() : nullptr, dw_ih.data(), dw_hh.data(),
                    db_ih.data(), db_hh.data(), scratch.data(), threads});
  Buffer<T> all;
  for (const Buffer<T>* part : {&y, &hn, &cn, &dx, &dh0, &dc0, &dw_ih, &dw_hh, &db_ih, &db_hh})
    all.insert(all.end(), part->begin(), part->end());
  return all;
}

template <class T> void check(const Arch& arch, const Kernels& cell, Dims d) {
  const auto [Ts, N, I, H] = d;
  const Index G = cell.info.G;
  const double scale = 1 / std::sqrt(double(H));
  const auto x = random_buffer<T>(Ts * N * I), w_ih = random_buffer<T>(G * H * I, scale),
             w_hh = random_buffer<T>(G * H * H, scale), b_ih = random_buffer<T>(G * H, scale),
             b_hh = random_buffer<T>(G * H, scale), h0 = random_buffer<T>(N * H), c0 = random_buffer<T>(N * H),
             dy = random_buffer<T>(Ts * N * H), dn = random_buffer<T>(N * H);
  Buffer<Index> lengths(N);
  for (Index& length : lengths) length = between(0, Ts);
  const bool has_lengths = coin(), has_state = coin(), has_bias = coin();
  const Problem<T> problem{
      d,
      {w_ih.data(), w_hh.data(), has_bias ? b_ih.data() : nullptr, coin() ? b_hh.data() : nullptr},
      {x.data(), has_state ? h0.data() : nullptr, has_state && cell.info.has_c ? c0.data() : nullptr,
       has_lengths ? lengths.data() : nullptr, coin()}};
  const bool wants_x = coin();
  const Buffer<T> one = run<T>(cell, problem, dy, dn, wants_x, 1), three = run<T>(cell, problem, dy, dn, wants_x, 3);
  for (const T value : one)
    if (std::isnan(value)) std::printf("%s %s: a NaN is left\n", arch.name, cell.info.name), std::exit(1);
  if (std::memcmp(one.data(), three.data(), one.size() * sizeof(T)) != 0)
    std::printf("%s %s: three threads differ from one\n", arch.name, cell.info.name), std::exit(1);
}

int main() {
  int problems = 0;
  for (const Arch* arch = archs().begin; arch != archs().end; ++arch) {
    if (!arch->runs_here()) continue;
    for (int c = 0; c < arch->kernels->cell_count; ++c) {
      const Kernels& cell = arch->kernels->cells[c];
      // Small and odd; then above the threshold at which a team forms, shared by rows, by panels, in several chunks
      for (int k = 0; k < 6; ++k)
        check<float>(*arch, cell, {between(0, 6), between(0, 9), between(1, 20), between(1, 40)}),
            check<double>(*arch, cell, {between(0, 6), between(0, 9), between(1, 20), between(1, 40)});
      for (const Dims d : {Dims{6, 40, 11, 65}, Dims{4, 5, 20, 258}, Dims{300, 8, 2, 33}}) {
        check<float>(*arch, cell, d), check<double>(*arch, cell, d);
        problems += 2;
      }
      problems += 12;
    }
  }
  std::printf("%d problems\n", problems);
}
