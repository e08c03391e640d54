// gatewise._cuda: the CUDA kernels as Python sees them, with the face of gatewise._core where both have one. Arrays lie
// on a device, but for lengths and batch_sizes, which steer launches and are the host's. A call checks everything
// first, then gives work to the caller's stream, and returns: nothing here waits for the device or allocates on it.
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "call.hpp"
#include "cuda/kernels.hpp"
#include "cuda_array.hpp"

namespace gatewise::binding { namespace {

constexpr int kLeastCapability = 75;  // CMakeLists.txt builds for no less

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

struct Devices {
  std::string unavailable;  // why no kernel can run here; empty: they can
  std::vector<std::string> names;
};

Devices find_devices() {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return {"no NVIDIA driver; the kernels need driver 580 or newer", {}};
  const cudaError_t error = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();
  if (error == cudaErrorInsufficientDriver)
    return {"the NVIDIA driver is too old: it knows CUDA " + version_text(driver) +
                ", and the kernels need driver 580 or newer, which knows CUDA 13",
            {}};
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) return {"no CUDA device", {}};
  if (error != cudaSuccess) return {cuda::Error(error, "cudaGetDeviceCount", __FILE__, __LINE__).what(), {}};
  Devices found;
  bool any = false;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    GATEWISE_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    const int capability = 10 * properties.major + properties.minor;
    found.names.push_back(std::string(properties.name) + " (sm_" + std::to_string(capability) + "), driver " +
                          version_text(driver));
    any = any || capability >= kLeastCapability;
  }
  if (!any) found.unavailable = found.names[0] + ": the kernels need compute capability 7.5 or higher";
  return found;
}

// What the plans look at, asked once of each device
cuda::DeviceLimits limits_of(int device) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<cuda::DeviceLimits>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= std::size_t(device)) known.resize(std::size_t(device) + 1);
  auto& limits = known[std::size_t(device)];
  if (!limits) limits = std::make_unique<cuda::DeviceLimits>(cuda::device_limits(device));
  return *limits;
}

// While it lives, the device is this thread's current one.
class Current {
 public:
  explicit Current(int device) : device_(device) {
    GATEWISE_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != device_) GATEWISE_CUDA_CHECK(cudaSetDevice(device_));
  }
  Current(const Current&) = delete;
  ~Current() {
    if (before_ != device_) (void)cudaSetDevice(before_);
  }

 private:
  int device_, before_ = 0;
};

void require_devices() {
  static const bool ready = [] {
    const std::string reason = find_devices().unavailable;
    if (!reason.empty()) throw std::runtime_error("cuda: " + reason);
    return true;
  }();
  (void)ready;
}

struct OnDevice {
  const cuda::Kernels& kernels;

  explicit OnDevice(py::handle cell) : kernels(find_cell(cuda::kernels().begin, cuda::kernels().end, cell)) {
    require_devices();
  }
};

class DeviceProblem : public OnDevice, public LayerInputs<Device> {
 public:
  cuda::Execution execution;
  Sizes sizes{};
  int device = 0;
  cudaStream_t stream;  // of the forward pass, on which the tape is ready

  template <class... Inputs>
  DeviceProblem(py::handle cell, std::uintptr_t stream, py::handle operands, py::handle loop, const Inputs&... inputs)
      : OnDevice(cell), LayerInputs(kernels.info, Device(), inputs...), stream(stream_of(stream)) {
    device = memory.number();
    if (device < 0) GATEWISE_CUDA_CHECK(cudaGetDevice(&device));
    execution.device = limits_of(device);
    static const cuda::Cublas* const cublas = cuda::find_cublas();
    execution.cublas = cublas;
    execution.operands = cuda::Operands(one_of(operands, "operands", {"exact", "tf32", "bf16"}));
    execution.loop = cuda::Loop(one_of(loop, "loop", {"planned", "persistent", "stepwise"}));
    if (10 * execution.device.major + execution.device.minor < kLeastCapability)
      fail("x", "an array on a device of compute capability 7.5 or higher",
           "one of " + std::to_string(execution.device.major) + "." + std::to_string(execution.device.minor));
    sizes = typed([&](auto zero) { return this->cell<decltype(zero)>().sizes(problem<decltype(zero)>(), execution); });
  }

  template <class T> const cuda::CellKernels<T>& cell() const {
    if constexpr (sizeof(T) == 4) return kernels.f32;
    else return kernels.f64;
  }
};

// A call's way onto its stream: after all that makes its arrays ready
class OnStream {
 public:
  const cudaStream_t stream;

  OnStream(const DeviceProblem& p, const Device& lent, std::uintptr_t number)
      : stream(stream_of(number)), current_(p.device), problem_(p) {
    follow(stream, p.stream);
    p.memory.make_wait(stream);
    lent.make_wait(stream);
  }
  // The tape may be freed on its stream when this call has been given to another one.
  void finish() const { follow(problem_.stream, stream); }

 private:
  Current current_;
  const DeviceProblem& problem_;
};

