// The cells. A cell is two pure maps between registers, one step forward and one step backward;
// memory, time, batch, threads, masks and directions belong to the layer that runs it.
//
//   gx[g], gh[g]    pre-activations of gate g: the input part W_ih x + b_ih, the hidden part W_hh h + b_hh
//   unit            what belongs to a hidden unit alone: its weights w[u] (peepholes, gains), the bound of its |c|
//   prev, next      the state before and after the step; `d`, and what backward returns, are their gradients
//   saved[s]        what forward keeps for backward; the first G are the activated gates
//   dgx[g], dgh[g]  gradients of gx[g], gh[g]. They are equal, and only dgx is written, except for the last
//                   gate of a `split` cell, where the input and the hidden part enter differently, and for all gates of
//                   a `normed` cell
//   dw[u]           gradients of unit.w[u]
//
// Backward returns only the part of the gradient to the previous state that bypasses W_hh; the layer adds the rest.
//
// Some cells need a stage of the layer in the middle of a step. Their forward returns in place of h what goes through
// the stage; `output` makes h of what comes back. Backward goes the other way: `d_output` returns the gradient of what
// came back and that of prev.h, `backward` takes in place of d.h the gradient of what went in; between the two
// calls dgx holds what the first left there.
//   middle = product   a product with the rows of the last gate of W_hh
//   middle = norm      standardise over the H units of a row
// A `normed` cell finds its gx and gh standardised over the G * H numbers of a row, without biases, and saves them
// behind the gates: gx, then gh (the layer has them there already, not yet scaled, and keeps them so). Standardised:
// less their mean, over the root of their variance + 1e-5.
//
// V is float or double, a SIMD register, or a dual number (the test of each backward against its forward).
// To add a cell: write it here, append it to `Cells`, and write its scalar twin in python/gatewise/reference.py.
#pragma once
#include "gatewise/gatewise.hpp"
#include "gatewise/math.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH {

template <class V> struct State { V h, c; };
template <class V> struct Staged { V middle, prev_h; };
template <class V, int U> struct Unit {
  V w[U ? U : 1];
  V clip;             // of |c|; infinity where there is none
  bool clips = true;  // false, where the compiler can see it: no instructions are spent on it

  GATEWISE_FN V clipped(V c) const { return clips ? clamp(c, clip) : c; }
  GATEWISE_FN V d_clipped(V d, V c) const { return clips ? d_clamp(d, c, clip) : d; }
};
enum class Middle { none, product, norm };

// What most cells are: no weights of the unit's own, no stage in the middle
struct Plain {
  static constexpr int U = 0;
  static constexpr bool has_c = false, split = false, has_product = true, normed = false;
  static constexpr Middle middle = Middle::none;
  // With a stage in the middle: the number that `output` saves, the first gate and the first of the unit's weights
  // whose gradients `d_output` makes
  static constexpr int output_saved = -1, output_gate = 0, output_unit = 0;
};

struct RnnTanh : Plain {  // h = tanh(gx + gh): Elman, Finding Structure in Time, 1990
  static constexpr const char* name = "rnn_tanh";
  static constexpr int G = 1, S = 1;

  template <class V>
  GATEWISE_FN static State<V> forward(const V (&gx)[1], const V (&gh)[1], const Unit<V, 0>&, State<V>, V (&saved)[1]) {
    const V h = tanh(gx[0] + gh[0]);
    saved[0] = h;
    return {h, V(0)};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[1], const Unit<V, 0>&, State<V>, State<V> d,
                                                          V (&dgx)[1], V (&)[1], V (&)[1]) {
    dgx[0] = d.h * d_tanh(saved[0]);
    return {V(0), V(0)};
  }
};

struct RnnRelu : Plain {  // h = max(0, gx + gh)
  static constexpr const char* name = "rnn_relu";
  static constexpr int G = 1, S = 1;

