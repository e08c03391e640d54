// What a call lends beside its problem: outputs, tape and gradients, each checked against the shapes of the problem.
#pragma once
#include <array>

#include "problem.hpp"

namespace gatewise::binding {

// Every array that a pass writes or reads besides the problem's, in the shapes of this problem
template <class T, class Memory> struct Shapes {
  const LayerInputs<Memory>& p;
  Memory& memory;
  const Axis N_{"N", p.dims.N}, I_{"I", p.dims.I}, H_{"H", p.dims.H}, R_{p.projects() ? "R" : "H", p.dims.R};
  const Axis G_{"H", p.info.G * p.dims.H, p.info.G};
  const Axis U_{"H", p.info.U * p.dims.H, p.info.U};

  Array out(py::handle o, const char* name, const Axes& axes) const {
    return borrow_optional<T>(memory, o, name, axes, true);
  }
  Array in(py::handle o, const char* name, const Axes& axes) const { return borrow_optional<T>(memory, o, name, axes); }
  // With a row for every step of every sequence
  Array steps(py::handle o, const char* name, const Axis& last, bool writable) const {
    return p.with_step_axes(last,
                            [&](const Axes& axes) { return borrow_optional<T>(memory, o, name, axes, writable); });
  }
  Array buffer(py::handle o, const char* name, std::size_t elements, bool writable) const {
    return borrow_optional<T>(memory, o, name, {{"elements", py::ssize_t(elements)}}, writable);
  }
};

// Which parts of the tape there are for backward
struct Kept {
  bool saved, states;
  template <class Memory> explicit Kept(const LayerInputs<Memory>& p, bool tape = true)
      : saved(tape && p.save() == Save::all), states(tape && p.info.has_c) {}
};

template <class T> struct ForwardArrays {
  Array y, hn, cn, saved, states;

  template <class Memory> ForwardArrays(const LayerInputs<Memory>& p, Memory& memory, const Sizes& sizes, py::handle y_,
                                        py::handle hn_, py::handle cn_, py::handle saved_, py::handle states_) {
    const Shapes<T, Memory> s{p, memory};
    const bool has_c = p.info.has_c;
    require(y_, "y", true, ""), require(hn_, "hn", true, "");
    y = s.steps(y_, "y", s.R_, true), hn = s.out(hn_, "hn", {s.N_, s.R_}), cn = s.out(cn_, "cn", {s.N_, s.H_});
    saved = s.buffer(saved_, "saved", sizes.saved, true), states = s.buffer(states_, "states", sizes.states, true);
    require(cn_, "cn", has_c, kNoC);
    if (p.save() != Save::all) require(saved_, "saved", false, kNotKept);
    if (!has_c) require(states_, "states", false, kNoC);
    else if (p.save() == Save::all) require(states_, "states", !saved_.is_none(), kNoTape);
  }

  Forward<T> call(const Problem<T>& problem, void* scratch, int threads) const {
    return {problem, y.data<T>(), hn.data<T>(), cn.data<T>(), saved.data<T>(), states.data<T>(), scratch, threads};
  }
};

// The gradients, in the order of functional.Gradients
enum Gradient : std::size_t { kDx, kDh0, kDc0, kDw_ih, kDw_hh, kDb_ih, kDb_hh, kDw_unit, kDw_hr, kGradientCount };
constexpr const char* kGradients[] = {"dx", "dh0", "dc0", "dw_ih", "dw_hh", "db_ih", "db_hh", "dw_unit", "dw_hr"};
using GradientArrays = std::array<py::object, kGradientCount>;

// Why the problem has no such thing, or null if it has
template <class Memory> const char* has_no(const LayerInputs<Memory>& p, std::size_t gradient) {
  switch (gradient) {
    case kDc0:
      return p.info.has_c ? nullptr : kNoC;
    case kDw_hh:
      return p.info.has_product ? nullptr : kNoProduct;
    case kDb_ih:
    case kDb_hh:
      return p.info.normed ? kInUnit : nullptr;
    case kDw_unit:
      return p.info.U ? nullptr : kNoUnit;
    case kDw_hr:
      return p.projects() ? nullptr : kNoProjection;
    default:
      return nullptr;
  }
}

template <class T> struct BackwardArrays {
  Array y, saved, states, dy, dhn, dcn, dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_unit, dw_hr;

  template <class Memory> BackwardArrays(const LayerInputs<Memory>& p, Memory& memory, const Sizes& sizes,
                                         py::handle y_, py::handle saved_, py::handle states_, py::handle dy_,
                                         py::handle dhn_, py::handle dcn_, const GradientArrays& out) {
    const Shapes<T, Memory> s{p, memory};
    const Kept kept(p);
    require(y_, "y", true, "");
    y = s.steps(y_, "y", s.R_, false), saved = s.buffer(saved_, "saved", sizes.saved, false);
    states = s.buffer(states_, "states", sizes.states, false), dy = s.steps(dy_, "dy", s.R_, false);
    dhn = s.in(dhn_, "dhn", {s.N_, s.R_}), dcn = s.in(dcn_, "dcn", {s.N_, s.H_});
    dx = s.steps(out[kDx], "dx", s.I_, true), dh0 = s.out(out[kDh0], "dh0", {s.N_, s.R_});
    dc0 = s.out(out[kDc0], "dc0", {s.N_, s.H_}), dw_ih = s.out(out[kDw_ih], "dw_ih", {s.G_, s.I_});
    dw_hh = s.out(out[kDw_hh], "dw_hh", {s.G_, s.R_}), db_ih = s.out(out[kDb_ih], "db_ih", {s.G_});
    db_hh = s.out(out[kDb_hh], "db_hh", {s.G_}), dw_unit = s.out(out[kDw_unit], "dw_unit", {s.U_});
    dw_hr = s.out(out[kDw_hr], "dw_hr", {s.R_, s.H_});
    require(saved_, "saved", kept.saved, kNotKept);
    require(states_, "states", kept.states, kNoC);
    if (!p.info.has_c) require(dcn_, "dcn", false, kNoC);
    for (std::size_t i = 0; i < kGradientCount; ++i)
      if (const char* reason = has_no(p, i)) require(out[i], kGradients[i], false, reason);
  }

  Backward<T> call(const Problem<T>& problem, void* scratch, int threads) const {
    return {problem,
            y.data<const T>(),
            saved.data<const T>(),
            states.data<const T>(),
            dy.data<const T>(),
            dhn.data<const T>(),
            dcn.data<const T>(),
            dx.data<T>(),
            dh0.data<T>(),
            dc0.data<T>(),
            dw_ih.data<T>(),
            dw_hh.data<T>(),
            db_ih.data<T>(),
            db_hh.data<T>(),
            dw_unit.data<T>(),
            dw_hr.data<T>(),
            scratch,
            threads};
  }
};

// What a problem tells Python of itself
template <class P> void describe_problem(py::class_<P>& problem) {
  problem.def_property_readonly("cell", [](const P& p) { return p.info.name; })
      .def_property_readonly("dtype", [](const P& p) { return p.is_double ? "float64" : "float32"; })
      .def_property_readonly("T", [](const P& p) { return p.dims.T; })
      .def_property_readonly("N", [](const P& p) { return p.dims.N; })
      .def_property_readonly("I", [](const P& p) { return p.dims.I; })
      .def_property_readonly("H", [](const P& p) { return p.dims.H; })
      .def_property_readonly("R", [](const P& p) { return p.dims.R; })
      .def_property_readonly("U", [](const P& p) { return p.info.U; })
      .def_property_readonly("G", [](const P& p) { return p.info.G; })
      .def_property_readonly("S", [](const P& p) { return p.info.S; })
      .def_property_readonly("has_c", [](const P& p) { return p.info.has_c; })
      .def_property_readonly("projects", [](const P& p) { return p.projects(); })
      .def_property_readonly("rows", [](const P& p) { return p.count_rows(); })
      .def_property_readonly("sizes",
                             [](const P& p) {
                               const Sizes& s = p.sizes;
                               return py::make_tuple(s.saved, s.states, s.forward_scratch, s.backward_scratch);
                             })
      .def(
          "write_rows",
          [](const P& p, py::handle rows) {
            const Array out = borrow<Index>(rows, "rows", {{"rows", p.count_rows()}}, true);
            p.typed([&](auto zero) { row_order(p.template problem<decltype(zero)>(), out.data<Index>()); });
          },
          py::arg("rows"));
}

}  // namespace gatewise::binding