// Bytes for the kernels to write to
Array borrow_scratch(Device& memory, py::handle scratch, std::size_t bytes) {
  return borrow<std::uint8_t>(memory, scratch, "scratch", {{"bytes", py::ssize_t(bytes)}}, true);
}

template <class T> void forward(const DeviceProblem& p, py::handle y, py::handle hn, py::handle cn, py::handle saved,
                                py::handle states, py::handle scratch, std::uintptr_t stream) {
  Device memory(p.device);
  const ForwardArrays<T> arrays(p, memory, p.sizes, y, hn, cn, saved, states);
  const Array scratch_ = borrow_scratch(memory, scratch, p.sizes.forward_scratch);
  const OnStream on(p, memory, stream);
  const py::gil_scoped_release others_may_run;
  p.cell<T>().forward(arrays.call(p.problem<T>(), scratch_.data<void>(), 1), p.execution, on.stream);
  on.finish();
}

template <class T> void set_zero(const Array& array, Index n, cudaStream_t stream) {
  if (array.data<T>() && n > 0)
    GATEWISE_CUDA_CHECK(cudaMemsetAsync(array.data<T>(), 0, std::size_t(n) * sizeof(T), stream));
}

// fresh: the gradients of the weights hold no numbers yet; else they are added to
template <class T> void backward(const DeviceProblem& p, py::handle y, py::handle saved, py::handle states,
                                 py::handle dy, py::handle dhn, py::handle dcn, const GradientArrays& gradients,
                                 py::handle scratch, std::uintptr_t stream, bool fresh) {
  Device memory(p.device);
  const BackwardArrays<T> a(p, memory, p.sizes, y, saved, states, dy, dhn, dcn, gradients);
  const Array scratch_ = borrow_scratch(memory, scratch, p.sizes.backward_scratch);
  const OnStream on(p, memory, stream);
  const py::gil_scoped_release others_may_run;
  if (fresh) {
    const Index rows = p.info.G * p.dims.H;
    set_zero<T>(a.dw_ih, rows * p.dims.I, on.stream), set_zero<T>(a.dw_hh, rows * p.dims.R, on.stream);
    set_zero<T>(a.db_ih, rows, on.stream), set_zero<T>(a.db_hh, rows, on.stream);
    set_zero<T>(a.dw_unit, p.info.U * p.dims.H, on.stream), set_zero<T>(a.dw_hr, p.dims.R * p.dims.H, on.stream);
  }
  p.cell<T>().backward(a.call(p.problem<T>(), scratch_.data<void>(), 1), p.execution, on.stream);
  on.finish();
}

// `numbers` on the device to or from `host`, which has as many of the first of them as it holds; waits for the copy.
template <class T>
void copy(const DeviceProblem& p, py::handle numbers, py::handle host, std::uintptr_t stream, bool to_host) {
  Device memory(p.device);
  const Array there = memory.open(numbers, "numbers", {Element<T>::name, {{"numbers", -1}}, !to_host});
  const Array here = Host::open(host, "host", {Element<T>::name, {{"numbers", -1}}, to_host});
  const std::size_t bytes = std::size_t(here.count()) * sizeof(T);
  if (!there.is(Element<T>::formats) || !here.is(Element<T>::formats) || here.count() > there.count())
    fail("host",
         std::string(Element<T>::name) + " in the number of those on the device, " + std::to_string(there.count()) +
             ", or fewer",
         describe(host, here));
  const OnStream on(p, memory, stream);
  const py::gil_scoped_release others_may_run;
  void *const from = (to_host ? there : here).data<void>(), *const to = (to_host ? here : there).data<void>();
  GATEWISE_CUDA_CHECK(
      cudaMemcpyAsync(to, from, bytes, to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, on.stream));
  GATEWISE_CUDA_CHECK(cudaStreamSynchronize(on.stream));
}

// Elements of `saved` and `states` for one sequence of T steps
py::tuple sequence_sizes(py::handle cell, bool is_double, Index T, Index H, Index R, py::handle save) {
  const cuda::Kernels& kernels = find_cell(cuda::kernels().begin, cuda::kernels().end, cell);
  const auto ask = [&](auto zero, const auto& functions) {
    Problem<decltype(zero)> one{};
    one.dims = {T, 1, 1, H, R};
    if (R != H) one.weights.w_hr = &zero;
    one.save = save_of(save), one.checkpoint = checkpoint_of(one.save, T);
    const Sizes sizes = functions.sizes(one, cuda::Execution{});
    return py::make_tuple(sizes.saved, sizes.states);
  };
  return is_double ? ask(double(), kernels.f64) : ask(float(), kernels.f32);
}