  template <class V>
  GATEWISE_FN static State<V> forward(const V (&gx)[1], const V (&gh)[1], const Unit<V, 0>&, State<V>, V (&saved)[1]) {
    const V h = relu(gx[0] + gh[0]);
    saved[0] = h;
    return {h, V(0)};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[1], const Unit<V, 0>&, State<V>, State<V> d,
                                                          V (&dgx)[1], V (&)[1], V (&)[1]) {
    dgx[0] = d.h * d_relu(saved[0]);
    return {V(0), V(0)};
  }
};

struct Lstm : Plain {  // with a forget gate: Gers, Schmidhuber, Cummins, Learning to Forget, 2000; gates i f g o
  static constexpr const char* name = "lstm";
  static constexpr int G = 4, S = 4;
  static constexpr bool has_c = true;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[4], const V (&gh)[4], const Unit<V, 0>& unit,
                                                         State<V> prev, V (&saved)[4]) {
    const V i = sigmoid(gx[0] + gh[0]);
    const V f = sigmoid(gx[1] + gh[1]);
    const V g = tanh(gx[2] + gh[2]);
    const V o = sigmoid(gx[3] + gh[3]);
    const V c = unit.clipped(fma(f, prev.c, i * g));
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    return {o * tanh(c), c};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[4], const Unit<V, 0>& unit, State<V> prev,
                                                          State<V> d, V (&dgx)[4], V (&)[4], V (&)[1]) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V c = fma(f, prev.c, i * g);
    const V tanh_c = tanh(unit.clipped(c));
    const V dc = unit.d_clipped(fma(d.h * o, d_tanh(tanh_c), d.c), c);
    dgx[0] = dc * g * d_sigmoid(i);
    dgx[1] = dc * prev.c * d_sigmoid(f);
    dgx[2] = dc * i * d_tanh(g);
    dgx[3] = d.h * tanh_c * d_sigmoid(o);
    return {V(0), dc * f};
  }
};

// The gates see the cell state, i and f the old one, o the new: Gers, Schmidhuber, Recurrent Nets that Time and Count,
// 2000. Weights of the unit: the peepholes of i f o.
struct LstmPeephole : Plain {
  static constexpr const char* name = "lstm_peephole";
  static constexpr int G = 4, S = 4, U = 3;
  static constexpr bool has_c = true;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[4], const V (&gh)[4], const Unit<V, 3>& unit,
                                                         State<V> prev, V (&saved)[4]) {
    const V i = sigmoid(fma(unit.w[0], prev.c, gx[0] + gh[0]));
    const V f = sigmoid(fma(unit.w[1], prev.c, gx[1] + gh[1]));
    const V g = tanh(gx[2] + gh[2]);
    const V c = unit.clipped(fma(f, prev.c, i * g));
    const V o = sigmoid(fma(unit.w[2], c, gx[3] + gh[3]));
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    return {o * tanh(c), c};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[4], const Unit<V, 3>& unit, State<V> prev,
                                                          State<V> d, V (&dgx)[4], V (&)[4], V (&dw)[3]) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V c = fma(f, prev.c, i * g);
    const V next_c = unit.clipped(c);
    const V tanh_c = tanh(next_c);
    const V d_o = d.h * tanh_c * d_sigmoid(o);
    const V dc = unit.d_clipped(fma(d_o, unit.w[2], fma(d.h * o, d_tanh(tanh_c), d.c)), c);
    const V d_i = dc * g * d_sigmoid(i);
    const V d_f = dc * prev.c * d_sigmoid(f);
    dgx[0] = d_i;
    dgx[1] = d_f;
    dgx[2] = dc * i * d_tanh(g);
    dgx[3] = d_o;
    dw[0] = d_i * prev.c;
    dw[1] = d_f * prev.c;
    dw[2] = d_o * next_c;
    return {V(0), fma(d_i, unit.w[0], fma(d_f, unit.w[1], dc * f))};
  }
};

