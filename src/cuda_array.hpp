// The door of a CUDA device's memory. Arrays come in by the CUDA array interface, versions 2 and 3
// (numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html), or as tensors, by DLPack. Whatever they say of
// themselves, where their memory is CUDA says.
#pragma once
#include <cstdint>
#include <vector>

#include "array.hpp"
#include "cuda/runtime.hpp"

namespace gatewise::binding {

// `stream` waits for all that has been given to `other`; the host does not.
inline void follow(cudaStream_t stream, cudaStream_t other) {
  if (stream == other) return;
  cudaEvent_t event;
  GATEWISE_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  const cudaError_t recorded = cudaEventRecord(event, other);
  const cudaError_t waits = recorded == cudaSuccess ? cudaStreamWaitEvent(stream, event, 0) : recorded;
  cudaEventDestroy(event);  // as soon as it is over
  cuda::check(waits, "cudaStreamWaitEvent(stream, event of another stream)", __FILE__, __LINE__);
}

// A stream as Python writes it. 1 is another name of the default stream, 0.
inline cudaStream_t stream_of(std::uintptr_t number) {
  return reinterpret_cast<cudaStream_t>(number == 1 ? 0 : number);
}

class Device {
 public:
  Device() = default;  // that of the first array that comes in
  explicit Device(int number) : number_(number) {}

  int number() const { return number_; }  // negative while no array has come in that has any memory

  // Opens the array without looking at its shape or type.
  Array open(py::handle object, const char* name, const Expected& expected) {
    DlTensor tensor;
    const bool capsule = DlTensor::read(object, tensor);
    Array array;
    const bool lent = capsule || TensorsAreArrays::read(object, tensor);
    if (lent) array = Array(tensor, py::reinterpret_borrow<py::object>(object));
    else array = read_interface(object, name, expected);
    if (lent && !capsule && !expected.writable && !lies_well(array, expected))  // as its own framework does
      return open(object.attr("contiguous")(), name, expected);
    check_memory(array, object, name, expected);
    check_device(array, object, name, expected);
    return array;
  }

  // `stream` waits for the streams that the arrays' owners said they are written on.
  void make_wait(cudaStream_t stream) const {
    for (const cudaStream_t writer : writers_) follow(stream, writer);
  }

 private:
  int number_ = -1;
  std::vector<cudaStream_t> writers_;

  Array read_interface(py::handle object, const char* name, const Expected& expected) {
    const char* attribute = "__cuda_array_interface__";
    const auto refuse = [&](const std::string& what) { fail(name, expected.text() + on_device(), what); };
    const std::string type = Py_TYPE(object.ptr())->tp_name;
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object.ptr(), attribute));
    if (!found) {
      const py::error_already_set error;
      if (error.matches(PyExc_AttributeError)) refuse(type + (object.is_none() ? "" : ", not on a CUDA device"));
      refuse(type + " that does not lend its memory: " + std::string(py::str(error.value())));
    }
    try {
      const py::dict interface = py::cast<py::dict>(found);
      const int version = py::cast<int>(interface["version"]);
      if (version < 2) refuse(type + " of version " + std::to_string(version) + " of the CUDA array interface");
      if (interface.contains("mask") && !interface["mask"].is_none())
        refuse("a masked array, whose mask would be ignored");
      return read(object, interface, refuse);
    } catch (const py::cast_error&) {
    } catch (const py::error_already_set&) {}
    refuse(type + " whose " + attribute + " is not that of version 2 or 3: " + std::string(py::repr(found)));
    return {};
  }

  template <class F> Array read(py::handle object, const py::dict& interface, const F& refuse) {
    const py::tuple shape = interface["shape"], data = interface["data"];
    const std::string typestr = py::cast<std::string>(interface["typestr"]);
    const std::string type = Py_TYPE(object.ptr())->tp_name;
    if (shape.size() > kAxes) refuse(type + " of shape " + std::string(py::str(shape)));
    py::ssize_t sizes[kAxes], strides[kAxes];
    DlTensor tensor{};
    tensor.ndim = int(shape.size()), tensor.shape = sizes, tensor.lanes = 1;
    read_type(typestr, tensor);
    for (std::size_t i = 0; i < shape.size(); ++i)
      if ((sizes[i] = py::cast<py::ssize_t>(shape[i])) < 0) refuse(type + " of shape " + std::string(py::str(shape)));
    if (interface.contains("strides") && !interface["strides"].is_none()) {
      const py::tuple bytes = interface["strides"];
      const py::ssize_t item = tensor.bits / 8;
      for (std::size_t i = 0; i < shape.size(); ++i) {
        strides[i] = py::cast<py::ssize_t>(bytes[i]);
        if (item == 0 || strides[i] % item != 0)
          refuse(type + " whose strides " + std::string(py::str(bytes)) + " are not whole numbers of elements");
        strides[i] /= item;
      }
      tensor.strides = strides;
    }
    tensor.data = reinterpret_cast<void*>(py::cast<std::uintptr_t>(data[0]));
    if (interface.contains("stream") && !interface["stream"].is_none()) {
      const auto stream = py::cast<std::uintptr_t>(interface["stream"]);
      if (stream == 0) refuse(type + " on stream 0, which the CUDA array interface does not allow: 1 is the default");
      if (std::find(writers_.begin(), writers_.end(), stream_of(stream)) == writers_.end())
        writers_.push_back(stream_of(stream));
    }
    return Array(tensor, py::reinterpret_borrow<py::object>(object), !py::cast<bool>(data[1]));
  }

  // "<f4" and the like, and "<V2", as PyTorch and ml_dtypes write bfloat16; what is no number in the machine's byte
  // order stays of no format of ours
  static void read_type(const std::string& typestr, DlTensor& tensor) {
    const std::size_t kind = typestr.size() < 3 ? std::string::npos : std::string("iufVcb").find(typestr[1]);
    if (kind == std::string::npos) return;
    constexpr std::uint8_t codes[] = {0, 1, 2, 3, 5, 6};
    tensor.code = codes[kind];
    tensor.bits = std::uint8_t(8 * std::min(std::atoi(typestr.c_str() + 2), 16));
    if (typestr[1] == 'V' && tensor.bits == 16) tensor.code = 4;
    if (typestr[0] == '>') tensor.lanes = 0;
  }

  void check_device(const Array& array, py::handle object, const char* name, const Expected& expected) {
    if (array.count() == 0) return;
    cudaPointerAttributes found{};
    GATEWISE_CUDA_CHECK(cudaPointerGetAttributes(&found, array.data<const void>()));
    const bool on_one = found.type == cudaMemoryTypeDevice, anywhere = found.type == cudaMemoryTypeManaged;
    if (!on_one && !anywhere)
      fail(name, expected.text() + on_device(), describe(object, array) + " in the CPU's memory, or freed");
    if (number_ < 0) number_ = found.device;
    if (on_one && found.device != number_)
      fail(name, expected.text() + on_device(),
           describe(object, array) + " on CUDA device " + std::to_string(found.device));
  }

  std::string on_device() const {
    return number_ < 0 ? ", on a CUDA device" : ", on CUDA device " + std::to_string(number_);
  }

  static constexpr std::size_t kAxes = Array::kShown;
};

}  // namespace gatewise::binding
