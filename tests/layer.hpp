// A layer with every array it needs, and problems by name, for programs that run the kernel library without Python
// (tests/kernels.cpp, benchmarks/instructions.cpp). Each array is a heap block of exactly its size; everything written
// starts as NaN.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gatewise/gatewise.hpp"

namespace gatewise {

struct Options {
  bool lengths = false, reverse = false, b_ih = true, b_hh = true, dx = true;
  bool state = false;  // h0 and c0 are given, and gradients of hn and cn come in
  bool reset = false, mask = false, zoneout = false, clip = false, project = false, batch_major = false;
  ResetTo reset_to = ResetTo::initial;
  Save save = Save::all;
};

template <class T> struct Layer {
  using Array = std::vector<T>;

  const Kernels& cell;
  const Dims dims;
  const Options options;
  Array x, w_ih, w_hh, b_ih, b_hh, w_unit, w_hr, h_mask, h0, c0, dy, dhn, dcn;  // empty: not given
  std::vector<Index> lengths;
  std::vector<unsigned char> reset;
  Array y, hn, cn, saved, states, dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_unit, dw_hr;
  std::vector<unsigned char> scratch;

  // Draws inputs of order 1, by operations that round correctly: the same numbers on every machine.
  Layer(const Kernels& cell, Dims dims, Options options, std::mt19937& generator)
      : cell(cell), dims(dims), options(options) {
    const auto [Ts, N, I, H, R] = dims;
    const CellInfo& info = cell.info;
    const Index G = info.G, c = info.has_c, given = options.state, product = info.has_product, biased = !info.normed;
    const auto draw = [&](Array& array, Index n, double scale) {
      array.resize(std::size_t(n));
      for (T& value : array) value = T(scale * (double(generator()) / 0x1p31 - 1));
    };
    draw(x, Ts * N * I, 1.7), draw(w_ih, G * H * I, 1 / std::sqrt(double(I)));
    draw(w_hh, product * G * H * R, 1 / std::sqrt(double(R)));
    draw(b_ih, biased * options.b_ih * G * H, 0.5), draw(b_hh, biased * options.b_hh * G * H, 0.5);
    draw(h0, given * N * R, 1), draw(c0, given * c * N * H, 1);
    draw(dy, Ts * N * R, 1), draw(dhn, given * N * R, 1), draw(dcn, given * c * N * H, 1);
    draw(w_unit, info.U * H, 1), draw(w_hr, projects() * R * H, 1 / std::sqrt(double(H)));
    draw(h_mask, options.mask * product * N * R, 2);
    for (Index i = 0; i < options.reset * Ts * N; ++i) reset.push_back(generator() % 4 == 0);
    if (options.lengths)
      for (Index n = 0; n < N; ++n) lengths.push_back(Index(generator() % std::uint64_t(Ts + 1)));

    const Sizes sizes = kernels().sizes(problem());
    const auto blank = [](Array& array, std::size_t n) { array.assign(n, T(NAN)); };
    blank(y, dy.size()), blank(hn, std::size_t(N * R)), blank(cn, std::size_t(c * N * H));
    blank(saved, sizes.saved), blank(states, sizes.states);
    blank(dx, options.dx ? x.size() : 0), blank(dh0, hn.size()), blank(dc0, cn.size());
    dw_ih.resize(w_ih.size()), dw_hh.resize(w_hh.size());  // zeros: weight gradients are added to
    db_ih.resize(std::size_t(biased * G * H)), db_hh.resize(std::size_t(biased * G * H));
    dw_unit.resize(w_unit.size()), dw_hr.resize(w_hr.size());
  }

  bool projects() const { return options.project && cell.info.has_c && !cell.info.normed; }
  const CellKernels<T>& kernels() const {
    if constexpr (sizeof(T) == 4) return cell.f32;
    else return cell.f64;
  }
  Problem<T> problem() const {
    const auto [Ts, N, I, H, R] = dims;
    Sequence<T> sequence{x.data(), or_null(h0), or_null(c0), lengths.empty() ? nullptr : lengths.data(),
                         options.reverse};
    sequence.layout = options.batch_major ? Layout::batch_major : Layout::time_major;
    sequence.step_stride = options.batch_major ? I : N * I, sequence.sequence_stride = options.batch_major ? Ts * I : I;
    sequence.reset = or_null(reset), sequence.reset_to = options.reset_to;
    Problem<T> p{
        dims, {w_ih.data(), or_null(w_hh), or_null(b_ih), or_null(b_hh), or_null(w_unit), or_null(w_hr)}, sequence};
    p.h_mask = or_null(h_mask);
    if (options.zoneout) p.zoneout = {0.3, cell.info.has_c ? 0.4 : 0, true, 5};
    if (options.clip) p.cell_clip = T(0.7);
    p.save = options.save, p.checkpoint = Ts < 4 ? 1 : 3;
    return p;
  }

  // Sets y, hn and cn, and the tape if it is kept
  Forward<T> forward_call(int threads, bool keeps_tape = true) {
    new_scratch(kernels().sizes(problem()).forward_scratch);
    T *tape = keeps_tape ? or_null(saved) : nullptr, *tape_states = keeps_tape ? or_null(states) : nullptr;
    return {problem(), y.data(), hn.data(), or_null(cn), tape, tape_states, scratch.data(), threads};
  }
  // Sets dx, dh0 and dc0; adds to the gradients of the weights
  Backward<T> backward_call(int threads) {
    new_scratch(kernels().sizes(problem()).backward_scratch);
    return {problem(),      y.data(),       or_null(saved),   or_null(states), dy.data(),      or_null(dhn),
            or_null(dcn),   or_null(dx),    dh0.data(),       or_null(dc0),    dw_ih.data(),   or_null(dw_hh),
            or_null(db_ih), or_null(db_hh), or_null(dw_unit), or_null(dw_hr),  scratch.data(), threads};
  }
  void forward(int threads, bool keeps_tape = true) { kernels().forward(forward_call(threads, keeps_tape)); }
  void backward(int threads) { kernels().backward(backward_call(threads)); }

  std::vector<std::pair<std::string, Array*>> results() {
    return {{"y", &y},         {"hn", &hn},       {"cn", &cn},           {"dx", &dx},
            {"dh0", &dh0},     {"dc0", &dc0},     {"dw_ih", &dw_ih},     {"dw_hh", &dw_hh},
            {"db_ih", &db_ih}, {"db_hh", &db_hh}, {"dw_unit", &dw_unit}, {"dw_hr", &dw_hr}};
  }

 private:
  void new_scratch(std::size_t bytes) { scratch = std::vector<unsigned char>(bytes, 0xff); }
  template <class A> static auto or_null(A& array) { return array.empty() ? nullptr : array.data(); }
};

// A problem as `gatewise bench` writes it, cell:sizes:dtype:options, with the options that a Layer has.
struct Named {
  std::string text, cell, dtype;
  Dims dims{};
  Options options;