struct LstmCoupled : Plain {  // f = 1 - i: CIFG in Greff et al., LSTM: A Search Space Odyssey, 2015; gates i g o
  static constexpr const char* name = "lstm_coupled";
  static constexpr int G = 3, S = 3;
  static constexpr bool has_c = true;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[3], const V (&gh)[3], const Unit<V, 0>& unit,
                                                         State<V> prev, V (&saved)[3]) {
    const V i = sigmoid(gx[0] + gh[0]);
    const V g = tanh(gx[1] + gh[1]);
    const V o = sigmoid(gx[2] + gh[2]);
    const V c = unit.clipped(fma(i, g - prev.c, prev.c));
    saved[0] = i, saved[1] = g, saved[2] = o;
    return {o * tanh(c), c};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[3], const Unit<V, 0>& unit, State<V> prev,
                                                          State<V> d, V (&dgx)[3], V (&)[3], V (&)[1]) {
    const V i = saved[0], g = saved[1], o = saved[2];
    const V c = fma(i, g - prev.c, prev.c);
    const V tanh_c = tanh(unit.clipped(c));
    const V dc = unit.d_clipped(fma(d.h * o, d_tanh(tanh_c), d.c), c);
    dgx[0] = dc * (g - prev.c) * d_sigmoid(i);
    dgx[1] = dc * i * d_tanh(g);
    dgx[2] = d.h * tanh_c * d_sigmoid(o);
    return {V(0), dc * (V(1) - i)};
  }
};

// With layer normalisation of W_ih x, W_hh h and c: Ba, Kiros, Hinton, arXiv 1607.06450. Weights of the unit: gains of
// gx (i f g o), gains of gh, biases, gain and bias of c.
struct LstmNorm : Plain {
  static constexpr const char* name = "lstm_norm";
  static constexpr int G = 4, S = 13, U = 14;
  static constexpr bool has_c = true, normed = true;
  static constexpr Middle middle = Middle::norm;
  static constexpr int output_saved = 12, output_gate = 3, output_unit = 12;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[4], const V (&gh)[4], const Unit<V, 14>& unit,
                                                         State<V> prev, V (&saved)[13]) {
    V a[4];
    for (int g = 0; g < 4; ++g) {
      saved[4 + g] = gx[g], saved[8 + g] = gh[g];
      a[g] = fma(unit.w[g], gx[g], fma(unit.w[4 + g], gh[g], unit.w[8 + g]));
    }
    const V i = sigmoid(a[0]), f = sigmoid(a[1]), g = tanh(a[2]), o = sigmoid(a[3]);
    const V c = unit.clipped(fma(f, prev.c, i * g));
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o, saved[12] = V(0);  // the last is output's to set
    return {c, c};
  }
  template <class V>
  GATEWISE_FN static V output(const V (&)[4], V standard_c, const Unit<V, 14>& unit, State<V>, V (&saved)[13]) {
    saved[12] = standard_c;
    return saved[3] * tanh(fma(unit.w[12], standard_c, unit.w[13]));
  }
  template <class V> GATEWISE_FN static Staged<V> d_output(const V (&saved)[13], const Unit<V, 14>& unit, State<V>,
                                                           V dh, V (&dgx)[4], V (&dw)[14]) {
    const V o = saved[3], standard_c = saved[12];
    const V tanh_c = tanh(fma(unit.w[12], standard_c, unit.w[13]));
    const V d_tanh_c = dh * o * d_tanh(tanh_c);
    dgx[3] = dh * tanh_c * d_sigmoid(o);
    dw[12] = d_tanh_c * standard_c;
    dw[13] = d_tanh_c;
    return {d_tanh_c * unit.w[12], V(0)};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[13], const Unit<V, 14>& unit, State<V> prev,
                                                          State<V> d, V (&dgx)[4], V (&dgh)[4], V (&dw)[14]) {
    const V i = saved[0], f = saved[1], g = saved[2];
    const V dc = unit.d_clipped(d.h + d.c, fma(f, prev.c, i * g));
    const V da[] = {dc * g * d_sigmoid(i), dc * prev.c * d_sigmoid(f), dc * i * d_tanh(g), dgx[3]};
    for (int k = 0; k < 4; ++k) {
      dw[k] = da[k] * saved[4 + k];
      dw[4 + k] = da[k] * saved[8 + k];
      dw[8 + k] = da[k];
      dgx[k] = da[k] * unit.w[k];
      dgh[k] = da[k] * unit.w[4 + k];
    }
    return {V(0), dc * f};
  }
};

