// gatewise._core: the kernels as Python sees them. No mathematics and no policy: borrow every array, release the
// GIL, call. Which outputs exist, and what is done with them, is decided in python/gatewise/functional.py.
#include <algorithm>
#include <chrono>
#include <new>
#include <vector>

#include "array.hpp"
#include "gatewise/gatewise.hpp"

namespace gatewise::binding { namespace {

const Kernels& find_cell(const ArchKernels& kernels, py::handle cell) {
  const std::string name = py::isinstance<py::str>(cell) ? cell.cast<std::string>() : "";
  std::string known;
  for (int i = 0; i < kernels.cell_count; ++i) {
    if (kernels.cells[i].info.name == name) return kernels.cells[i];
    known += std::string(i ? ", " : "") + kernels.cells[i].info.name;
  }
  throw py::value_error("cell: expected one of " + known + "; got " + py::repr(cell).cast<std::string>());
}

bool truth(py::handle value, const char* name) {
  if (!PyBool_Check(value.ptr())) fail(name, "True or False", py::repr(value));
  return value.ptr() == Py_True;
}

const Arch& find_arch(const std::string& name) {
  std::string known;
  for (const Arch* arch = archs().begin; arch != archs().end; ++arch) {
    if (!arch->runs_here()) continue;
    if (arch->name == name) return *arch;
    known += (known.empty() ? "" : ", ") + std::string(arch->name);
  }
  throw py::value_error("arch: expected one of " + known + "; got '" + name + "'");
}

// Arrays that must be there, or must not: those of c depend on the cell, those of the tape on whether one is kept.
void require(py::handle array, const char* name, bool needed, const char* reason) {
  if (array.is_none() == needed)
    fail(name, needed ? "an array" : std::string("None, for ") + reason, needed ? "None" : describe_type(array));
}
constexpr const char *kNoC = "the cell has no c", *kNoTape = "no tape is kept";

// The inputs of one layer, validated and held. It serves the forward pass and, later, the backward pass, on the
// arch that was chosen when it was made: the layout of the tape is that arch's own.
class LayerProblem {
 public:
  const Arch& arch;
  const Kernels& kernels;
  bool is_double = false;
  Dims dims{};

