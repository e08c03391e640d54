// gatewise._core: the kernels as Python sees them. No mathematics and no policy: borrow every array, release the
// GIL, call. `forward` and `backward` write into arrays that are lent to them. `run_forward` and `run_backward`, a
// whole call each, make those arrays and lend them in turn: from Python that would cost more than a small layer does.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "call.hpp"
#include "gatewise/random.hpp"
#include "memory.hpp"
#include "packed.hpp"
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

// Scratch that this thread keeps from call to call, for fresh memory costs a page fault every 4 KB. Who uses it has
// taken it out: a call within a call finds nothing, and makes its own.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : block_(std::exchange(kept(), {})) {
    if (block_.bytes >= bytes) return;
    block_ = {};  // first: not both at a time
    block_ = {allocate(bytes), bytes};
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (block_.bytes <= kMostKept) kept() = std::move(block_);
  }
  void* data() const { return block_.memory.get(); }

 private:
  static constexpr std::size_t kMostKept = 128 << 20;  // where more is needed, fresh pages are a small part of the time
  struct Block {
    Memory memory;
    std::size_t bytes = 0;
  };
  static Block& kept() {
    thread_local Block block;
    return block;
  }
  Block block_;
};

// The caller's scratch, or this thread's where None came
class LentScratch {
 public:
  LentScratch(py::handle o, std::size_t bytes)
      : lent_(borrow_optional<std::uint8_t>(o, "scratch", {{"bytes", py::ssize_t(bytes)}}, true)) {
    if (o.is_none()) own_.emplace(bytes);
  }
  void* data() const { return own_ ? own_->data() : lent_.data<void>(); }

 private:
  Array lent_;
  std::optional<Scratch> own_;
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
  Host host;
  const ForwardArrays<T> arrays(p, host, p.sizes, y, hn, cn, saved, states);
  const Array ticks_ = borrow_ticks(ticks);
  Forward<T> call = arrays.call(p.problem<T>(), scratch, threads);
  call.ticks = ticks_of(ticks_);
  const WhileComputing others_may_run(p.is_tiny());
  std::shared_ptr<const PackedWeights::Packed> packed;
  if (kept && PackedWeights::pays(p, promise)) packed = kept->of<T>(p, promise), call.packed = packed->packed.get();
  if (kept) call.from_the_last = kept->turn();
  p.cell<T>().forward(call);
}

template <class T> void backward(const LayerProblem& p, py::handle y, py::handle saved, py::handle states,
                                 py::handle dy, py::handle dhn, py::handle dcn, const GradientArrays& out,
                                 void* scratch, int threads, py::handle ticks) {
  Host host;
  const BackwardArrays<T> arrays(p, host, p.sizes, y, saved, states, dy, dhn, dcn, out);
  const Array ticks_ = borrow_ticks(ticks);
  Backward<T> call = arrays.call(p.problem<T>(), scratch, threads);
  call.ticks = ticks_of(ticks_);
  const WhileComputing others_may_run(p.is_tiny());
  p.cell<T>().backward(call);
}

// An array with a row of `last` numbers for every step of every sequence
template <class T> py::object empty_steps(const LayerProblem& p, Index last) {
  const auto [Ts, N, I, H, R] = p.dims;
  if (p.layout == Layout::packed) return empty<T>({p.count_rows(), last});
  return p.layout == Layout::batch_major ? empty<T>({N, Ts, last}) : empty<T>({Ts, N, last});
}

// (problem, y, hn, cn, saved, states): the last three None where there is none. packed: the layer's
// PackedWeights, or None
py::tuple run_forward(py::handle cell, py::handle x, py::handle w_ih, py::handle w_hh, py::handle b_ih, py::handle b_hh,
                      py::handle h0, py::handle c0, py::handle lengths, py::handle reverse, py::handle num_threads,
                      bool training, py::handle ticks, py::handle packed, Index promise, py::handle extras) {
  // Not an argument of its own type: pybind11 would go through all arguments twice before it takes None for one.
  PackedWeights* const kept = packed.is_none() ? nullptr : packed.cast<PackedWeights*>();
  const Threads threads = choose_threads(num_threads);
  auto problem = std::make_unique<LayerProblem>(cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras);
  const LayerProblem& p = *problem;
  const Kept tape(p, training);
  const auto run = [&](auto zero) {
    using E = decltype(zero);
    const auto [Ts, N, I, H, R] = p.dims;
    const py::object y = empty_steps<E>(p, R), hn = empty<E>({N, R});
    const py::object cn = p.info.has_c ? empty<E>({N, H}) : py::none();
    const py::object saved = tape.saved ? empty<E>({py::ssize_t(p.sizes.saved)}) : py::none();
    const py::object states = tape.states ? empty<E>({py::ssize_t(p.sizes.states)}) : py::none();
    Scratch scratch(p.sizes.forward_scratch);
    forward<E>(p, y, hn, cn, saved, states, scratch.data(), threads_for(p, threads), ticks, kept, promise);
    return py::make_tuple(py::cast(std::move(problem)), y, hn, cn, saved, states);
  };
  return p.typed(run);
}

