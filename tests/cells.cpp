// Every cell's backward against its own forward, by dual numbers: exact derivatives, so nothing but rounding is
// allowed. Prints one line a cell, "name worst_error"; tests/test_cells.py compiles, runs and judges it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "gatewise/math.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH {

// A value and its derivative along one direction of the inputs
struct Dual {
  double value = 0, slope = 0;
  Dual() = default;
  Dual(double value, double slope = 0) : value(value), slope(slope) {}
};
inline Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.slope + b.slope}; }
inline Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.slope - b.slope}; }
inline Dual operator*(Dual a, Dual b) { return {a.value * b.value, a.slope * b.value + a.value * b.slope}; }
inline Dual operator-(Dual a) { return {-a.value, -a.slope}; }
inline Dual fma(Dual a, Dual b, Dual c) { return a * b + c; }
inline Dual tanh(Dual a) {
  const double y = std::tanh(a.value);
  return {y, a.slope * (1 - y * y)};
}
inline Dual sigmoid(Dual a) {
  const double y = 1 / (1 + std::exp(-a.value));
  return {y, a.slope * y * (1 - y)};
}
inline Dual relu(Dual a) { return a.value < 0 ? Dual(0, 0) : a; }
inline Dual clamp(Dual a, Dual limit) { return a.value >= limit.value ? limit : a.value <= -limit.value ? -limit : a; }

}}  // namespace gatewise::GATEWISE_ARCH

#include "gatewise/cells.hpp"

using namespace gatewise;

std::mt19937 generator(7);
double uniform() { return std::uniform_real_distribution<double>(-2, 2)(generator); }

// A whole step. The stage in the middle of it, where there is one, is here a product with a number.
constexpr double kStage = 1.3;
template <class Cell, class V> State<V> forward(const V (&gx)[Cell::G], const V (&gh)[Cell::G],
                                                const Unit<V, Cell::U>& unit, State<V> prev, V (&saved)[Cell::S]) {
  State<V> next = Cell::forward(gx, gh, unit, prev, saved);
  if constexpr (Cell::middle != Middle::none) next.h = Cell::output(gx, V(kStage) * next.h, unit, prev, saved);
  return next;
}
template <class Cell> State<double> backward(const double (&saved)[Cell::S], const Unit<double, Cell::U>& unit,
                                             State<double> prev, State<double> d, double (&dgx)[Cell::G],
                                             double (&dgh)[Cell::G], double (&dw)[Cell::U ? Cell::U : 1]) {
  Staged<double> staged{0, 0};
  if constexpr (Cell::middle != Middle::none) {
    staged = Cell::d_output(saved, unit, prev, d.h, dgx, dw);
    d.h = kStage * staged.middle;
  }
  State<double> before = Cell::backward(saved, unit, prev, d, dgx, dgh, dw);
  before.h += staged.prev_h;
  return before;
}

template <class Cell> double worst_error() {
  constexpr int G = Cell::G, S = Cell::S, U = Cell::U;
  // Where the last gate's hidden part comes of the stage, gh has none of it
  constexpr int hidden = !Cell::has_product ? 0 : Cell::middle == Middle::product ? G - 1 : G;
  double worst = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    double gx[G], gh[G], saved[S], dgx[G] = {}, dgh[G] = {}, dw[U ? U : 1] = {};
    Unit<double, U> unit;
    for (int g = 0; g < G; ++g) gx[g] = uniform(), gh[g] = g < hidden ? uniform() : 0;
    for (int u = 0; u < U; ++u) unit.w[u] = uniform();
    unit.clip = trial % 2 ? 0.8 : INFINITY;
    const State<double> prev{uniform(), Cell::has_c ? uniform() : 0};
    const State<double> next = forward<Cell>(gx, gh, unit, prev, saved);
    (void)next;
    const State<double> d{uniform(), Cell::has_c ? uniform() : 0};
    const State<double> before = backward<Cell>(saved, unit, prev, d, dgx, dgh, dw);
    for (int g = 0; g < G; ++g)
      if (!Cell::normed && !(Cell::split && g == G - 1)) dgh[g] = dgx[g];  // the contract: equal, only dgx is written

    // One input at a time: the slope of <d, next> along it is what backward must have returned for it.
    for (int input = 0; input < 2 * G + 2 + U; ++input) {
      if (input >= G + hidden && input < 2 * G) continue;
      Dual x[G], h[G], kept[S];
      for (int g = 0; g < G; ++g) x[g] = Dual(gx[g], input == g), h[g] = Dual(gh[g], input == G + g);
      Unit<Dual, U> own;
      for (int u = 0; u < U; ++u) own.w[u] = Dual(unit.w[u], input == 2 * G + 2 + u);
      own.clip = Dual(unit.clip);
      const State<Dual> state{Dual(prev.h, input == 2 * G), Dual(prev.c, input == 2 * G + 1)};
      const State<Dual> result = forward<Cell>(x, h, own, state, kept);
      const double expected = d.h * result.h.slope + d.c * result.c.slope;
      const double returned = input < G            ? dgx[input]
                              : input < 2 * G      ? dgh[input - G]
                              : input == 2 * G     ? before.h
                              : input == 2 * G + 1 ? before.c
                                                   : dw[input - 2 * G - 2];
      const double error = std::fabs(returned - expected);
      worst = error <= worst ? worst : error;  // NaN is an error too
    }
  }
  return worst;
}

template <class... Cell> void report(List<Cell...>) {
  (std::printf("%s %.3e\n", Cell::name, worst_error<Cell>()), ...);
}
int main() { report(Cells{}); }