  LayerProblem(py::object cell, py::object x, py::object w_ih, py::object w_hh, py::object b_ih, py::object b_hh,
               py::object h0, py::object c0, py::object lengths, py::object reverse)
      : arch(choose_arch()), kernels(find_cell(*arch.kernels, cell)), reverse_(truth(reverse, "reverse")) {
    const std::string expected = "float32 or float64 (T, N, I), C-contiguous";
    Array first = open(x, "x", expected, false);
    is_double = first.is("d");
    if (!is_double && !first.is("f")) fail("x", expected, describe_dtype(x, first.view()) + " " + join(first.view()));
    is_double ? borrow_all<double>(x, w_ih, w_hh, b_ih, b_hh, h0, c0)
              : borrow_all<float>(x, w_ih, w_hh, b_ih, b_hh, h0, c0);
    copy_lengths(lengths);
    const double largest = double(count_rows()) * (kernels.info.S + 2) * double(dims.H + 64) * 8;
    if (largest > 0x1p62 || double(dims.T) > 0x1p48 || double(dims.N) > 0x1p48) throw std::bad_alloc();
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
  template <class F> auto typed(F f) const { return is_double ? f(double()) : f(float()); }

  Index count_rows() const {
    if (!has_lengths_) return dims.T * dims.N;
    Index rows = 0;
    for (const Index length : lengths_) rows += length;
    return rows;
  }
  Sizes sizes() const {
    return typed([&](auto zero) { return cell<decltype(zero)>().sizes(problem<decltype(zero)>()); });
  }
  int lanes() const { return is_double ? arch.kernels->lanes_f64 : arch.kernels->lanes_f32; }

 private:
  bool reverse_, has_lengths_ = false;
  Array x_, w_ih_, w_hh_, b_ih_, b_hh_, h0_, c0_;
  std::vector<Index> lengths_;  // a copy: these steer addresses, and the caller may change its array

  template <class T> void borrow_all(py::handle x, py::handle w_ih, py::handle w_hh, py::handle b_ih, py::handle b_hh,
                                     py::handle h0, py::handle c0) {
    const int G = kernels.info.G;
    const std::string gates = G == 1 ? "H" : std::to_string(G) + "*H";
    x_ = borrow<T>(x, "x", {{"T", -1}, {"N", -1}, {"I", -1}});
    w_hh_ = borrow<T>(w_hh, "w_hh", {{gates, -1}, {"H", -1}});
    dims = {x_.size(0), x_.size(1), x_.size(2), w_hh_.size(1)};
    if (dims.I < 1) fail("x", "an input size I of at least 1", "I = 0 in " + join(x_.view()));
    if (dims.H < 1) fail("w_hh", "a hidden size H of at least 1", "H = 0 in " + join(w_hh_.view()));
    const Axis rows{gates, G * dims.H}, hidden{"H", dims.H}, batch{"N", dims.N};
    w_hh_ = borrow<T>(w_hh, "w_hh", {rows, hidden});
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

// Every array that a pass writes or reads besides the problem's, in the shapes of this problem
template <class T> struct Shapes {
  const LayerProblem& p;
  const Axis T_{"T", p.dims.T}, N_{"N", p.dims.N}, I_{"I", p.dims.I}, H_{"H", p.dims.H};
  const Axis G_{p.kernels.info.G == 1 ? "H" : std::to_string(p.kernels.info.G) + "*H", p.kernels.info.G * p.dims.H};

  Array out(py::handle o, const char* name, const Axes& axes) const { return borrow_optional<T>(o, name, axes, true); }
  Array in(py::handle o, const char* name, const Axes& axes) const { return borrow_optional<T>(o, name, axes); }
  Array buffer(py::handle o, const char* name, std::size_t elements, bool writable) const {
    return borrow_optional<T>(o, name, {{"elements", py::ssize_t(elements)}}, writable);
  }
};

Array borrow_scratch(py::handle o, std::size_t bytes) {
  return borrow<std::uint8_t>(o, "scratch", {{"bytes", py::ssize_t(bytes)}}, true);
}

// The caller's array as what the kernels add to: in the order of Ticks' members
Ticks* ticks_of(const Array& array) {
  static_assert(sizeof(Ticks) == 3 * sizeof(std::uint64_t), "an array of three is a Ticks");
  return reinterpret_cast<Ticks*>(array.data<std::uint64_t>());
}
Array borrow_ticks(py::handle o) { return borrow_optional<std::uint64_t>(o, "ticks", {{"3", 3}}, true); }

int check_threads(int threads) {
  if (threads < 1) fail("threads", "at least 1", std::to_string(threads));
  return threads;
}

template <class T> void run_forward(const LayerProblem& p, py::handle y, py::handle hn, py::handle cn, py::handle saved,
                                    py::handle states, py::handle scratch, int threads, py::handle ticks) {
  const Shapes<T> s{p};
  const Sizes sizes = p.sizes();
  const bool has_c = p.kernels.info.has_c, keeps = !saved.is_none();
  const Array y_ = borrow<T>(y, "y", {s.T_, s.N_, s.H_}, true), hn_ = borrow<T>(hn, "hn", {s.N_, s.H_}, true),
              cn_ = s.out(cn, "cn", {s.N_, s.H_}), saved_ = s.buffer(saved, "saved", sizes.saved, true),
              states_ = s.buffer(states, "states", sizes.states, true),
              scratch_ = borrow_scratch(scratch, sizes.forward_scratch), ticks_ = borrow_ticks(ticks);
  require(cn, "cn", has_c, kNoC);
  require(states, "states", has_c && keeps, keeps ? kNoC : kNoTape);
  const Forward<T> call{p.problem<T>(),   y_.data<T>(),      hn_.data<T>(),         cn_.data<T>(),
                        saved_.data<T>(), states_.data<T>(), scratch_.data<void>(), check_threads(threads),
                        nullptr,          ticks_of(ticks_)};
  const py::gil_scoped_release release;
  p.cell<T>().forward(call);
}

template <class T> void run_backward(const LayerProblem& p, py::handle y, py::handle saved, py::handle states,
                                     py::handle dy, py::handle dhn, py::handle dcn, py::handle dx, py::handle dh0,
                                     py::handle dc0, py::handle dw_ih, py::handle dw_hh, py::handle db_ih,
                                     py::handle db_hh, py::handle scratch, int threads, py::handle ticks) {
  const Shapes<T> s{p};
  const Sizes sizes = p.sizes();
  const bool has_c = p.kernels.info.has_c;
  const Array y_ = borrow<T>(y, "y", {s.T_, s.N_, s.H_}), saved_ = s.buffer(saved, "saved", sizes.saved, false),
              states_ = s.buffer(states, "states", sizes.states, false), dy_ = s.in(dy, "dy", {s.T_, s.N_, s.H_}),
              dhn_ = s.in(dhn, "dhn", {s.N_, s.H_}), dcn_ = s.in(dcn, "dcn", {s.N_, s.H_}),
              dx_ = s.out(dx, "dx", {s.T_, s.N_, s.I_}), dh0_ = s.out(dh0, "dh0", {s.N_, s.H_}),
              dc0_ = s.out(dc0, "dc0", {s.N_, s.H_}), dw_ih_ = s.out(dw_ih, "dw_ih", {s.G_, s.I_}),
              dw_hh_ = s.out(dw_hh, "dw_hh", {s.G_, s.H_}), db_ih_ = s.out(db_ih, "db_ih", {s.G_}),
              db_hh_ = s.out(db_hh, "db_hh", {s.G_}), scratch_ = borrow_scratch(scratch, sizes.backward_scratch),
              ticks_ = borrow_ticks(ticks);
  require(saved, "saved", true, kNoTape);
  require(states, "states", has_c, kNoC);
  if (!has_c) require(dcn, "dcn", false, kNoC), require(dc0, "dc0", false, kNoC);
  const Backward<T> call{p.problem<T>(),      y_.data<const T>(),   saved_.data<const T>(), states_.data<const T>(),
                         dy_.data<const T>(), dhn_.data<const T>(), dcn_.data<const T>(),   dx_.data<T>(),
                         dh0_.data<T>(),      dc0_.data<T>(),       dw_ih_.data<T>(),       dw_hh_.data<T>(),
                         db_ih_.data<T>(),    db_hh_.data<T>(),     scratch_.data<void>(),  check_threads(threads), ticks_of(ticks_)};
  const py::gil_scoped_release release;
  p.cell<T>().backward(call);
}

// The gradients that come in, for backends that do not go through run_backward
template <class T> void check_incoming(const LayerProblem& p, py::handle dy, py::handle dhn, py::handle dcn) {
  const Shapes<T> s{p};
  s.in(dy, "dy", {s.T_, s.N_, s.H_}), s.in(dhn, "dhn", {s.N_, s.H_});
  s.in(dcn, "dcn", {s.N_, s.H_});
  if (!p.kernels.info.has_c) require(dcn, "dcn", false, kNoC);
}

template <class T> void run_map(const Functions<T>& functions, const std::string& name, py::handle x, py::handle y) {
  const Array x_ = borrow<T>(x, "x", {{"elements", -1}}), y_ = borrow<T>(y, "y", {{"elements", x_.size(0)}}, true);
  const Map<T> map = name == "exp"       ? functions.exp
                     : name == "tanh"    ? functions.tanh
                     : name == "sigmoid" ? functions.sigmoid
                                         : nullptr;
  if (map == nullptr) throw py::value_error("function: expected one of exp, tanh, sigmoid; got '" + name + "'");
  const py::gil_scoped_release release;
  map(x_.data<T>(), y_.data<T>(), std::size_t(x_.size(0)));
}

py::object evaluate(const std::string& function, py::object x, const std::string& arch) {
  const ArchKernels& kernels = *find_arch(arch).kernels;
  const py::object y = py::module_::import("numpy").attr("empty_like")(x);
  const Array array = open(x, "x", "float32 or float64 (elements,), C-contiguous", false);
  array.is("d") ? run_map(kernels.f64, function, x, y) : run_map(kernels.f32, function, x, y);
  return y;
}

template <class T> double measure_fma(const Functions<T>& functions, double seconds) {
  using Clock = std::chrono::steady_clock;
  const std::size_t rounds = 200000;  // some milliseconds: the best of many is the rate without interruptions
  double best = 0;
  for (const auto start = Clock::now(); std::chrono::duration<double>(Clock::now() - start).count() < seconds;) {
    const auto before = Clock::now();
    volatile T sink = functions.fma_chains(rounds);
    (void)sink;
    const double taken = std::chrono::duration<double>(Clock::now() - before).count();
    best = std::max(best, double(rounds) * functions.flops_per_round / taken);
  }
  return best;
}

double fma_rate(const std::string& arch, const std::string& dtype, double seconds) {
  const ArchKernels& kernels = *find_arch(arch).kernels;
  if (dtype != "float32" && dtype != "float64")
    throw py::value_error("dtype: expected float32 or float64; got '" + dtype + "'");
  const py::gil_scoped_release release;
  return dtype == "float32" ? measure_fma(kernels.f32, seconds) : measure_fma(kernels.f64, seconds);
}

py::list list_archs() {
  py::list list;
  for (const Arch* arch = archs().begin; arch != archs().end; ++arch)
    list.append(py::make_tuple(arch->name, arch->runs_here()));
  return list;
}

// What built this module, and so the kernels
std::string compiler() {
#ifdef __clang__
  const char* name = "clang++";
  const int version[] = {__clang_major__, __clang_minor__, __clang_patchlevel__};
#else
  const char* name = "g++";
  const int version[] = {__GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__};
#endif
  return std::string(name) + " " + std::to_string(version[0]) + "." + std::to_string(version[1]) + "." +
         std::to_string(version[2]);
}

py::dict list_cells() {
  py::dict cells;
  const ArchKernels& any = *(archs().end - 1)->kernels;
  for (int i = 0; i < any.cell_count; ++i) {
    const CellInfo& c = any.cells[i].info;
    cells[c.name] =
        py::dict(py::arg("G") = c.G, py::arg("S") = c.S, py::arg("has_c") = c.has_c, py::arg("split") = c.split);
  }
  return cells;
}

}  // namespace
}  // namespace gatewise::binding

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace gatewise;
  using namespace gatewise::binding;
  m.doc() = "The compiled kernels behind gatewise.functional.";
  m.attr("archs") = list_archs();
  m.attr("cells") = list_cells();
  m.attr("compiler") = compiler();
  m.def("choose_arch", [] { return choose_arch().name; });
  m.def("evaluate", &evaluate, py::arg("function"), py::arg("x"), py::arg("arch"));