  explicit Named(const std::string& text) : text(text) {
    char cell_name[32], dtype_name[8], words[128];
    long long T, N, I, H;
    if (std::sscanf(text.c_str(), "%31[^:]:T%lld,N%lld,I%lld,H%lld:%7[^:]:%127s", cell_name, &T, &N, &I, &H, dtype_name,
                    words) != 7)
      throw std::invalid_argument("problem: expected something like lstm:T9,N4,I5,H32:f32:train; got " + text);
    cell = cell_name, dtype = dtype_name, dims = {T, N, I, H, H};
    for (const char* word = std::strtok(words, ","); word; word = std::strtok(nullptr, ",")) {
      const std::string option = word;
      if (option == "lengths") options.lengths = true;
      else if (option == "reverse") options.reverse = true;
      else if (option == "h0") options.state = true;
      else if (option == "nobias") options.b_ih = options.b_hh = false;
      else if (option == "nodx") options.dx = false;
      else if (option == "reset") options.reset = true;
      else if (option == "mask") options.mask = true;
      else if (option == "zoneout") options.zoneout = true;
      else if (option == "clip") options.clip = true;
      else if (option == "states") options.save = Save::states;
      else if (option == "checkpoints") options.save = Save::checkpoints;
      else if (option == "project") options.project = true, dims.R = (dims.H + 1) / 2;
      else if (option != "train") throw std::invalid_argument("problem " + text + ": unknown option " + option);
    }
    if (dtype != "f32" && dtype != "f64") throw std::invalid_argument("problem " + text + ": unknown dtype " + dtype);
  }
};

// One of this build, by name; whether it runs here is for the caller to ask
inline const Arch& arch_named(const std::string& name) {
  for (const Arch* arch = archs().begin; arch != archs().end; ++arch)
    if (arch->name == name) return *arch;
  throw std::invalid_argument("arch: not in this build: " + name);
}

inline const Kernels& cell_named(const Arch& arch, const std::string& name) {
  for (int c = 0; c < arch.kernels->cell_count; ++c)
    if (arch.kernels->cells[c].info.name == name) return arch.kernels->cells[c];
  throw std::invalid_argument("cell: none is called " + name);
}

}  // namespace gatewise