struct Gru : Plain {  // Cho et al., arXiv 1406.1078v1: the reset r acts after the product, as in cuDNN; gates r z n
  static constexpr const char* name = "gru";
  static constexpr int G = 3, S = 4;
  static constexpr bool split = true;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[3], const V (&gh)[3], const Unit<V, 0>&,
                                                         State<V> prev, V (&saved)[4]) {
    const V r = sigmoid(gx[0] + gh[0]);
    const V z = sigmoid(gx[1] + gh[1]);
    const V n = tanh(fma(r, gh[2], gx[2]));
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = gh[2];
    return {fma(z, prev.h - n, n), V(0)};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[4], const Unit<V, 0>&, State<V> prev,
                                                          State<V> d, V (&dgx)[3], V (&dgh)[3], V (&)[1]) {
    const V r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3];
    const V dn = d.h * (V(1) - z) * d_tanh(n);
    dgx[0] = dn * gh_n * d_sigmoid(r);
    dgx[1] = d.h * (prev.h - n) * d_sigmoid(z);
    dgx[2] = dn;
    dgh[2] = dn * r;
    return {d.h * z, V(0)};
  }
};

// Cho et al., arXiv 1406.1078v3: the reset acts before the product, n = tanh(gx + W_hn (r h)). r h is what goes through
// the stage.
struct GruResetBefore : Plain {
  static constexpr const char* name = "gru_reset_before";
  static constexpr int G = 3, S = 3;
  static constexpr Middle middle = Middle::product;
  static constexpr int output_saved = 2, output_gate = 1;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[3], const V (&gh)[3], const Unit<V, 0>&,
                                                         State<V> prev, V (&saved)[3]) {
    const V r = sigmoid(gx[0] + gh[0]);
    const V z = sigmoid(gx[1] + gh[1]);
    saved[0] = r, saved[1] = z, saved[2] = V(0);  // n is output's to set
    return {r * prev.h, V(0)};
  }
  template <class V>
  GATEWISE_FN static V output(const V (&gx)[3], V gh_n, const Unit<V, 0>&, State<V> prev, V (&saved)[3]) {
    const V n = tanh(gx[2] + gh_n);
    saved[2] = n;
    return fma(saved[1], prev.h - n, n);
  }
  template <class V> GATEWISE_FN static Staged<V> d_output(const V (&saved)[3], const Unit<V, 0>&, State<V> prev, V dh,
                                                           V (&dgx)[3], V (&)[1]) {
    const V z = saved[1], n = saved[2];
    const V dn = dh * (V(1) - z) * d_tanh(n);
    dgx[1] = dh * (prev.h - n) * d_sigmoid(z);
    dgx[2] = dn;
    return {dn, dh * z};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[3], const Unit<V, 0>&, State<V> prev,
                                                          State<V> d, V (&dgx)[3], V (&)[3], V (&)[1]) {
    const V r = saved[0];
    dgx[0] = d.h * prev.h * d_sigmoid(r);
    return {d.h * r, V(0)};
  }
};