// The gradients whose names are in the set `wanted`, or all that the problem has if that is None; the others are None.
py::tuple run_backward(const LayerProblem& p, py::handle y, py::handle saved, py::handle states, py::handle dy,
                       py::handle dhn, py::handle dcn, py::handle wanted, py::handle num_threads, py::handle ticks) {
  const Threads threads = choose_threads(num_threads);
  const auto run = [&](auto zero) {
    using E = decltype(zero);
    const auto [Ts, N, I, H, R] = p.dims;
    const py::ssize_t rows = p.info.G * H, own = p.info.U * H;
    GradientArrays out;
    for (std::size_t i = 0; i < kGradientCount; ++i) {
      const bool is_wanted = wanted.is_none() || PySequence_Contains(wanted.ptr(), py::str(kGradients[i]).ptr()) == 1;
      if (!is_wanted || has_no(p, i)) {
        out[i] = py::none();
        continue;
      }
      switch (i) {
        case kDx:
          out[i] = empty_steps<E>(p, I);
          break;
        case kDh0:
          out[i] = empty<E>({N, R});
          break;
        case kDc0:
          out[i] = empty<E>({N, H});
          break;
        case kDw_ih:
          out[i] = empty<E>({rows, I});
          break;
        case kDw_hh:
          out[i] = empty<E>({rows, R});
          break;
        case kDb_ih:
        case kDb_hh:
          out[i] = empty<E>({rows});
          break;
        case kDw_unit:
          out[i] = empty<E>({own});
          break;
        default:  // kDw_hr
          out[i] = empty<E>({R, H});
      }
      if (i < kDw_ih) continue;  // overwritten; the weights' are added to
      py::array numbers = py::reinterpret_borrow<py::array>(out[i]);
      std::memset(numbers.mutable_data(), 0, std::size_t(numbers.nbytes()));
    }
    Scratch scratch(p.sizes.backward_scratch);
    backward<E>(p, y, saved, states, dy, dhn, dcn, out, scratch.data(), threads_for(p, threads), ticks);
    return py::make_tuple(out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8]);
  };
  return p.typed(run);
}

// The gradients that come in, for backends that do not go through backward
template <class T> void check_incoming(const LayerProblem& p, py::handle dy, py::handle dhn, py::handle dcn) {
  Host host;
  const Shapes<T, Host> s{p, host};
  s.steps(dy, "dy", s.R_, false), s.in(dhn, "dhn", {s.N_, s.R_});
  s.in(dcn, "dcn", {s.N_, s.H_});
  if (!p.info.has_c) require(dcn, "dcn", false, kNoC);
}

// x with every number zeroed with probability p, the others divided by 1 - p: in the layouts of a layer's x. The mask
// is a function of seed, step, sequence and number; with `same` every step has that of step 0.
template <class T> py::object drop_out(const Array& x, double p, std::uint64_t seed, bool same, bool batch_first,
                                       const std::vector<Index>& batch_sizes) {
  const bool packed = x.ndim() == 2;
  const Index width = x.size(x.ndim() - 1), steps = packed ? Index(batch_sizes.size()) : x.size(batch_first);
  const Index item = sizeof(T), N = packed ? 0 : x.size(!batch_first);
  const Index step = x.stride(packed ? 0 : batch_first) / item, sequence = x.stride(packed ? 0 : !batch_first) / item;
  const py::object result = packed        ? empty<T>({x.size(0), width})
                            : batch_first ? empty<T>({N, steps, width})
                                          : empty<T>({steps, N, width});
  T* out = static_cast<T*>(py::reinterpret_borrow<py::array>(result).mutable_data());
  const ArchKernels& kernels = *choose_arch().kernels;
  const py::gil_scoped_release release;
  const auto drop = [&](const T* from, T* to, Index t, Index n) {
    const std::uint64_t key = random_key(seed, same ? 0 : t, n);
    if constexpr (sizeof(T) == 4) kernels.f32.dropout(from, to, width, key, p);
    else kernels.f64.dropout(from, to, width, key, p);
  };
  const T* from = x.data<const T>();
  Index row = 0;
  for (Index t = 0; t < steps; ++t)
    for (Index n = 0; n < (packed ? batch_sizes[std::size_t(t)] : N); ++n, ++row) {
      const Index place = packed ? row : batch_first ? n * steps + t : row;
      drop(from + (packed ? row * step : t * step + n * sequence), out + place * width, t, n);
    }
  return result;
}

