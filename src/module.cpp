// gatewise._core: the kernels as Python sees them. No mathematics and no policy: borrow every array, release the
// GIL, call. `forward` and `backward` write into arrays that are lent to them. `run_forward` and `run_backward`, a
// whole call each, make those arrays and lend them in turn: from Python that would cost more than a small layer does.
#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "packed.hpp"
#include "problem.hpp"
#include "stream.hpp"

namespace gatewise::binding { namespace {

const Arch& find_arch(const std::string& name) {
  std::string known;
  for (const Arch* arch = archs().begin; arch != archs().end; ++arch) {
    if (!arch->runs_here()) continue;
    if (arch->name == name) return *arch;
    known += (known.empty() ? "" : ", ") + std::string(arch->name);
  }
  throw py::value_error("arch: expected one of " + known + "; got '" + name + "'");
}

// Every array that a pass writes or reads besides the problem's, in the shapes of this problem
template <class T> struct Shapes {
  const LayerProblem& p;
  const Axis T_{"T", p.dims.T}, N_{"N", p.dims.N}, I_{"I", p.dims.I}, H_{"H", p.dims.H};
  const Axis G_{"H", p.kernels.info.G * p.dims.H, p.kernels.info.G};

  Array out(py::handle o, const char* name, const Axes& axes) const { return borrow_optional<T>(o, name, axes, true); }
  Array in(py::handle o, const char* name, const Axes& axes) const { return borrow_optional<T>(o, name, axes); }
  Array buffer(py::handle o, const char* name, std::size_t elements, bool writable) const {
    return borrow_optional<T>(o, name, {{"elements", py::ssize_t(elements)}}, writable);
  }
};

Array borrow_scratch(py::handle o, std::size_t bytes) {
  return borrow<std::uint8_t>(o, "scratch", {{"bytes", py::ssize_t(bytes)}}, true);
}

// Scratch that this thread keeps from call to call, for fresh memory costs a page fault every 4 KB. Who uses it has
// taken it out: a call within a call finds nothing, and makes its own.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : block_(std::exchange(kept(), {})) {
    if (block_.bytes >= bytes) return;
    block_ = {};  // first: not both at a time
    block_ = {std::unique_ptr<char[]>(new char[bytes]), bytes};
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (block_.bytes <= kMostKept) kept() = std::move(block_);
  }
  void* data() { return block_.memory.get(); }

 private:
  static constexpr std::size_t kMostKept = 32 << 20;  // where more is needed, page faults are a small part of the time
  struct Block {
    std::unique_ptr<char[]> memory;
    std::size_t bytes = 0;
  };
  static Block& kept() {
    thread_local Block block;
    return block;
  }
  Block block_;
};

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
// To count the cores is a system call: not for a call that is over sooner.
int threads_for(const LayerProblem& p, const Threads& threads) {
  return threads.asked == 0 && p.is_tiny() ? 1 : threads.count();
}

template <class T> void forward(const LayerProblem& p, py::handle y, py::handle hn, py::handle cn, py::handle saved,
                                py::handle states, void* scratch, int threads, py::handle ticks, PackedWeights* kept,
                                Index promise) {
  const Shapes<T> s{p};
  const bool has_c = p.kernels.info.has_c, keeps = !saved.is_none();
  const Array y_ = borrow<T>(y, "y", {s.T_, s.N_, s.H_}, true), hn_ = borrow<T>(hn, "hn", {s.N_, s.H_}, true),
              cn_ = s.out(cn, "cn", {s.N_, s.H_}), saved_ = s.buffer(saved, "saved", p.sizes.saved, true),
              states_ = s.buffer(states, "states", p.sizes.states, true), ticks_ = borrow_ticks(ticks);
  require(cn, "cn", has_c, kNoC);
  require(states, "states", has_c && keeps, keeps ? kNoC : kNoTape);
  Forward<T> call{p.problem<T>(),    y_.data<T>(), hn_.data<T>(), cn_.data<T>(), saved_.data<T>(),
                  states_.data<T>(), scratch,      threads,       nullptr,       ticks_of(ticks_)};
  const WhileComputing others_may_run(p.is_tiny());
  std::shared_ptr<const PackedWeights::Packed> packed;
  if (kept) packed = kept->of<T>(p, promise), call.packed = packed->packed.get();
  p.cell<T>().forward(call);
}