// With layer normalisation of W_ih x and W_hh h. Weights of the unit: gains of gx (r z n), gains of gh, biases of r z,
// biases of the input and of the hidden part of n.
struct GruNorm : Plain {
  static constexpr const char* name = "gru_norm";
  static constexpr int G = 3, S = 10, U = 10;
  static constexpr bool normed = true;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[3], const V (&gh)[3], const Unit<V, 10>& unit,
                                                         State<V> prev, V (&saved)[10]) {
    const V r = sigmoid(fma(unit.w[0], gx[0], fma(unit.w[3], gh[0], unit.w[6])));
    const V z = sigmoid(fma(unit.w[1], gx[1], fma(unit.w[4], gh[1], unit.w[7])));
    const V gh_n = fma(unit.w[5], gh[2], unit.w[9]);
    const V n = tanh(fma(r, gh_n, fma(unit.w[2], gx[2], unit.w[8])));
    saved[0] = r, saved[1] = z, saved[2] = n;
    for (int g = 0; g < 3; ++g) saved[3 + g] = gx[g], saved[6 + g] = gh[g];
    saved[9] = gh_n;
    return {fma(z, prev.h - n, n), V(0)};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[10], const Unit<V, 10>& unit, State<V> prev,
                                                          State<V> d, V (&dgx)[3], V (&dgh)[3], V (&dw)[10]) {
    const V r = saved[0], z = saved[1], n = saved[2], gh_n = saved[9];
    const V dn = d.h * (V(1) - z) * d_tanh(n);
    const V dx[] = {dn * gh_n * d_sigmoid(r), d.h * (prev.h - n) * d_sigmoid(z), dn};
    const V dh[] = {dx[0], dx[1], dn * r};
    for (int g = 0; g < 3; ++g) {
      dw[g] = dx[g] * saved[3 + g];
      dw[3 + g] = dh[g] * saved[6 + g];
      dw[6 + g] = dx[g];
      dgx[g] = dx[g] * unit.w[g];
      dgh[g] = dh[g] * unit.w[3 + g];
    }
    dw[9] = dh[2];
    return {d.h * z, V(0)};
  }
};

// Independent units, each with a single recurrent weight: Li et al., Independently Recurrent Neural Network, arXiv
// 1803.04831
struct IndRnnRelu : Plain {  // h = max(0, gx + w h)
  static constexpr const char* name = "indrnn_relu";
  static constexpr int G = 1, S = 1, U = 1;
  static constexpr bool has_product = false;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[1], const V (&)[1], const Unit<V, 1>& unit,
                                                         State<V> prev, V (&saved)[1]) {
    const V h = relu(fma(unit.w[0], prev.h, gx[0]));
    saved[0] = h;
    return {h, V(0)};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[1], const Unit<V, 1>& unit, State<V> prev,
                                                          State<V> d, V (&dgx)[1], V (&)[1], V (&dw)[1]) {
    const V da = d.h * d_relu(saved[0]);
    dgx[0] = da;
    dw[0] = da * prev.h;
    return {da * unit.w[0], V(0)};
  }
};

struct IndRnnTanh : Plain {  // h = tanh(gx + w h)
  static constexpr const char* name = "indrnn_tanh";
  static constexpr int G = 1, S = 1, U = 1;
  static constexpr bool has_product = false;

  template <class V> GATEWISE_FN static State<V> forward(const V (&gx)[1], const V (&)[1], const Unit<V, 1>& unit,
                                                         State<V> prev, V (&saved)[1]) {
    const V h = tanh(fma(unit.w[0], prev.h, gx[0]));
    saved[0] = h;
    return {h, V(0)};
  }
  template <class V> GATEWISE_FN static State<V> backward(const V (&saved)[1], const Unit<V, 1>& unit, State<V> prev,
                                                          State<V> d, V (&dgx)[1], V (&)[1], V (&dw)[1]) {
    const V da = d.h * d_tanh(saved[0]);
    dgx[0] = da;
    dw[0] = da * prev.h;
    return {da * unit.w[0], V(0)};
  }
};

// Everything outside this file walks this list: kernels, tests, benchmarks, the Python names.
template <class... Cell> struct List {};
#ifdef GATEWISE_CELLS  // some of them: what is slow to compile, for a sanitizer, takes one of each kind
using Cells = List<GATEWISE_CELLS>;
#else
using Cells = List<RnnTanh, RnnRelu, Lstm, LstmPeephole, LstmCoupled, LstmNorm, Gru, GruResetBefore, GruNorm,
                   IndRnnRelu, IndRnnTanh>;
#endif

template <class Cell> constexpr CellInfo info_of() {
  return {Cell::name,
          Cell::G,
          Cell::S,
          Cell::U,
          Cell::has_c,
          Cell::split,
          Cell::has_product,
          Cell::normed,
          Cell::middle == Middle::product ? "product"
          : Cell::middle == Middle::norm  ? "norm"
                                          : "none"};
}

}}  // namespace gatewise::GATEWISE_ARCH
