// What a call is about: a cell, the validated inputs of one layer, and the number of threads it may use.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <limits>
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

// The row of a cell in a table of kernels
template <class Row> const Row& find_cell(const Row* begin, const Row* end, py::handle cell) {
  std::string known;
  for (const Row* row = begin; row != end; ++row)
    if (PyUnicode_Check(cell.ptr()) && PyUnicode_CompareWithASCIIString(cell.ptr(), row->info.name) == 0) return *row;
  for (const Row* row = begin; row != end; ++row) known += std::string(row == begin ? "" : ", ") + row->info.name;
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
constexpr const char *kNoC = "the cell has no c", *kNoTape = "no tape is kept", *kNotKept = "save does not keep them",
                     *kNoProduct = "the cell has no w_hh", *kInUnit = "the biases of the cell are part of w_unit",
                     *kNoProjection = "there is no w_hr", *kNoUnit = "the cell has no weights of the unit's own";

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

// A number in Python's own sense; bool is none
inline double real_number(py::handle value, const char* name, const char* expected, double low, double high,
                          bool low_too) {
  const bool is_number = !PyBool_Check(value.ptr()) && PyNumber_Check(value.ptr()) && !PyComplex_Check(value.ptr());
  const double number = is_number ? PyFloat_AsDouble(value.ptr()) : -1;
  if (PyErr_Occurred()) PyErr_Clear(), fail(name, expected, py::repr(value));
  if (!is_number || !(low_too ? number >= low : number > low) || !(number < high))
    fail(name, expected, py::repr(value));
  return number;
}

// The place of a word in a list; the first one's if there is none
inline int one_of(py::handle word, const char* name, std::initializer_list<const char*> known) {
  if (word.is_none()) return 0;
  std::string list;
  int place = 0;
  for (const char* candidate : known) {
    if (PyUnicode_Check(word.ptr()) && PyUnicode_CompareWithASCIIString(word.ptr(), candidate) == 0) return place;
    list += std::string(place++ ? ", " : "") + "'" + candidate + "'";
  }
  fail(name, "one of " + list, py::repr(word));
}

inline Save save_of(py::handle word) { return Save(one_of(word, "save", {"all", "states", "checkpoints"})); }
// Steps from one checkpoint to the next; 0: there are none
inline Index checkpoint_of(Save save, Index T) {
  return save == Save::checkpoints ? std::max<Index>(1, Index(std::ceil(std::sqrt(double(T))))) : 0;
}

inline std::uint64_t whole_seed(py::handle seed) {
  const py::object index =
      PyBool_Check(seed.ptr()) ? py::object() : py::reinterpret_steal<py::object>(PyNumber_Index(seed.ptr()));
  const std::uint64_t value = index ? PyLong_AsUnsignedLongLong(index.ptr()) : 0;
  if (!index || PyErr_Occurred()) {
    PyErr_Clear();
    fail("seed", "a whole number from 0 to 2**64 - 1", py::repr(seed));
  }
  return value;
}

// How many sequences have a step t, of packed rows
inline std::vector<Index> read_batch_sizes(py::handle object) {
  const Array array = borrow<Index>(object, "batch_sizes", {{"T", -1}});
  const Index* numbers = array.data<const Index>();
  const std::vector<Index> sizes(numbers, numbers + array.size(0));
  for (std::size_t t = 0; t < sizes.size(); ++t)
    if (sizes[t] < 1 || (t > 0 && sizes[t] > sizes[t - 1]))
      fail("batch_sizes", "numbers of at least 1, none larger than the one before",
           std::to_string(sizes[t]) + " at step " + std::to_string(t));
  return sizes;
}
inline void check_rows(const std::vector<Index>& batch_sizes, Index rows) {
  constexpr std::uint64_t many = std::uint64_t(1) << 62;  // enough to be wrong, and no sum overflows
  std::uint64_t total = 0;
  for (const Index size : batch_sizes) total += total < many ? std::uint64_t(size) : 0;
  if (total != std::uint64_t(rows))
    fail("batch_sizes", "numbers that add up to the rows of x, " + std::to_string(rows), std::to_string(total));
}

// The inputs of one layer, validated and held, with their arrays in one memory: but for lengths and batch_sizes, which
// are always the host's.
template <class Memory> class LayerInputs {
 public:
  const CellInfo& info;
  Memory memory;
  bool is_double = false;
  Dims dims{};
  Layout layout = Layout::time_major;

  // extras: None, or what is seldom asked for, in the order of functional._EXTRAS
  LayerInputs(const CellInfo& info, Memory memory, py::handle x, py::handle w_ih, py::handle w_hh, py::handle b_ih,
              py::handle b_hh, py::handle h0, py::handle c0, py::handle lengths, py::handle reverse, py::handle extras)
      : info(info), memory(std::move(memory)), reverse_(truth(reverse, "reverse")) {
    const Extras more(extras);
    choose_layout(more, lengths);
    const Axes axes[] = {
        {{"T", -1}, {"N", -1}, {"I", -1}}, {{"N", -1}, {"T", -1}, {"I", -1}}, {{"rows", -1}, {"I", -1}}};
    const Expected expected{"float32 or float64", axes[int(layout)], false, true};
    x_ = this->memory.open(x, "x", expected);
    is_double = x_.is("d");
    if (!is_double && !x_.is("f")) fail("x", expected.text(), describe(x, x_));
    const Inputs in{x, w_ih, w_hh, b_ih, b_hh, h0, c0};
    is_double ? borrow_all<double>(in, more, axes[int(layout)]) : borrow_all<float>(in, more, axes[int(layout)]);
    layout == Layout::packed ? unpack_lengths() : copy_lengths(lengths);
    read_options(more);
    const double largest = double(count_rows()) * (info.S + info.U + 4) * double(dims.H + 64) * 8;
    if (largest > 0x1p62 || double(dims.T) > 0x1p48 || double(dims.N) > 0x1p48) throw std::bad_alloc();
  }
  LayerInputs(const LayerInputs&) = delete;

  template <class T> Problem<T> problem() const {
    const Sequence<T> sequence{x_.data<const T>(),
                               h0_.data<const T>(),
                               c0_.data<const T>(),
                               has_lengths_ ? lengths_.data() : nullptr,
                               reverse_,
                               layout,
                               step_stride_,
                               sequence_stride_,
                               reset_.data<const unsigned char>(),
                               reset_to_};
    return {dims,
            {w_ih_.data<const T>(), w_hh_.data<const T>(), b_ih_.data<const T>(), b_hh_.data<const T>(),
             w_unit_.data<const T>(), w_hr_.data<const T>()},
            sequence,
            h_mask_.data<const T>(),
            zoneout_,
            T(cell_clip_),
            save_,
            checkpoint_};
  }
  // Calls f with a value of the problem's element type.
  template <class F> auto typed(F f) const -> decltype(f(float())) { return is_double ? f(double()) : f(float()); }

  Index count_rows() const {
    if (!has_lengths_) return dims.T * dims.N;
    Index rows = 0;
    for (const Index length : lengths_) rows += length;
    return rows;
  }
  bool projects() const { return w_hr_.data<const void>() != nullptr; }
  Save save() const { return save_; }
  // f(axes) with the axes of an array that has a row of `last` numbers for every step of every sequence
  template <class F> auto with_step_axes(const Axis& last, F f) const {
    const Axis t{"T", dims.T}, n{"N", dims.N};
    if (layout == Layout::packed) return f(Axes{{"rows", count_rows()}, last});
    return layout == Layout::batch_major ? f(Axes{n, t, last}) : f(Axes{t, n, last});
  }

 private:
  bool reverse_, has_lengths_ = false;
  Array x_, w_ih_, w_hh_, b_ih_, b_hh_, h0_, c0_, w_unit_, w_hr_, h_mask_, reset_;
  Index step_stride_ = 0, sequence_stride_ = 0;
  std::vector<Index> lengths_;  // a copy: these steer addresses, and the caller may change its array
  std::vector<Index> batch_sizes_;
  ResetTo reset_to_ = ResetTo::initial;
  Zoneout zoneout_;
  double cell_clip_ = std::numeric_limits<double>::infinity();
  Save save_ = Save::all;
  Index checkpoint_ = 0;

  struct Inputs { py::handle x, w_ih, w_hh, b_ih, b_hh, h0, c0; };
  struct Extras {
    py::handle w_unit = Py_None, w_hr = Py_None, h_mask = Py_None, reset = Py_None, reset_to = Py_None,
               zoneout_h = Py_None, zoneout_c = Py_None, seed = Py_None, cell_clip = Py_None, batch_sizes = Py_None,
               batch_first = Py_None, save = Py_None;
    explicit Extras(py::handle given) {
      if (given.is_none()) return;
      py::handle* const all[] = {&w_unit,    &w_hr, &h_mask,    &reset,       &reset_to,    &zoneout_h,
                                 &zoneout_c, &seed, &cell_clip, &batch_sizes, &batch_first, &save};
      if (!PyTuple_Check(given.ptr()) || PyTuple_Size(given.ptr()) != py::ssize_t(std::size(all)))
        fail("extras", "None or a tuple of " + std::to_string(std::size(all)), py::repr(given));
      for (std::size_t i = 0; i < std::size(all); ++i) *all[i] = PyTuple_GetItem(given.ptr(), py::ssize_t(i));
    }
  };

  void choose_layout(const Extras& more, py::handle lengths) {
    const bool batch_first = !more.batch_first.is_none() && truth(more.batch_first, "batch_first");
    if (batch_first) layout = Layout::batch_major;
    if (more.batch_sizes.is_none()) return;
    if (batch_first) fail("batch_first", "False, for packed input has no batch axis", "True beside batch_sizes");
    if (!lengths.is_none()) fail("lengths", "None, for batch_sizes tells the lengths", describe_type(lengths));
    layout = Layout::packed;
    batch_sizes_ = read_batch_sizes(more.batch_sizes);
  }

  template <class T> void borrow_all(const Inputs& in, const Extras& more, const Axes& x_axes) {
    const int G = info.G;
    check<T>(x_, in.x, "x", x_axes);
    find_sizes<T>(in, more);
    const auto [Ts, N, I, H, R] = dims;
    const Axis rows{"H", G * H, G}, hidden{"H", H}, state{more.w_hr.is_none() ? "H" : "R", R}, batch{"N", N};
    w_ih_ = borrow<T>(memory, in.w_ih, "w_ih", {rows, {"I", I}});
    if (info.has_product) check<T>(w_hh_, in.w_hh, "w_hh", {rows, state});
    if (info.normed) require(in.b_ih, "b_ih", false, kInUnit), require(in.b_hh, "b_hh", false, kInUnit);
    b_ih_ = borrow_optional<T>(memory, in.b_ih, "b_ih", {rows});
    b_hh_ = borrow_optional<T>(memory, in.b_hh, "b_hh", {rows});
    h0_ = borrow_optional<T>(memory, in.h0, "h0", {batch, state});
    if (!info.has_c) require(in.c0, "c0", false, kNoC);
    c0_ = borrow_optional<T>(memory, in.c0, "c0", {batch, hidden});
    require(more.w_unit, "w_unit", info.U > 0, kNoUnit);
    if (info.U) w_unit_ = borrow<T>(memory, more.w_unit, "w_unit", {{"H", info.U * H, info.U}});
    if (!more.w_hr.is_none()) w_hr_ = borrow<T>(memory, more.w_hr, "w_hr", {state, hidden});
    if (!info.has_product) require(more.h_mask, "h_mask", false, kNoProduct);
    h_mask_ = borrow_optional<T>(memory, more.h_mask, "h_mask", {batch, state});
  }

  template <class T> void find_sizes(const Inputs& in, const Extras& more) {
    const bool packed = layout == Layout::packed, batch_first = layout == Layout::batch_major;
    Index H, R;
    if (info.has_product) {
      w_hh_ = borrow<T>(memory, in.w_hh, "w_hh", {{"H", -1, info.G}, {more.w_hr.is_none() ? "H" : "R", -1}});
      H = R = w_hh_.size(1);
    } else {
      require(in.w_hh, "w_hh", false, kNoProduct);
      H = R = borrow<T>(memory, in.w_ih, "w_ih", {{"H", -1, info.G}, {"I", -1}}).size(0) / info.G;
    }
    if (!more.w_hr.is_none()) {
      if (!info.has_c || std::strcmp(info.middle, "none") != 0)
        fail("w_hr", std::string("None, for the cell ") + info.name + " has no projection", describe_type(more.w_hr));
      const Array w_hr = borrow<T>(memory, more.w_hr, "w_hr", {{"R", -1}, {"H", -1}});
      R = w_hr.size(0), H = w_hr.size(1);
      if (R < 1 || R > H) fail("w_hr", "a projection to 1 to H numbers, shape (R, H)", w_hr.shape_text());
    }
    const Index item = sizeof(T), I = x_.size(packed ? 1 : 2);
    if (I < 1) fail("x", "an input size I of at least 1", "I = 0 in " + x_.shape_text());
    if (H < 1) fail(info.has_product ? "w_hh" : "w_ih", "a hidden size H of at least 1", "H = 0");
    const Index steps = packed ? Index(batch_sizes_.size()) : x_.size(batch_first);
    dims = {steps, packed ? (steps ? batch_sizes_[0] : 0) : x_.size(!batch_first), I, H, R};
    step_stride_ = x_.stride(packed ? 0 : batch_first) / item;
    sequence_stride_ = packed ? 0 : x_.stride(!batch_first) / item;
  }

  // Packed input: sequence i goes on as long as batches are larger than i
  void unpack_lengths() {
    check_rows(batch_sizes_, x_.size(0));
    has_lengths_ = true;
    lengths_.assign(std::size_t(dims.N), 0);
    for (std::size_t t = 0; t < batch_sizes_.size(); ++t)
      for (Index i = t + 1 < batch_sizes_.size() ? batch_sizes_[t + 1] : 0; i < batch_sizes_[t]; ++i)
        lengths_[std::size_t(i)] = Index(t) + 1;
  }

  void copy_lengths(py::handle object) {
    const Array array = borrow_optional<Index>(object, "lengths", {{"N", dims.N}});
    const Index* values = array.data<Index>();
    if (object.is_none()) return;
    has_lengths_ = true;
    lengths_.assign(values, values + dims.N);
    for (Index n = 0; n < dims.N; ++n)
      if (lengths_[std::size_t(n)] < 0 || lengths_[std::size_t(n)] > dims.T)
        fail("lengths", "steps between 0 and T = " + std::to_string(dims.T),
             std::to_string(lengths_[std::size_t(n)]) + " for sequence " + std::to_string(n));
  }

  template <class F> auto with_reset_axes(F f) const {
    const Axis t{"T", dims.T}, n{"N", dims.N};
    if (layout == Layout::packed) return f(Axes{{"rows", count_rows()}});
    return layout == Layout::batch_major ? f(Axes{n, t}) : f(Axes{t, n});
  }

  void read_options(const Extras& more) {
    const bool has_c = info.has_c;
    if (!more.reset.is_none())
      reset_ = with_reset_axes([&](const Axes& axes) { return borrow<bool>(memory, more.reset, "reset", axes); });
    if (one_of(more.reset_to, "reset_to", {"initial", "zero"}) == 1) reset_to_ = ResetTo::zero;
    const auto probability = [](py::handle p, const char* name) {
      return p.is_none() ? 0.0 : real_number(p, name, "a probability in [0, 1)", 0, 1, true);
    };
    zoneout_.h = probability(more.zoneout_h, "zoneout_h"), zoneout_.c = probability(more.zoneout_c, "zoneout_c");
    if (!has_c && zoneout_.c > 0) fail("zoneout_c", std::string("0, for ") + kNoC, py::repr(more.zoneout_c));
    if (!more.seed.is_none()) zoneout_.drawn = true, zoneout_.seed = whole_seed(more.seed);
    if (!more.cell_clip.is_none()) {
      if (!has_c) fail("cell_clip", std::string("None, for ") + kNoC, py::repr(more.cell_clip));
      cell_clip_ = real_number(more.cell_clip, "cell_clip", "a number above 0", 0,
                               std::numeric_limits<double>::infinity(), false);
    }
    save_ = save_of(more.save), checkpoint_ = checkpoint_of(save_, dims.T);
  }
};

// A layer on the arch that was chosen when it was made: it serves the forward pass and, later, the backward pass, for
// the layout of the tape is that arch's own.
struct OnArch {
  const Arch& arch;
  const Kernels& kernels;

  explicit OnArch(py::handle cell)
      : arch(choose_arch()),
        kernels(find_cell(arch.kernels->cells, arch.kernels->cells + arch.kernels->cell_count, cell)) {}
};
class LayerProblem : public OnArch, public LayerInputs<Host> {
 public:
  Sizes sizes{};

  template <class... Inputs> LayerProblem(py::handle cell, const Inputs&... inputs)
      : OnArch(cell), LayerInputs(kernels.info, Host(), inputs...) {
    sizes = typed([&](auto zero) { return this->cell<decltype(zero)>().sizes(problem<decltype(zero)>()); });
  }

  template <class T> const CellKernels<T>& cell() const {
    if constexpr (sizeof(T) == 4) return kernels.f32;
    else return kernels.f64;
  }
  int lanes() const { return is_double ? arch.kernels->lanes_f64 : arch.kernels->lanes_f32; }
  // So little arithmetic, some ten microseconds of it, that no other thread could be of help in that time.
  bool is_tiny() const { return 2.0 * double(count_rows()) * info.G * double(dims.H) * double(dims.I + dims.R) < 1e6; }
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
