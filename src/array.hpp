// The one door from Python arrays to pointers: borrow(). It checks everything about an array, once, and an error
// names the argument, what was expected and what came. Nothing is copied, nothing is cast. A sentence is only put
// together for an error: on the way through the door nothing is allocated. The door is that of a memory, the host's or
// a device's (cuda_array.hpp), which opens what lies in it.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>

namespace gatewise::binding {

namespace py = pybind11;

// One axis of an expected shape: its symbol, with a factor, and its size; any size will do where that is negative.
struct Axis {
  const char* symbol;
  py::ssize_t size;
  int factor = 1;
};
using Axes = std::initializer_list<Axis>;

template <class T> struct Element;
template <> struct Element<float> { static constexpr const char *name = "float32", *formats = "f"; };
template <> struct Element<double> { static constexpr const char *name = "float64", *formats = "d"; };
template <> struct Element<std::int64_t> { static constexpr const char *name = "int64", *formats = "lq"; };
template <> struct Element<std::uint64_t> { static constexpr const char *name = "uint64", *formats = "LQ"; };
template <> struct Element<std::uint8_t> { static constexpr const char *name = "uint8", *formats = "B"; };
template <> struct Element<bool> { static constexpr const char *name = "bool", *formats = "?"; };

// A framework's tensor, as DLPack describes it (github.com/dmlc/dlpack, dlpack.h: DLTensor, unchanged since its first
// version). One that tracks gradients would not lend a buffer: to its own framework's adapter it is lent so.
struct DlTensor {
  void* data;
  std::int32_t device_type, device_id;  // 1: the CPU
  std::int32_t ndim;
  std::uint8_t code, bits;  // of an element; 0 int, 1 uint, 2 float, 4 bfloat, 6 bool
  std::uint16_t lanes;
  py::ssize_t *shape, *strides;  // of 64 bits each; strides in elements, null if contiguous
  std::uint64_t byte_offset;

  static constexpr const char* kCapsule = "dltensor";  // begins with one, and keeps the tensor alive
  static constexpr std::int32_t kCpu = 1;

  static bool read(py::handle object, DlTensor& tensor) {
    if (!PyCapsule_IsValid(object.ptr(), kCapsule)) return false;
    tensor = *py::reinterpret_borrow<py::capsule>(object).get_pointer<DlTensor>();
    return true;
  }

  // The format of an element as NumPy writes it, bfloat16 as ml_dtypes does, '\0' if it is none of ours
  char format() const {
    if (lanes != 1) return '\0';
    switch (code * 256 + bits) {
      case 0x210:
        return 'e';
      case 0x410:
        return 'E';
      case 0x220:
        return 'f';
      case 0x240:
        return 'd';
      case 0x040:
        return 'q';
      case 0x140:
        return 'Q';
      case 0x108:
        return 'B';
      case 0x608:
        return '?';
      default:
        return '\0';
    }
  }
  static std::string type_text(int code, py::ssize_t bits) {
    constexpr const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    return code == 6 ? "bool" : (code < 6 ? kinds[code] : "type ") + std::to_string(bits);
  }
};
static_assert(sizeof(py::ssize_t) == 8, "DLPack's sizes are of 64 bits");

// While it lives, tensors of one framework are arrays for this thread. Not always: out of their own adapter's hands a
// tensor that tracks gradients must be refused, for it would lose them.
class TensorsAreArrays {
 public:
  // The framework's "dlpack_exchange_api" (DLPack 1.2), or None. Tensors to read need not be contiguous.
  explicit TensorsAreArrays(py::handle capsule) : before_(view()) {
    if (capsule.is_none()) return;
    const auto* api = static_cast<const Api*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    PyErr_Clear();
    while (api && api->major != 1) api = api->older;
    if (!api || !api->view)
      throw py::value_error("tensors: expected DLPack's exchange API, version 1; got " +
                            std::string(py::repr(capsule)));
    view() = api->view;
  }
  TensorsAreArrays(const TensorsAreArrays&) = delete;
  ~TensorsAreArrays() { view() = before_; }