py::object dropout(py::handle x, py::handle p, py::handle seed, py::handle same, py::handle batch_first,
                   py::handle batch_sizes) {
  const double probability = real_number(p, "p", "a probability in [0, 1)", 0, 1, true);
  const std::uint64_t number = whole_seed(seed);
  const bool same_mask = truth(same, "same_at_every_step"), by_batch = truth(batch_first, "batch_first");
  const Axes axes[] = {{{"T", -1}, {"N", -1}, {"width", -1}}, {{"rows", -1}, {"width", -1}}};
  const Axes& expected = axes[!batch_sizes.is_none()];
  std::vector<Index> sizes;
  const Array array = Host::open(x, "x", {"float32 or float64", expected, false, true});
  array.is("d") ? check<double>(array, x, "x", expected) : check<float>(array, x, "x", expected);
  if (!batch_sizes.is_none()) {
    sizes = read_batch_sizes(batch_sizes);
    check_rows(sizes, array.size(0));
  }
  return array.is("d") ? drop_out<double>(array, probability, number, same_mask, by_batch, sizes)
                       : drop_out<float>(array, probability, number, same_mask, by_batch, sizes);
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
  const Array array = Host::open(x, "x", {"float32 or float64", {{"elements", -1}}, false});
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
    cells[c.name] = py::dict(py::arg("G") = c.G, py::arg("S") = c.S, py::arg("U") = c.U, py::arg("has_c") = c.has_c,
                             py::arg("split") = c.split, py::arg("product") = c.has_product,
                             py::arg("normed") = c.normed, py::arg("middle") = c.middle);
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
  m.attr("no_cuda") = GATEWISE_NO_CUDA;
  m.def("choose_arch", [] { return choose_arch().name; });
  m.def("available_cores", &available_cores);
  m.def("share_openmp", &share_openmp);
  m.def(
      "choose_num_threads",
      [](py::handle num_threads) {
        const Threads threads = choose_threads(num_threads);
        return py::make_tuple(threads.count(), threads.source);
      },
      py::arg("num_threads"));
  m.def("environment", [](const char* name) { return std::getenv(name); }, py::arg("name"));
  m.def("evaluate", &evaluate, py::arg("function"), py::arg("x"), py::arg("arch"));

  m.def("dropout", &dropout, py::arg("x"), py::arg("p"), py::arg("seed"), py::arg("same_at_every_step") = false,
        py::arg("batch_first") = false, py::arg("batch_sizes") = py::none());
  m.def("mix64", [](std::uint64_t z) { return mix64(z); }, py::arg("z"));
  m.def("fma_rate", &fma_rate, py::arg("arch"), py::arg("dtype"), py::arg("seconds"));

  py::class_<LayerProblem> problem(m, "Problem");
  describe_problem(problem);
  problem
      .def(py::init([](py::handle cell, py::handle x, py::handle w_ih, py::handle w_hh, py::handle b_ih,
                       py::handle b_hh, py::handle h0, py::handle c0, py::handle lengths, py::handle reverse,
                       py::handle extras, py::handle tensors) {
             const TensorsAreArrays scope(tensors);
             return std::make_unique<LayerProblem>(cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras);
           }),
           py::arg("cell"), py::arg("x"), py::arg("w_ih"), py::arg("w_hh"), py::arg("b_ih"), py::arg("b_hh"),
           py::arg("h0"), py::arg("c0"), py::arg("lengths"), py::arg("reverse"), py::arg("extras") = py::none(),
           py::arg("tensors") = py::none())
      .def_property_readonly("arch", [](const LayerProblem& p) { return p.arch.name; })
      .def_property_readonly("lanes", &LayerProblem::lanes)
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
         py::handle scratch, int threads, py::handle ticks, py::handle packed, py::handle tensors) {
        const TensorsAreArrays scope(tensors);
        check_threads(threads);
        const LentScratch lent(scratch, p.sizes.forward_scratch);
        PackedWeights* const kept = packed.is_none() ? nullptr : packed.cast<PackedWeights*>();
        p.typed([&](auto zero) {
          forward<decltype(zero)>(p, y, hn, cn, saved, states, lent.data(), threads, ticks, kept, 0);
        });
      },
      py::arg("problem"), py::arg("y"), py::arg("hn"), py::arg("cn"), py::arg("saved"), py::arg("states"),
      py::arg("scratch"), py::arg("threads"), py::arg("ticks") = py::none(), py::arg("packed") = py::none(),
      py::arg("tensors") = py::none());

  m.def(
      "backward",
      [](const LayerProblem& p, py::handle y, py::handle saved, py::handle states, py::handle dy, py::handle dhn,
         py::handle dcn, const GradientArrays& gradients, py::handle scratch, int threads, py::handle ticks,
         py::handle tensors) {
        const TensorsAreArrays scope(tensors);
        check_threads(threads);
        const LentScratch lent(scratch, p.sizes.backward_scratch);
        p.typed([&](auto zero) {
          backward<decltype(zero)>(p, y, saved, states, dy, dhn, dcn, gradients, lent.data(), threads, ticks);
        });
      },
      py::arg("problem"), py::arg("y"), py::arg("saved"), py::arg("states"), py::arg("dy"), py::arg("dhn"),
      py::arg("dcn"), py::arg("gradients"), py::arg("scratch"), py::arg("threads"), py::arg("ticks") = py::none(),
      py::arg("tensors") = py::none());
}
