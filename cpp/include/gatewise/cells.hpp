// The cells. A cell is two pure maps between registers, one step forward and one step backward;
// memory, time, batch, threads, masks and directions belong to the layer that runs it.
//
//   gx[g], gh[g]    pre-activations of gate g: the input part W_ih x + b_ih, the hidden part W_hh h + b_hh
//   prev, next      the state before and after the step; `d`, and what backward returns, are their gradients
//   saved[s]        what forward keeps for backward; the first G are the activated gates
//   dgx[g], dgh[g]  gradients of gx[g], gh[g]. They are equal, and only dgx is written, except for the last
//                   gate of a `split` cell, where the input and the hidden part enter differently
//
// Backward returns only the part of the gradient to the previous state that bypasses W_hh; the layer adds the rest.
// V is float or double, a SIMD register, or a dual number (the test of each backward against its forward).
// To add a cell: write it here, append it to `Cells`, and write its scalar twin in python/gatewise/reference.py.
#pragma once
#include "gatewise/math.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH {

template <class V> struct State { V h, c; };

struct RnnTanh {  // h = tanh(gx + gh): Elman, Finding Structure in Time, 1990
  static constexpr const char* name = "rnn_tanh";
  static constexpr int G = 1, S = 1;
  static constexpr bool has_c = false, split = false;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[1], const V (&gh)[1], State<V>, V (&saved)[1]) {
    const V h = tanh(gx[0] + gh[0]);
    saved[0] = h;
    return {h, V(0)};
  }
  template <class V>
  GATEWISE_FN static State<V> backward(const V (&saved)[1], State<V>, State<V>, State<V> d, V (&dgx)[1], V (&)[1]) {
    dgx[0] = d.h * d_tanh(saved[0]);
    return {V(0), V(0)};
  }
};

struct RnnRelu {  // h = max(0, gx + gh)
  static constexpr const char* name = "rnn_relu";
  static constexpr int G = 1, S = 1;
  static constexpr bool has_c = false, split = false;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[1], const V (&gh)[1], State<V>, V (&saved)[1]) {
    const V h = relu(gx[0] + gh[0]);
    saved[0] = h;
    return {h, V(0)};
  }
  template <class V>
  GATEWISE_FN static State<V> backward(const V (&saved)[1], State<V>, State<V>, State<V> d, V (&dgx)[1], V (&)[1]) {
    dgx[0] = d.h * d_relu(saved[0]);
    return {V(0), V(0)};
  }
};

struct Lstm {  // with a forget gate: Gers, Schmidhuber, Cummins, Learning to Forget, 2000; gates i f g o
  static constexpr const char* name = "lstm";
  static constexpr int G = 4, S = 4;
  static constexpr bool has_c = true, split = false;

  template <class V>
  GATEWISE_FN static State<V> forward(const V (&gx)[4], const V (&gh)[4], State<V> prev, V (&saved)[4]) {
    const V i = sigmoid(gx[0] + gh[0]);
    const V f = sigmoid(gx[1] + gh[1]);
    const V g = tanh(gx[2] + gh[2]);
    const V o = sigmoid(gx[3] + gh[3]);
    const V c = fma(f, prev.c, i * g);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    return {o * tanh(c), c};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[4], State<V> prev, State<V> next, State<V> d,
                                                          V (&dgx)[4], V (&)[4]) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(next.c);
    const V dc = fma(d.h * o, d_tanh(tanh_c), d.c);
    dgx[0] = dc * g * d_sigmoid(i);
    dgx[1] = dc * prev.c * d_sigmoid(f);
    dgx[2] = dc * i * d_tanh(g);
    dgx[3] = d.h * tanh_c * d_sigmoid(o);
    return {V(0), dc * f};
  }
};

struct Gru {  // Cho et al., arXiv 1406.1078v1: the reset r acts after the product, as in cuDNN; gates r z n
  static constexpr const char* name = "gru";
  static constexpr int G = 3, S = 4;
  static constexpr bool has_c = false, split = true;

  template <class V>
  GATEWISE_FN static State<V> forward(const V (&gx)[3], const V (&gh)[3], State<V> prev, V (&saved)[4]) {
    const V r = sigmoid(gx[0] + gh[0]);
    const V z = sigmoid(gx[1] + gh[1]);
    const V n = tanh(fma(r, gh[2], gx[2]));
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = gh[2];
    return {fma(z, prev.h - n, n), V(0)};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[4], State<V> prev, State<V>, State<V> d,
                                                          V (&dgx)[3], V (&dgh)[3]) {
    const V r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3];
    const V dn = d.h * (V(1) - z) * d_tanh(n);
    dgx[0] = dn * gh_n * d_sigmoid(r);
    dgx[1] = d.h * (prev.h - n) * d_sigmoid(z);
    dgx[2] = dn;
    dgh[2] = dn * r;
    return {d.h * z, V(0)};
  }
};

// Everything outside this file walks this list: kernels, tests, benchmarks, the Python names.
template <class... Cell> struct List {};
using Cells = List<RnnTanh, RnnRelu, Lstm, Gru>;

}}  // namespace gatewise::GATEWISE_ARCH