  static bool read(py::handle object, DlTensor& tensor) {
    if (!view()) return false;
    if (view()(object.ptr(), &tensor) == 0) return true;
    PyErr_Clear();  // no tensor: said better at the door
    return false;
  }

 private:
  using View = int (*)(void* object, DlTensor* tensor);
  struct Api {
    std::uint32_t major, minor;
    const Api* older;
    void *allocate, *to_managed, *from_managed;
    View view;
  };
  static View& view() {
    thread_local View current = nullptr;
    return current;
  }
  View before_;
};

// A borrowed array: holding it keeps the memory where it is. NumPy's are read as they are, which is many times
// cheaper than the buffer protocol, through which everything else comes that is no DLPack capsule.
class Array {
 public:
  static constexpr int kShown = 4;  // axes that any argument has: copied, for the caller may reshape its array

  Array() = default;
  explicit Array(py::array array)
      : data_(const_cast<void*>(array.data())), ndim_(int(array.ndim())), flags_(array.flags()) {
    const py::dtype dtype = array.dtype();
    const char order = dtype.byteorder();
    format_ = order == '=' || order == '|' ? dtype.char_() : '\0';
    item_ = dtype.itemsize();
    keep_shape(array.shape(), array.strides());
    owner_ = std::move(array);
  }
  explicit Array(std::unique_ptr<Py_buffer> view) : data_(view->buf), ndim_(view->ndim), view_(view.release()) {
    using Flags = py::detail::npy_api;
    const char* format = view_->format ? view_->format : "B";
    format_ = std::strlen(format) == 1 ? *format : '\0';
    const std::uintptr_t item = std::uintptr_t(view_->itemsize ? view_->itemsize : 1);
    item_ = view_->itemsize;
    flags_ = (PyBuffer_IsContiguous(view_.get(), 'C') ? Flags::NPY_ARRAY_C_CONTIGUOUS_ : 0) |
             (reinterpret_cast<std::uintptr_t>(data_) % item == 0 ? Flags::NPY_ARRAY_ALIGNED_ : 0) |
             (view_->readonly ? 0 : Flags::NPY_ARRAY_WRITEABLE_);
    keep_shape(view_->shape, view_->strides);
  }
  Array(const DlTensor& tensor, py::object owner, bool writable = true)
      : data_(static_cast<char*>(tensor.data) + tensor.byte_offset), ndim_(tensor.ndim), item_(tensor.bits / 8),
        format_(tensor.format()), code_(tensor.code), owner_(std::move(owner)) {
    using Flags = py::detail::npy_api;
    py::ssize_t strides[kShown] = {}, dense = 1;
    bool contiguous = true;
    for (int i = ndim_ - 1; i >= 0; --i) {
      const py::ssize_t stride = tensor.strides ? tensor.strides[i] : dense;
      contiguous = contiguous && (tensor.shape[i] == 1 || stride == dense);
      dense *= tensor.shape[i];
      if (i < kShown) strides[i] = stride * item_;
    }
    const bool aligned = item_ == 0 || reinterpret_cast<std::uintptr_t>(data_) % std::uintptr_t(item_) == 0;
    flags_ = (contiguous || dense == 0 ? Flags::NPY_ARRAY_C_CONTIGUOUS_ : 0) |
             (aligned ? Flags::NPY_ARRAY_ALIGNED_ : 0) | (writable ? Flags::NPY_ARRAY_WRITEABLE_ : 0);
    keep_shape(tensor.shape, strides);
  }