// 16-bit numbers as float32, or float32 rounded to 16 bits; errors call `from` by the name of its argument.
void convert(const std::string& name, py::handle from, py::handle to, std::uintptr_t number) {
  require_devices();
  Device memory;
  const Axes any{{"...", -1}};
  const Array given = memory.open(from, name.c_str(), {"float16, bfloat16 or float32", any, false});
  const bool widens = !given.is("f");
  const Array made = memory.open(to, "to", {widens ? "float32" : "float16 or bfloat16", any, true});
  const Array &halves = widens ? given : made, &floats = widens ? made : given;
  if (!halves.is("eE")) fail(widens ? name.c_str() : "to", "float16 or bfloat16", describe(widens ? from : to, halves));
  if (!floats.is("f") || floats.count() != halves.count())
    fail("to", "as many numbers of the other width as " + describe(from, given), describe(to, made));
  const Index n = halves.count();
  if (n == 0) return;
  const Current current(memory.number());
  const cudaStream_t stream = stream_of(number);
  memory.make_wait(stream);
  const auto storage = halves.is("e") ? cuda::Storage::float16 : cuda::Storage::bfloat16;
  const py::gil_scoped_release others_may_run;
  if (widens) cuda::widen(storage, halves.data<void>(), n, floats.data<float>(), stream);
  else cuda::narrow(storage, floats.data<float>(), n, halves.data<void>(), stream);
}

}  // namespace
}  // namespace gatewise::binding

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  using namespace gatewise::binding;
  m.doc() = "The CUDA kernels behind gatewise.functional and gatewise.torch.";
  m.def("devices", [] {
    const Devices found = find_devices();
    return py::make_tuple(found.unavailable.empty() ? py::none() : py::object(py::str(found.unavailable)), found.names);
  });

  m.def("sequence_sizes", &sequence_sizes, py::arg("cell"), py::arg("float64"), py::arg("T"), py::arg("H"),
        py::arg("R"), py::arg("save"));

  py::class_<DeviceProblem> problem(m, "Problem", py::module_local());
  describe_problem(problem);
  problem
      .def(
          py::init([](py::handle cell, py::handle x, py::handle w_ih, py::handle w_hh, py::handle b_ih, py::handle b_hh,
                      py::handle h0, py::handle c0, py::handle lengths, py::handle reverse, py::handle extras,
                      py::handle tensors, std::uintptr_t stream, py::handle operands, py::handle loop) {
            const TensorsAreArrays scope(tensors);
            return std::make_unique<DeviceProblem>(cell, stream, operands, loop, x, w_ih, w_hh, b_ih, b_hh, h0, c0,
                                                   lengths, reverse, extras);
          }),
          py::arg("cell"), py::arg("x"), py::arg("w_ih"), py::arg("w_hh"), py::arg("b_ih"), py::arg("b_hh"),
          py::arg("h0"), py::arg("c0"), py::arg("lengths"), py::arg("reverse"), py::arg("extras"), py::arg("tensors"),
          py::arg("stream"), py::arg("operands") = py::none(), py::arg("loop") = py::none())
      .def_property_readonly("device", [](const DeviceProblem& p) { return p.device; });

  m.def(
      "forward",
      [](const DeviceProblem& p, py::handle y, py::handle hn, py::handle cn, py::handle saved, py::handle states,
         py::handle scratch, std::uintptr_t stream, py::handle tensors) {
        const TensorsAreArrays scope(tensors);
        p.typed([&](auto zero) { forward<decltype(zero)>(p, y, hn, cn, saved, states, scratch, stream); });
      },
      py::arg("problem"), py::arg("y"), py::arg("hn"), py::arg("cn"), py::arg("saved"), py::arg("states"),
      py::arg("scratch"), py::arg("stream"), py::arg("tensors") = py::none());
  m.def(
      "backward",
      [](const DeviceProblem& p, py::handle y, py::handle saved, py::handle states, py::handle dy, py::handle dhn,
         py::handle dcn, const GradientArrays& gradients, py::handle scratch, std::uintptr_t stream, bool fresh,
         py::handle tensors) {
        const TensorsAreArrays scope(tensors);
        p.typed([&](auto zero) {
          backward<decltype(zero)>(p, y, saved, states, dy, dhn, dcn, gradients, scratch, stream, fresh);
        });
      },
      py::arg("problem"), py::arg("y"), py::arg("saved"), py::arg("states"), py::arg("dy"), py::arg("dhn"),
      py::arg("dcn"), py::arg("gradients"), py::arg("scratch"), py::arg("stream"), py::arg("fresh") = false,
      py::arg("tensors") = py::none());
  m.def("convert", convert, py::arg("name"), py::arg("numbers"), py::arg("to"), py::arg("stream"));
  const auto copies = [&](const char* name, bool to_host, const char* first, const char* second) {
    m.def(
        name,
        [to_host](const DeviceProblem& p, py::handle from, py::handle to, std::uintptr_t stream) {
          p.typed(
              [&](auto zero) { copy<decltype(zero)>(p, to_host ? from : to, to_host ? to : from, stream, to_host); });
        },
        py::arg("problem"), py::arg(first), py::arg(second), py::arg("stream"));
  };
  copies("read", true, "numbers", "host"), copies("write", false, "host", "numbers");
}
