// What a call is about: a cell, the validated inputs of one layer, and the number of threads it may use.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif

#include "array.hpp"
#include "gatewise/gatewise.hpp"

namespace gatewise::binding {

inline const Kernels& find_cell(const ArchKernels& kernels, py::handle cell) {
  std::string known;
  for (int i = 0; i < kernels.cell_count; ++i)
    if (PyUnicode_Check(cell.ptr()) && PyUnicode_CompareWithASCIIString(cell.ptr(), kernels.cells[i].info.name) == 0)
      return kernels.cells[i];
  for (int i = 0; i < kernels.cell_count; ++i) known += std::string(i ? ", " : "") + kernels.cells[i].info.name;
  fail("cell", "one of " + known, py::repr(cell));
}

inline bool truth(py::handle value, const char* name) {
  if (!PyBool_Check(value.ptr())) fail(name, "True or False", py::repr(value));
  return value.ptr() == Py_True;
}

// Arrays that must be there, or must not: those of c depend on the cell, those of the tape on whether one is kept.
inline void require(py::handle array, const char* name, bool needed, const char* reason) {
  if (array.is_none() == needed)
    fail(name, needed ? "an array" : std::string("None, for ") + reason, needed ? "None" : describe_type(array));
}
constexpr const char *kNoC = "the cell has no c", *kNoTape = "no tape is kept";

// --- threads ---

constexpr int kMostThreads = 1024;

// Cores this process may run on
inline int available_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

// How many threads a call may use, and who said so.
struct Threads {
  int asked;  // 0: as many as there are cores, and nobody has counted them yet
  const char* source;

  int count() const { return asked ? asked : std::min(available_cores(), kMostThreads); }
};

inline int whole_number(const char* source, bool valid, long long value, py::handle shown) {
  if (!valid || value < 1 || value > kMostThreads)
    fail(source, "a whole number from 1 to " + std::to_string(kMostThreads), py::repr(shown));
  return int(value);
}

inline int threads_from_environment(const char* source, std::string text) {
  const auto shown = [&] { return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(text.c_str())); };
  const std::size_t digits = text.find_first_not_of("0123456789");
  if (digits != std::string::npos) return whole_number(source, false, 0, shown());
  if (text.size() > 18) return whole_number(source, false, 0, py::int_(shown()));
  const long long value = text.empty() ? 0 : std::stoll(text);
  return whole_number(source, true, value, text.empty() ? shown() : py::int_(value));
}

// The argument, else GATEWISE_NUM_THREADS, else OMP_NUM_THREADS, else the cores of this process. The environment is
// read at every call, through the C library, to which os.environ writes.
inline Threads choose_threads(py::handle argument) {
  constexpr const char* kBlank = " \t\n\r\f\v";
  if (!argument.is_none()) {
    int overflow = 1;
    long long value = 0;
    if (!PyBool_Check(argument.ptr())) {
      const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(argument.ptr()));
      if (index) value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
      else if (PyErr_ExceptionMatches(PyExc_TypeError)) PyErr_Clear();  // no number: said better below
      else throw py::error_already_set();
    }
    return {whole_number("num_threads", overflow == 0, value, argument), "num_threads"};
  }
  for (const char* variable : {"GATEWISE_NUM_THREADS", "OMP_NUM_THREADS"}) {
    const char* text = std::getenv(variable);
    if (!text || !*text) continue;
    std::string number = text;
    if (*variable == 'O') {  // OpenMP allows one number for each level of nesting; the outermost is ours
      number = number.substr(0, number.find(','));
      number.erase(0, number.find_first_not_of(kBlank));
      number.erase(number.find_last_not_of(kBlank) + 1);
    }
    return {threads_from_environment(variable, number), variable};
  }
  return {0, "cores of this process"};
}

// --- the layer's inputs ---

// The inputs of one layer, validated and held. It serves the forward pass and, later, the backward pass, on the
// arch that was chosen when it was made: the layout of the tape is that arch's own.
class LayerProblem {
 public:
  const Arch& arch;
  const Kernels& kernels;
  bool is_double = false;
  Dims dims{};
  Sizes sizes{};