  template <class T> T* data() const { return static_cast<T*>(data_); }
  int ndim() const { return ndim_; }
  py::ssize_t count() const {
    py::ssize_t product = 1;
    for (int i = 0; i < ndim_; ++i) product *= size(i);
    return product;
  }
  py::ssize_t size(int axis) const { return axis < kShown ? first_[axis] : shape_[axis]; }
  py::ssize_t stride(int axis) const { return strides_[axis]; }  // in bytes, of the first axes
  bool is(const char* formats) const { return format_ != '\0' && std::strchr(formats, format_) != nullptr; }
  bool contiguous() const { return flags_ & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_; }
  // Whole numbers of elements from row to row, and the numbers of a row side by side
  bool rows_contiguous() const {
    bool fits = ndim_ >= 1 && ndim_ <= kShown && item_ > 0 && (first_[ndim_ - 1] == 1 || strides_[ndim_ - 1] == item_);
    for (int i = 0; fits && i + 1 < ndim_; ++i) fits = strides_[i] % item_ == 0;
    return fits;
  }
  bool aligned() const { return flags_ & py::detail::npy_api::NPY_ARRAY_ALIGNED_; }
  bool writable() const { return flags_ & py::detail::npy_api::NPY_ARRAY_WRITEABLE_; }

  std::string shape_text() const {
    std::string text = "(";
    for (int i = 0; i < ndim_; ++i) text += (i ? ", " : "") + std::to_string(size(i));
    return text + (ndim_ == 1 ? ",)" : ")");
  }
  // Of an object that has no dtype to show
  std::string type_text() const {
    if (code_ >= 0) return DlTensor::type_text(code_, 8 * item_);
    return std::string("format '") + (view_ && view_->format ? view_->format : "B") + "'";
  }

 private:
  struct Release {
    void operator()(Py_buffer* view) const { PyBuffer_Release(view), delete view; }
  };
  void keep_shape(const py::ssize_t* shape, const py::ssize_t* strides) {
    shape_ = shape;
    std::copy(shape, shape + std::min(ndim_, kShown), first_);
    std::copy(strides, strides + std::min(ndim_, kShown), strides_);
  }

  void* data_ = nullptr;
  int ndim_ = 0, flags_ = 0;
  py::ssize_t item_ = 0;  // bytes of an element
  char format_ = '\0';    // of a single number in the machine's byte order, else 0
  int code_ = -1;         // DLPack's of an element, of tensors
  py::ssize_t first_[kShown] = {}, strides_[kShown] = {};
  const py::ssize_t* shape_ = nullptr;  // read only to describe an array that is refused
  py::object owner_;
  std::unique_ptr<Py_buffer, Release> view_;
};

// What an argument must be, for the sentence that says so
struct Expected {
  const char* type;
  const Axes& axes;
  bool writable;
  bool strided = false;  // any strides, but that of the last axis

  std::string text() const {
    std::string names = "(", sizes = "(";
    bool known = axes.size() > 0;
    for (const Axis& axis : axes) {
      const std::string separator = &axis == axes.begin() ? "" : ", ";
      names += separator + (axis.factor == 1 ? "" : std::to_string(axis.factor) + "*") + axis.symbol;
      sizes += separator + std::to_string(axis.size);
      known = known && axis.size >= 0;
    }
    const std::string close = axes.size() == 1 ? ",)" : ")";
    return std::string(type) + " " + names + close + (known ? " = " + sizes + close : "") +
           (strided ? ", last axis contiguous" : ", C-contiguous") + (writable ? ", writable" : "");
  }
};

inline std::string describe_type(py::handle object) {
  if (py::hasattr(object, "__cuda_array_interface__"))
    return std::string(Py_TYPE(object.ptr())->tp_name) +
           " on a CUDA device, not in the CPU's memory (x may be there, as an array of CuPy, Numba or PyTorch)";
  return Py_TYPE(object.ptr())->tp_name;
}

inline std::string describe(py::handle object, const Array& array) {
  const std::string type =
      py::hasattr(object, "dtype") ? std::string(py::str(object.attr("dtype"))) : array.type_text();
  return type + " " + array.shape_text();
}

[[noreturn]] inline void fail(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + "; got " + got);
}

