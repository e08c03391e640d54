// The one door from Python arrays to pointers: borrow(). It checks everything about an array, once, and an error
// names the argument, what was expected and what came. Nothing is copied, nothing is cast.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>

namespace gatewise::binding {

namespace py = pybind11;

// One axis of an expected shape: its symbol and its size; any size will do where that is negative.
struct Axis {
  std::string name;
  py::ssize_t size;
};
using Axes = std::initializer_list<Axis>;

template <class T> struct Element;
template <> struct Element<float> { static constexpr const char *name = "float32", *formats = "f"; };
template <> struct Element<double> { static constexpr const char *name = "float64", *formats = "d"; };
template <> struct Element<std::int64_t> { static constexpr const char *name = "int64", *formats = "lq"; };
template <> struct Element<std::uint64_t> { static constexpr const char *name = "uint64", *formats = "LQ"; };
template <> struct Element<std::uint8_t> { static constexpr const char *name = "uint8", *formats = "B"; };

// A borrowed array: holding it keeps the memory where it is. The view itself must not move either, for its shape
// may point into it.
class Array {
 public:
  Array() = default;
  explicit Array(std::unique_ptr<Py_buffer> view) : view_(view.release()) {}

  template <class T> T* data() const { return view_ ? static_cast<T*>(view_->buf) : nullptr; }
  py::ssize_t size(int axis) const { return view_->shape[axis]; }
  bool is(const char* formats) const {
    const std::string format = view_->format ? view_->format : "B";
    return format.size() == 1 && std::string(formats).find(format) != std::string::npos;
  }
  const Py_buffer& view() const { return *view_; }

 private:
  struct Release {
    void operator()(Py_buffer* view) const { PyBuffer_Release(view), delete view; }
  };
  std::unique_ptr<Py_buffer, Release> view_;
};

inline std::string join(const Py_buffer& view) {
  std::string text = "(";
  for (int i = 0; i < view.ndim; ++i) text += (i ? ", " : "") + std::to_string(view.shape[i]);
  return text + (view.ndim == 1 ? ",)" : ")");
}

inline std::string describe(const Axes& axes) {
  std::string names = "(", sizes = "(";
  bool known = axes.size() > 0;
  for (const Axis& axis : axes) {
    const std::string separator = &axis == axes.begin() ? "" : ", ";
    names += separator + axis.name, sizes += separator + std::to_string(axis.size);
    known = known && axis.size >= 0;
  }
  const std::string close = axes.size() == 1 ? ",)" : ")";
  return names + close + (known ? " = " + sizes + close : "");
}

inline std::string describe_type(py::handle object) {
  if (py::hasattr(object, "__cuda_array_interface__"))
    return std::string(Py_TYPE(object.ptr())->tp_name) +
           " on a CUDA device (no CUDA backend is built; copy it to the CPU first)";
  return Py_TYPE(object.ptr())->tp_name;
}

inline std::string describe_dtype(py::handle object, const Py_buffer& view) {
  if (py::hasattr(object, "dtype")) {
    const std::string name = py::str(object.attr("dtype"));
    return name;
  }
  return std::string("format '") + (view.format ? view.format : "B") + "'";
}

[[noreturn]] inline void fail(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + "; got " + got);
}

// Opens the array without looking at its shape or type; `expected` is what an error will ask for.
inline Array open(py::handle object, const char* name, const std::string& expected, bool writable) {
  if (!PyObject_CheckBuffer(object.ptr())) fail(name, expected, describe_type(object));
  if (std::strcmp(Py_TYPE(object.ptr())->tp_name, "MaskedArray") == 0)
    fail(name, expected, "a masked array, whose mask would be ignored");
  auto opened = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(object.ptr(), opened.get(), PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    fail(name, expected, describe_type(object) + " that lends no buffer");
  }
  Array array(std::move(opened));
  const Py_buffer& view = array.view();
  const bool contiguous = PyBuffer_IsContiguous(&view, 'C'),
             aligned =
                 reinterpret_cast<std::uintptr_t>(view.buf) % std::uintptr_t(view.itemsize ? view.itemsize : 1) == 0;
  if (contiguous && aligned && !(writable && view.readonly)) return array;
  fail(name, expected,
       describe_dtype(object, view) + " " + join(view) + (contiguous ? "" : ", not C-contiguous") +
           (aligned ? "" : ", not aligned") + (writable && view.readonly ? ", read-only" : ""));
}

template <class T> Array borrow(py::handle object, const char* name, const Axes& axes, bool writable = false) {
  const std::string expected =
      std::string(Element<T>::name) + " " + describe(axes) + ", C-contiguous" + (writable ? ", writable" : "");
  Array array = open(object, name, expected, writable);
  const Py_buffer& view = array.view();
  bool fits = array.is(Element<T>::formats) && view.ndim == int(axes.size());
  for (int i = 0; fits && i < view.ndim; ++i) fits = axes.begin()[i].size < 0 || view.shape[i] == axes.begin()[i].size;
  if (!fits) fail(name, expected, describe_dtype(object, view) + " " + join(view));
  return array;
}

// None stands for an array that is absent: zeros coming in, not wanted going out.
template <class T> Array borrow_optional(py::handle object, const char* name, const Axes& axes, bool writable = false) {
  return object.is_none() ? Array() : borrow<T>(object, name, axes, writable);
}

}  // namespace gatewise::binding
