// The functions that cells are written in, for float and double. Every other type a cell runs on
// (a SIMD register in cpu/vec.hpp, a dual number in the tests) brings its own overloads.
#pragma once
#include <cmath>

#include "gatewise/arch.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH {

GATEWISE_FN float exp(float x) { return ::expf(x); }
GATEWISE_FN double exp(double x) { return ::exp(x); }
GATEWISE_FN float tanh(float x) { return ::tanhf(x); }
GATEWISE_FN double tanh(double x) { return ::tanh(x); }
GATEWISE_FN float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
GATEWISE_FN double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
GATEWISE_FN float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN
GATEWISE_FN double relu(double x) { return x < 0.0 ? 0.0 : x; }
GATEWISE_FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
GATEWISE_FN double fma(double a, double b, double c) { return ::fma(a, b, c); }

GATEWISE_FN float clamp(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }
GATEWISE_FN double clamp(double x, double limit) { return x > limit ? limit : x < -limit ? -limit : x; }
// The gradient of x from that of clamp(x, limit). Comparisons are written so that a NaN is not hidden.
GATEWISE_FN float d_clamp(float d, float x, float limit) { return x >= limit || x <= -limit ? 0.0f : d; }
GATEWISE_FN double d_clamp(double d, double x, double limit) { return x >= limit || x <= -limit ? 0.0 : d; }

// Derivatives in terms of the function's own output y. Fused, 1 - y^2 and y - y^2 round once, however near y is to 1.
template <class V> GATEWISE_FN V d_tanh(V y) { return fma(-y, y, V(1)); }
template <class V> GATEWISE_FN V d_sigmoid(V y) { return fma(-y, y, y); }
GATEWISE_FN float d_relu(float y) { return y <= 0.0f ? 0.0f : 1.0f; }  // a NaN's gradient is not hidden
GATEWISE_FN double d_relu(double y) { return y <= 0.0 ? 0.0 : 1.0; }

}}  // namespace gatewise::GATEWISE_ARCH