  m.def("fma_rate", &fma_rate, py::arg("arch"), py::arg("dtype"), py::arg("seconds"));

  py::class_<LayerProblem>(m, "Problem")
      .def(py::init<py::object, py::object, py::object, py::object, py::object, py::object, py::object, py::object,
                    py::object, py::object>(),
           py::arg("cell"), py::arg("x"), py::arg("w_ih"), py::arg("w_hh"), py::arg("b_ih"), py::arg("b_hh"),
           py::arg("h0"), py::arg("c0"), py::arg("lengths"), py::arg("reverse"))
      .def_property_readonly("cell", [](const LayerProblem& p) { return p.kernels.info.name; })
      .def_property_readonly("arch", [](const LayerProblem& p) { return p.arch.name; })
      .def_property_readonly("dtype", [](const LayerProblem& p) { return p.is_double ? "float64" : "float32"; })
      .def_property_readonly("T", [](const LayerProblem& p) { return p.dims.T; })
      .def_property_readonly("N", [](const LayerProblem& p) { return p.dims.N; })
      .def_property_readonly("I", [](const LayerProblem& p) { return p.dims.I; })
      .def_property_readonly("H", [](const LayerProblem& p) { return p.dims.H; })
      .def_property_readonly("G", [](const LayerProblem& p) { return p.kernels.info.G; })
      .def_property_readonly("S", [](const LayerProblem& p) { return p.kernels.info.S; })
      .def_property_readonly("has_c", [](const LayerProblem& p) { return p.kernels.info.has_c; })
      .def_property_readonly("lanes", &LayerProblem::lanes)
      .def_property_readonly("rows", &LayerProblem::count_rows)
      .def_property_readonly("sizes",
                             [](const LayerProblem& p) {
                               const Sizes s = p.sizes();
                               return py::make_tuple(s.saved, s.states, s.forward_scratch, s.backward_scratch);
                             })
      .def(
          "write_rows",
          [](const LayerProblem& p, py::handle rows) {
            const Array out = borrow<Index>(rows, "rows", {{"rows", p.count_rows()}}, true);
            p.typed([&](auto zero) { row_order(p.problem<decltype(zero)>(), out.data<Index>()); });
          },
          py::arg("rows"))
      .def(
          "check_incoming",
          [](const LayerProblem& p, py::handle dy, py::handle dhn, py::handle dcn) {
            p.typed([&](auto zero) { check_incoming<decltype(zero)>(p, dy, dhn, dcn); });
          },
          py::arg("dy"), py::arg("dhn"), py::arg("dcn"));

