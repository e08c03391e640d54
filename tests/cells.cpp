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

}}  // namespace gatewise::GATEWISE_ARCH

#include "gatewise/cells.hpp"

using namespace gatewise;

std::mt19937 generator(7);
double uniform() { return std::uniform_real_distribution<double>(-2, 2)(generator); }

template <class Cell> double worst_error() {
  constexpr int G = Cell::G, S = Cell::S;
  double worst = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    double gx[G], gh[G], saved[S], dgx[G], dgh[G];
    for (int g = 0; g < G; ++g) gx[g] = uniform(), gh[g] = uniform();
    const State<double> prev{uniform(), Cell::has_c ? uniform() : 0};
    const State<double> next = Cell::forward(gx, gh, prev, saved);
    const State<double> d{uniform(), Cell::has_c ? uniform() : 0};
    const State<double> before = Cell::backward(saved, prev, next, d, dgx, dgh);
    for (int g = 0; g < G; ++g)
      if (!(Cell::split && g == G - 1)) dgh[g] = dgx[g];  // the contract: equal, and only dgx is written

    // One input at a time: the slope of <d, next> along it is what backward must have returned for it.
    for (int input = 0; input < 2 * G + 2; ++input) {
      Dual x[G], h[G], kept[S];
      for (int g = 0; g < G; ++g) x[g] = Dual(gx[g], input == g), h[g] = Dual(gh[g], input == G + g);
      const State<Dual> state{Dual(prev.h, input == 2 * G), Dual(prev.c, input == 2 * G + 1)};
      const State<Dual> result = Cell::forward(x, h, state, kept);
      const double expected = d.h * result.h.slope + d.c * result.c.slope;
      const double returned = input < G        ? dgx[input]
                              : input < 2 * G  ? dgh[input - G]
                              : input == 2 * G ? before.h
                                               : before.c;
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