template <class T> void backward(const LayerProblem& p, py::handle y, py::handle saved, py::handle states,
                                 py::handle dy, py::handle dhn, py::handle dcn, py::handle dx, py::handle dh0,
                                 py::handle dc0, py::handle dw_ih, py::handle dw_hh, py::handle db_ih, py::handle db_hh,
                                 void* scratch, int threads, py::handle ticks) {
  const Shapes<T> s{p};
  const bool has_c = p.kernels.info.has_c;
  const Array y_ = borrow<T>(y, "y", {s.T_, s.N_, s.H_}), saved_ = s.buffer(saved, "saved", p.sizes.saved, false),
              states_ = s.buffer(states, "states", p.sizes.states, false), dy_ = s.in(dy, "dy", {s.T_, s.N_, s.H_}),
              dhn_ = s.in(dhn, "dhn", {s.N_, s.H_}), dcn_ = s.in(dcn, "dcn", {s.N_, s.H_}),
              dx_ = s.out(dx, "dx", {s.T_, s.N_, s.I_}), dh0_ = s.out(dh0, "dh0", {s.N_, s.H_}),
              dc0_ = s.out(dc0, "dc0", {s.N_, s.H_}), dw_ih_ = s.out(dw_ih, "dw_ih", {s.G_, s.I_}),
              dw_hh_ = s.out(dw_hh, "dw_hh", {s.G_, s.H_}), db_ih_ = s.out(db_ih, "db_ih", {s.G_}),
              db_hh_ = s.out(db_hh, "db_hh", {s.G_}), ticks_ = borrow_ticks(ticks);
  require(saved, "saved", true, kNoTape);
  require(states, "states", has_c, kNoC);
  if (!has_c) require(dcn, "dcn", false, kNoC), require(dc0, "dc0", false, kNoC);
  const Backward<T> call{p.problem<T>(),
                         y_.data<const T>(),
                         saved_.data<const T>(),
                         states_.data<const T>(),
                         dy_.data<const T>(),
                         dhn_.data<const T>(),
                         dcn_.data<const T>(),
                         dx_.data<T>(),
                         dh0_.data<T>(),
                         dc0_.data<T>(),
                         dw_ih_.data<T>(),
                         dw_hh_.data<T>(),
                         db_ih_.data<T>(),
                         db_hh_.data<T>(),
                         scratch,
                         threads,
                         ticks_of(ticks_)};
  const WhileComputing others_may_run(p.is_tiny());
  p.cell<T>().backward(call);
}

// (problem, y, hn, cn, saved, states): the last three None where there is none. packed: the layer's
// PackedWeights, or None
py::tuple run_forward(py::handle cell, py::handle x, py::handle w_ih, py::handle w_hh, py::handle b_ih, py::handle b_hh,
                      py::handle h0, py::handle c0, py::handle lengths, py::handle reverse, py::handle num_threads,
                      bool training, py::handle ticks, py::handle packed, Index promise) {
  // Not an argument of its own type: pybind11 would go through all arguments twice before it takes None for one.
  PackedWeights* const kept = packed.is_none() ? nullptr : packed.cast<PackedWeights*>();
  const Threads threads = choose_threads(num_threads);
  auto problem = std::make_unique<LayerProblem>(cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse);
  const LayerProblem& p = *problem;
  const auto [T, N, I, H] = p.dims;
  const bool has_c = p.kernels.info.has_c;
  const auto run = [&, T = T, N = N, H = H](auto zero) {
    using E = decltype(zero);
    const py::object y = empty<E>({T, N, H}), hn = empty<E>({N, H});
    const py::object cn = has_c ? empty<E>({N, H}) : py::none();
    const py::object saved = training ? empty<E>({py::ssize_t(p.sizes.saved)}) : py::none();
    const py::object states = training && has_c ? empty<E>({py::ssize_t(p.sizes.states)}) : py::none();
    Scratch scratch(p.sizes.forward_scratch);
    forward<E>(p, y, hn, cn, saved, states, scratch.data(), threads_for(p, threads), ticks,
               kept && PackedWeights::pays(p) ? kept : nullptr, promise);
    return py::make_tuple(py::cast(std::move(problem)), y, hn, cn, saved, states);
  };
  return p.typed(run);
}

// The gradients in the order of functional.Gradients: those whose names are in the set `wanted`, or all that the cell
// has if that is None; the others are None.
py::tuple run_backward(const LayerProblem& p, py::handle y, py::handle saved, py::handle states, py::handle dy,
                       py::handle dhn, py::handle dcn, py::handle wanted, py::handle num_threads, py::handle ticks) {
  const Threads threads = choose_threads(num_threads);
  const auto [T, N, I, H] = p.dims;
  const py::ssize_t rows = p.kernels.info.G * H;
  const bool has_c = p.kernels.info.has_c;
  const auto is_wanted = [&](const char* name) {
    return wanted.is_none() || PySequence_Contains(wanted.ptr(), py::str(name).ptr()) == 1;
  };
  const auto run = [&, T = T, N = N, I = I, H = H](auto zero) {
    using E = decltype(zero);
    using Shape = std::initializer_list<py::ssize_t>;
    const auto overwritten = [&](const char* name, Shape shape) {
      return is_wanted(name) ? empty<E>(shape) : py::none();
    };
    const auto added_to = [&](const char* name, Shape shape) {
      py::object array = overwritten(name, shape);
      if (!array.is_none()) {
        py::array numbers = py::reinterpret_borrow<py::array>(array);
        std::memset(numbers.mutable_data(), 0, std::size_t(numbers.nbytes()));
      }
      return array;
    };
    const py::object dx = overwritten("dx", {T, N, I}), dh0 = overwritten("dh0", {N, H});
    const py::object dc0 = has_c ? overwritten("dc0", {N, H}) : py::none();
    const py::object dw_ih = added_to("dw_ih", {rows, I}), dw_hh = added_to("dw_hh", {rows, H});
    const py::object db_ih = added_to("db_ih", {rows}), db_hh = added_to("db_hh", {rows});
    Scratch scratch(p.sizes.backward_scratch);
    backward<E>(p, y, saved, states, dy, dhn, dcn, dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, scratch.data(),
                threads_for(p, threads), ticks);
    return py::make_tuple(dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh);
  };
  return p.typed(run);
}