  m.def(
      "forward",
      [](const LayerProblem& p, py::handle y, py::handle hn, py::handle cn, py::handle saved, py::handle states,
         py::handle scratch, int threads, py::handle ticks) {
        p.typed([&](auto zero) { run_forward<decltype(zero)>(p, y, hn, cn, saved, states, scratch, threads, ticks); });
      },
      py::arg("problem"), py::arg("y"), py::arg("hn"), py::arg("cn"), py::arg("saved"), py::arg("states"),
      py::arg("scratch"), py::arg("threads"), py::arg("ticks") = py::none());

  m.def(
      "backward",
      [](const LayerProblem& p, py::handle y, py::handle saved, py::handle states, py::handle dy, py::handle dhn,
         py::handle dcn, py::handle dx, py::handle dh0, py::handle dc0, py::handle dw_ih, py::handle dw_hh,
         py::handle db_ih, py::handle db_hh, py::handle scratch, int threads, py::handle ticks) {
        p.typed([&](auto zero) {
          run_backward<decltype(zero)>(p, y, saved, states, dy, dhn, dcn, dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh,
                                       scratch, threads, ticks);
        });
      },
      py::arg("problem"), py::arg("y"), py::arg("saved"), py::arg("states"), py::arg("dy"), py::arg("dhn"),
      py::arg("dcn"), py::arg("dx"), py::arg("dh0"), py::arg("dc0"), py::arg("dw_ih"), py::arg("dw_hh"),
      py::arg("db_ih"), py::arg("db_hh"), py::arg("scratch"), py::arg("threads"), py::arg("ticks") = py::none());
}