  LayerProblem(py::handle cell, py::handle x, py::handle w_ih, py::handle w_hh, py::handle b_ih, py::handle b_hh,
               py::handle h0, py::handle c0, py::handle lengths, py::handle reverse)
      : arch(choose_arch()), kernels(find_cell(*arch.kernels, cell)), reverse_(truth(reverse, "reverse")) {
    const Axes axes = {{"T", -1}, {"N", -1}, {"I", -1}};
    const Expected expected{"float32 or float64", axes, false};
    x_ = open(x, "x", expected);
    is_double = x_.is("d");
    if (!is_double && !x_.is("f")) fail("x", expected.text(), describe(x, x_));
    is_double ? borrow_all<double>(x, w_ih, w_hh, b_ih, b_hh, h0, c0)
              : borrow_all<float>(x, w_ih, w_hh, b_ih, b_hh, h0, c0);
    copy_lengths(lengths);
    const double largest = double(count_rows()) * (kernels.info.S + 2) * double(dims.H + 64) * 8;
    if (largest > 0x1p62 || double(dims.T) > 0x1p48 || double(dims.N) > 0x1p48) throw std::bad_alloc();
    sizes = typed([&](auto zero) { return this->cell<decltype(zero)>().sizes(problem<decltype(zero)>()); });
  }

  template <class T> Problem<T> problem() const {
    return {dims,
            {w_ih_.data<const T>(), w_hh_.data<const T>(), b_ih_.data<const T>(), b_hh_.data<const T>()},
            {x_.data<const T>(), h0_.data<const T>(), c0_.data<const T>(), has_lengths_ ? lengths_.data() : nullptr,
             reverse_}};
  }
  template <class T> const CellKernels<T>& cell() const {
    if constexpr (sizeof(T) == 4) return kernels.f32;
    else return kernels.f64;
  }
  // Calls f with a value of the problem's element type.
  template <class F> auto typed(F f) const -> decltype(f(float())) { return is_double ? f(double()) : f(float()); }

  Index count_rows() const {
    if (!has_lengths_) return dims.T * dims.N;
    Index rows = 0;
    for (const Index length : lengths_) rows += length;
    return rows;
  }
  int lanes() const { return is_double ? arch.kernels->lanes_f64 : arch.kernels->lanes_f32; }

  // So little arithmetic, some ten microseconds of it, that no other thread could be of help in that time.
  bool is_tiny() const {
    return 2.0 * double(count_rows()) * kernels.info.G * double(dims.H) * double(dims.I + dims.H) < 1e6;
  }

 private:
  bool reverse_, has_lengths_ = false;
  Array x_, w_ih_, w_hh_, b_ih_, b_hh_, h0_, c0_;
  std::vector<Index> lengths_;  // a copy: these steer addresses, and the caller may change its array

  template <class T> void borrow_all(py::handle x, py::handle w_ih, py::handle w_hh, py::handle b_ih, py::handle b_hh,
                                     py::handle h0, py::handle c0) {
    const int G = kernels.info.G;
    check<T>(x_, x, "x", {{"T", -1}, {"N", -1}, {"I", -1}});
    w_hh_ = borrow<T>(w_hh, "w_hh", {{"H", -1, G}, {"H", -1}});
    dims = {x_.size(0), x_.size(1), x_.size(2), w_hh_.size(1)};
    if (dims.I < 1) fail("x", "an input size I of at least 1", "I = 0 in " + x_.shape_text());
    if (dims.H < 1) fail("w_hh", "a hidden size H of at least 1", "H = 0 in " + w_hh_.shape_text());
    const Axis rows{"H", G * dims.H, G}, hidden{"H", dims.H}, batch{"N", dims.N};
    check<T>(w_hh_, w_hh, "w_hh", {rows, hidden});
    w_ih_ = borrow<T>(w_ih, "w_ih", {rows, {"I", dims.I}});
    b_ih_ = borrow_optional<T>(b_ih, "b_ih", {rows});
    b_hh_ = borrow_optional<T>(b_hh, "b_hh", {rows});
    h0_ = borrow_optional<T>(h0, "h0", {batch, hidden});
    if (!kernels.info.has_c) require(c0, "c0", false, kNoC);
    c0_ = borrow_optional<T>(c0, "c0", {batch, hidden});
  }

  void copy_lengths(py::handle object) {
    const Array array = borrow_optional<Index>(object, "lengths", {{"N", dims.N}});
    const Index* values = array.data<Index>();
    if (object.is_none()) return;
    has_lengths_ = true;
    lengths_.assign(values, values + dims.N);
    for (Index n = 0; n < dims.N; ++n)
      if (lengths_[n] < 0 || lengths_[n] > dims.T)
        fail("lengths", "steps between 0 and T = " + std::to_string(dims.T),
             std::to_string(lengths_[n]) + " for sequence " + std::to_string(n));
  }
};

// While a kernel runs, other Python threads may: unless it is over sooner than they could be told.
class WhileComputing {
 public:
  explicit WhileComputing(bool tiny) {
    if (!tiny) released_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> released_;
};

}  // namespace gatewise::binding