// The gradients that come in, for backends that do not go through backward
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
  const Array array = open(x, "x", {"float32 or float64", {{"elements", -1}}, false});
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
  m.def("available_cores", &available_cores);
  m.def(
      "choose_num_threads",
      [](py::handle num_threads) {
        const Threads threads = choose_threads(num_threads);
        return py::make_tuple(threads.count(), threads.source);
      },
      py::arg("num_threads"));
  m.def("environment", [](const char* name) { return std::getenv(name); }, py::arg("name"));
  m.def("evaluate", &evaluate, py::arg("function"), py::arg("x"), py::arg("arch"));

  m.def("fma_rate", &fma_rate, py::arg("arch"), py::arg("dtype"), py::arg("seconds"));

  py::class_<LayerProblem>(m, "Problem")
      .def(py::init<py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle,
                    py::handle, py::handle>(),
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
                               const Sizes& s = p.sizes;
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

  py::class_<PackedWeights>(m, "PackedWeights")
      .def(py::init<>())
      .def_property_readonly("count", &PackedWeights::count)
      .def(py::pickle([](const PackedWeights&) { return py::tuple(); },  // they are made again when they are needed
                      [](const py::tuple&) { return std::make_unique<PackedWeights>(); }));
  py::class_<Stream>(m, "Stream")
      .def(py::init([](py::sequence problems, py::handle num_threads) {
             std::vector<const LayerProblem*> layers;
             for (py::handle problem : problems) layers.push_back(&problem.cast<const LayerProblem&>());
             return std::make_unique<Stream>(layers, num_threads);
           }),
           py::arg("problems"), py::arg("num_threads"))
      .def("step", &Stream::step, "x [N, I] -> y [N, H], the same array every time; the next step overwrites it.")
      .def("copy_state", &Stream::state)
      .def("set_state", &Stream::reset);
  m.def("run_forward", &run_forward);
  m.def("run_backward", &run_backward);
  m.def(
      "forward",
      [](const LayerProblem& p, py::handle y, py::handle hn, py::handle cn, py::handle saved, py::handle states,
         py::handle scratch, int threads, py::handle ticks) {
        const Array lent = borrow_scratch(scratch, p.sizes.forward_scratch);
        check_threads(threads);
        p.typed([&](auto zero) {
          forward<decltype(zero)>(p, y, hn, cn, saved, states, lent.data<void>(), threads, ticks, nullptr, 0);
        });
      },
      py::arg("problem"), py::arg("y"), py::arg("hn"), py::arg("cn"), py::arg("saved"), py::arg("states"),
      py::arg("scratch"), py::arg("threads"), py::arg("ticks") = py::none());

  m.def(
      "backward",
      [](const LayerProblem& p, py::handle y, py::handle saved, py::handle states, py::handle dy, py::handle dhn,
         py::handle dcn, py::handle dx, py::handle dh0, py::handle dc0, py::handle dw_ih, py::handle dw_hh,
         py::handle db_ih, py::handle db_hh, py::handle scratch, int threads, py::handle ticks) {
        const Array lent = borrow_scratch(scratch, p.sizes.backward_scratch);
        check_threads(threads);
        p.typed([&](auto zero) {
          backward<decltype(zero)>(p, y, saved, states, dy, dhn, dcn, dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh,
                                   lent.data<void>(), threads, ticks);
        });
      },
      py::arg("problem"), py::arg("y"), py::arg("saved"), py::arg("states"), py::arg("dy"), py::arg("dhn"),
      py::arg("dcn"), py::arg("dx"), py::arg("dh0"), py::arg("dc0"), py::arg("dw_ih"), py::arg("dw_hh"),
      py::arg("db_ih"), py::arg("db_hh"), py::arg("scratch"), py::arg("threads"), py::arg("ticks") = py::none());
}