inline bool lies_well(const Array& array, const Expected& expected) {
  return array.contiguous() || (expected.strided && array.rows_contiguous());
}
// Refuses an opened array that does not lie as it must.
inline void check_memory(const Array& array, py::handle object, const char* name, const Expected& expected) {
  const bool refused = expected.writable && !array.writable(), lies = lies_well(array, expected);
  if (lies && array.aligned() && !refused) return;
  fail(name, expected.text(),
       describe(object, array) +
           (lies               ? ""
            : expected.strided ? ", last axis not contiguous"
                               : ", not C-contiguous") +
           (array.aligned() ? "" : ", not aligned") + (refused ? ", read-only" : ""));
}

// The memory of the process: arrays of NumPy's, buffers, and tensors
struct Host {
  // Opens the array without looking at its shape or type.
  static Array open(py::handle object, const char* name, const Expected& expected) {
    const bool numpy = py::isinstance<py::array>(object);
    DlTensor tensor;
    const bool capsule = !numpy && DlTensor::read(object, tensor);
    const bool lent = capsule || (!numpy && TensorsAreArrays::read(object, tensor));
    if (!numpy && !lent && !PyObject_CheckBuffer(object.ptr())) fail(name, expected.text(), describe_type(object));
    if (std::strcmp(Py_TYPE(object.ptr())->tp_name, "MaskedArray") == 0)
      fail(name, expected.text(), "a masked array, whose mask would be ignored");
    Array array;
    if (numpy) {
      array = Array(py::reinterpret_borrow<py::array>(object));
    } else if (lent) {
      if (tensor.device_type != DlTensor::kCpu) fail(name, expected.text(), "a tensor on another device than the CPU");
      array = Array(tensor, py::reinterpret_borrow<py::object>(object));
    } else {
      auto view = std::make_unique<Py_buffer>();
      if (PyObject_GetBuffer(object.ptr(), view.get(), PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
        PyErr_Clear();
        fail(name, expected.text(), describe_type(object) + " that lends no buffer");
      }
      array = Array(std::move(view));
    }
    if (lent && !capsule && !expected.writable && !lies_well(array, expected))  // as its own framework does
      return open(object.attr("contiguous")(), name, expected);
    check_memory(array, object, name, expected);
    return array;
  }
};

// Checks type and shape of an opened array.
template <class T>
void check(const Array& array, py::handle object, const char* name, const Axes& axes, bool writable = false) {
  bool fits = array.is(Element<T>::formats) && array.ndim() == int(axes.size());
  for (int i = 0; fits && i < array.ndim(); ++i)
    fits = axes.begin()[i].size < 0 || array.size(i) == axes.begin()[i].size;
  if (!fits) fail(name, Expected{Element<T>::name, axes, writable}.text(), describe(object, array));
}

template <class T, class Memory>
Array borrow(Memory& memory, py::handle object, const char* name, const Axes& axes, bool writable = false) {
  Array array = memory.open(object, name, {Element<T>::name, axes, writable});
  check<T>(array, object, name, axes, writable);
  return array;
}
template <class T> Array borrow(py::handle object, const char* name, const Axes& axes, bool writable = false) {
  const Host host;
  return borrow<T>(host, object, name, axes, writable);
}

// None stands for an array that is absent: zeros coming in, not wanted going out.
template <class T, class Memory>
Array borrow_optional(Memory& memory, py::handle object, const char* name, const Axes& axes, bool writable = false) {
  return object.is_none() ? Array() : borrow<T>(memory, object, name, axes, writable);
}
template <class T> Array borrow_optional(py::handle object, const char* name, const Axes& axes, bool writable = false) {
  return object.is_none() ? Array() : borrow<T>(object, name, axes, writable);
}

// A fresh array of NumPy's, as np.empty makes it
template <class T> py::object empty(std::initializer_list<py::ssize_t> shape) {
  const auto& numpy = py::detail::npy_api::get();  // py::array's constructor would allocate shape and strides first
  py::object array = py::reinterpret_steal<py::object>(
      numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, py::dtype::of<T>().release().ptr(), int(shape.size()),
                                  shape.begin(), nullptr, nullptr, 0, nullptr));
  if (!array) throw py::error_already_set();
  return array;
}

}  // namespace gatewise::binding
