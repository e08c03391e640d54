// Vec<T>: the widest register of this build as an arithmetic type, with its own exp, tanh and sigmoid.
//
// Written on the compiler's vector types; intrinsics appear only where those have no word for the instruction
// (fused multiply-add, broadcast from memory, masked tails). Arithmetic is compiled with -ffp-contract=off and
// every fusion is spelled fma(), so that a result's bits never depend on how a tile happened to be inlined.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "gatewise/math.hpp"

#if defined(__AVX512F__)
#define GATEWISE_VECTOR_BYTES 64
#define GATEWISE_VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#define GATEWISE_VECTOR_BYTES 32
#define GATEWISE_VECTOR_REGISTERS 16
#elif defined(__aarch64__)
#define GATEWISE_VECTOR_BYTES 16
#define GATEWISE_VECTOR_REGISTERS 32
#else
#define GATEWISE_VECTOR_BYTES 16
#define GATEWISE_VECTOR_REGISTERS 16
#endif

// A tile's accumulators stay in registers only if every loop over them is unrolled completely.
#if defined(__clang__)
#define GATEWISE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GATEWISE_UNROLL _Pragma("GCC unroll 32")
#endif

namespace gatewise { inline namespace GATEWISE_ARCH { namespace {

template <class T> struct Bits;
template <> struct Bits<float> { using type = int; };
template <> struct Bits<double> { using type = long long; };
template <class V, class Lanes> struct LaneNumbers;
template <class V, int... I> struct LaneNumbers<V, std::integer_sequence<int, I...>> {
  static constexpr typename V::Unsigned value = {I...};
};

template <class T> struct Vec {
  static constexpr int width = GATEWISE_VECTOR_BYTES / sizeof(T);
  typedef T Native __attribute__((vector_size(GATEWISE_VECTOR_BYTES)));
  typedef typename Bits<T>::type Integer __attribute__((vector_size(GATEWISE_VECTOR_BYTES)));
  typedef std::make_unsigned_t<typename Bits<T>::type> Unsigned __attribute__((vector_size(GATEWISE_VECTOR_BYTES)));

  Native native;

  Vec() = default;
  GATEWISE_FN Vec(T x) { native = x - Native{}; }  // x - 0 is x for every x, -0 included
  GATEWISE_FN static Vec of(Native n) {
    Vec r;
    r.native = n;
    return r;
  }
  GATEWISE_FN static Vec of(Integer bits) {
    Vec r;
    r.native = (Native)bits;
    return r;
  }
  GATEWISE_FN Integer bits() const { return (Integer)native; }

  GATEWISE_FN static Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.native, p, sizeof r.native);
    return r;
  }
  GATEWISE_FN void store(T* p) const { std::memcpy(p, &native, sizeof native); }
  // The first n lanes, n possibly more than there are; nothing past them is touched, missing lanes read as 0.
  GATEWISE_FN static Vec load(const T* p, Index n);
  GATEWISE_FN void store(T* p, Index n) const;
  // 0, 1, 2 ...
  GATEWISE_FN static Unsigned lane_numbers() { return LaneNumbers<Vec, std::make_integer_sequence<int, width>>::value; }
  // From memory straight into all lanes; from a register it would occupy a multiply port.
  GATEWISE_FN static Vec broadcast(const T* p);
};

template <class T> GATEWISE_FN Vec<T> operator+(Vec<T> a, Vec<T> b) { return Vec<T>::of(a.native + b.native); }
template <class T> GATEWISE_FN Vec<T> operator-(Vec<T> a, Vec<T> b) { return Vec<T>::of(a.native - b.native); }
template <class T> GATEWISE_FN Vec<T> operator*(Vec<T> a, Vec<T> b) { return Vec<T>::of(a.native * b.native); }
template <class T> GATEWISE_FN Vec<T> operator/(Vec<T> a, Vec<T> b) { return Vec<T>::of(a.native / b.native); }
template <class T> GATEWISE_FN Vec<T> operator-(Vec<T> a) { return Vec<T>::of(-a.native); }
template <class T> GATEWISE_FN auto operator<(Vec<T> a, Vec<T> b) { return a.native < b.native; }
template <class T> GATEWISE_FN auto operator<=(Vec<T> a, Vec<T> b) { return a.native <= b.native; }
template <class T, class M> GATEWISE_FN Vec<T> select(M mask, Vec<T> yes, Vec<T> no) {
  return Vec<T>::of(mask ? yes.native : no.native);
}

// ---- the instructions that vector types cannot say

// Clamps keep NaN. The x86 instructions return their second operand where the comparison says nothing.
#if defined(__AVX512F__)
GATEWISE_FN Vec<float> at_most(Vec<float> limit, Vec<float> x) {
  return Vec<float>::of(_mm512_maskz_min_ps(0xffff, limit.native, x.native));
}
GATEWISE_FN Vec<double> at_most(Vec<double> limit, Vec<double> x) {
  return Vec<double>::of(_mm512_maskz_min_pd(0xff, limit.native, x.native));
}
GATEWISE_FN Vec<float> at_least(Vec<float> limit, Vec<float> x) {
  return Vec<float>::of(_mm512_maskz_max_ps(0xffff, limit.native, x.native));
}
GATEWISE_FN Vec<double> at_least(Vec<double> limit, Vec<double> x) {
  return Vec<double>::of(_mm512_maskz_max_pd(0xff, limit.native, x.native));
}
template <> GATEWISE_FN Vec<float> Vec<float>::broadcast(const float* p) { return of(_mm512_set1_ps(*p)); }
template <> GATEWISE_FN Vec<double> Vec<double>::broadcast(const double* p) { return of(_mm512_set1_pd(*p)); }
GATEWISE_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::of(_mm512_fmadd_ps(a.native, b.native, c.native));
}
GATEWISE_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::of(_mm512_fmadd_pd(a.native, b.native, c.native));
}
// Known when compiled: otherwise a mask is cheaper than a branch
GATEWISE_FN bool all_lanes(Index n, int width) { return __builtin_constant_p(n) && n >= width; }
GATEWISE_FN unsigned first_lanes(Index n, int width) { return n >= width ? (1u << width) - 1 : (1u << n) - 1; }
template <> GATEWISE_FN Vec<float> Vec<float>::load(const float* p, Index n) {
  return all_lanes(n, 16) ? load(p) : of(_mm512_maskz_loadu_ps(__mmask16(first_lanes(n, 16)), p));
}
template <> GATEWISE_FN Vec<double> Vec<double>::load(const double* p, Index n) {
  return all_lanes(n, 8) ? load(p) : of(_mm512_maskz_loadu_pd(__mmask8(first_lanes(n, 8)), p));
}
template <> GATEWISE_FN void Vec<float>::store(float* p, Index n) const {
  all_lanes(n, 16) ? store(p) : _mm512_mask_storeu_ps(p, __mmask16(first_lanes(n, 16)), native);
}
template <> GATEWISE_FN void Vec<double>::store(double* p, Index n) const {
  all_lanes(n, 8) ? store(p) : _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n, 8)), native);
}

#elif defined(__AVX2__)
GATEWISE_FN Vec<float> at_most(Vec<float> limit, Vec<float> x) {
  return Vec<float>::of(_mm256_min_ps(limit.native, x.native));
}
GATEWISE_FN Vec<double> at_most(Vec<double> limit, Vec<double> x) {
  return Vec<double>::of(_mm256_min_pd(limit.native, x.native));
}
GATEWISE_FN Vec<float> at_least(Vec<float> limit, Vec<float> x) {
  return Vec<float>::of(_mm256_max_ps(limit.native, x.native));
}
GATEWISE_FN Vec<double> at_least(Vec<double> limit, Vec<double> x) {
  return Vec<double>::of(_mm256_max_pd(limit.native, x.native));
}
template <> GATEWISE_FN Vec<float> Vec<float>::broadcast(const float* p) { return of(_mm256_broadcast_ss(p)); }
template <> GATEWISE_FN Vec<double> Vec<double>::broadcast(const double* p) { return of(_mm256_broadcast_sd(p)); }
GATEWISE_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::of(_mm256_fmadd_ps(a.native, b.native, c.native));
}
GATEWISE_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::of(_mm256_fmadd_pd(a.native, b.native, c.native));
}
GATEWISE_FN __m256i first_lanes_f32(Index n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n < 8 ? n : 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GATEWISE_FN __m256i first_lanes_f64(Index n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <> GATEWISE_FN Vec<float> Vec<float>::load(const float* p, Index n) {
  return n >= width ? load(p) : of(_mm256_maskload_ps(p, first_lanes_f32(n)));
}
template <> GATEWISE_FN Vec<double> Vec<double>::load(const double* p, Index n) {
  return n >= width ? load(p) : of(_mm256_maskload_pd(p, first_lanes_f64(n)));
}
template <> GATEWISE_FN void Vec<float>::store(float* p, Index n) const {
  n >= width ? store(p) : _mm256_maskstore_ps(p, first_lanes_f32(n), native);
}
template <> GATEWISE_FN void Vec<double>::store(double* p, Index n) const {
  n >= width ? store(p) : _mm256_maskstore_pd(p, first_lanes_f64(n), native);
}

#else
template <class T> GATEWISE_FN Vec<T> at_most(Vec<T> limit, Vec<T> x) { return select(limit < x, limit, x); }
template <class T> GATEWISE_FN Vec<T> at_least(Vec<T> limit, Vec<T> x) { return select(x < limit, limit, x); }
template <class T> GATEWISE_FN Vec<T> Vec<T>::broadcast(const T* p) {
  if constexpr (width == 4) return of(Native{*p, *p, *p, *p});
  else return of(Native{*p, *p});
}
template <class T> GATEWISE_FN Vec<T> Vec<T>::load(const T* p, Index n) {
  if (n >= width) return load(p);
  Vec r(T(0));
  for (Index i = 0; i < n; ++i) r.native[i] = p[i];
  return r;
}
template <class T> GATEWISE_FN void Vec<T>::store(T* p, Index n) const {
  if (n >= width) return store(p);
  for (Index i = 0; i < n; ++i) p[i] = native[i];
}
#if defined(__aarch64__)
GATEWISE_FN Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::of(
      (Vec<float>::Native)vfmaq_f32((float32x4_t)c.native, (float32x4_t)a.native, (float32x4_t)b.native));
}
GATEWISE_FN Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::of(
      (Vec<double>::Native)vfmaq_f64((float64x2_t)c.native, (float64x2_t)a.native, (float64x2_t)b.native));
}
#else  // no such instruction
template <class T> GATEWISE_FN Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) { return a * b + c; }
template <class T> GATEWISE_FN Vec<T> d_sigmoid(Vec<T> y) { return y * (Vec<T>(1) - y); }  // y - y * y would cancel
#endif
#endif
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;  // fma() rounds twice
#endif

// f(lanes): a constant where the register is full, for which no lane is masked
template <class T, class F> GATEWISE_FN void with_lanes(Index lanes, F f) {
  if (lanes >= Vec<T>::width) f(std::integral_constant<Index, Vec<T>::width>());
  else f(lanes);
}

// rows[i][j] <-> rows[j][i], by exchanging ever smaller blocks across the diagonal. Lanes of two registers are numbered
// end to end; a block of the upper rows takes its right half from the lower rows' left, and the other way round.
template <int Block, class T, int... Lane>
GATEWISE_FN void exchange(Vec<T>& upper, Vec<T>& lower, std::integer_sequence<int, Lane...>) {
  constexpr int W = sizeof...(Lane);
  const auto a = upper.native, b = lower.native;
#if defined(__clang__)
  upper.native = __builtin_shufflevector(a, b, (Lane & Block ? W + Lane - Block : Lane)...);
  lower.native = __builtin_shufflevector(a, b, (Lane & Block ? W + Lane : Lane + Block)...);
#else
  using Lanes = typename Vec<T>::Integer;
  upper.native = __builtin_shuffle(a, b, Lanes{(Lane & Block ? W + Lane - Block : Lane)...});
  lower.native = __builtin_shuffle(a, b, Lanes{(Lane & Block ? W + Lane : Lane + Block)...});
#endif
}
template <class T, int Block = Vec<T>::width / 2> GATEWISE_FN void transpose(Vec<T> (&rows)[Vec<T>::width]) {
  constexpr int W = Vec<T>::width;
  GATEWISE_UNROLL
  for (int i = 0; i < W; ++i)
    if (!(i & Block)) exchange<Block>(rows[i], rows[i + Block], std::make_integer_sequence<int, W>());
  if constexpr (Block > 1) transpose<T, Block / 2>(rows);
}

// The sum of all lanes, by halves
template <int Block, class T, int... Lane> GATEWISE_FN Vec<T> fold(Vec<T> v, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return v + Vec<T>::of(__builtin_shufflevector(v.native, v.native, (Lane ^ Block)...));
#else
  return v + Vec<T>::of(__builtin_shuffle(v.native, typename Vec<T>::Integer{(Lane ^ Block)...}));
#endif
}
template <class T, int Block = Vec<T>::width / 2> GATEWISE_FN T lane_sum(Vec<T> v) {
  v = fold<Block>(v, std::make_integer_sequence<int, Vec<T>::width>());
  if constexpr (Block > 1) return lane_sum<T, Block / 2>(v);
  else return v.native[0];
}

// ---- elementary functions, each within 2 ULP of the truth for every input; results below the smallest normal
// number are 0. `gatewise check` measures it. On every fifth float32: exp 1.03, tanh 1.94, sigmoid 2.00.
// Coefficients: minimax polynomials (Remez exchange in 60 digits), rounded to T.

template <class T> struct Coefficients;
template <> struct Coefficients<float> {
  static constexpr int mantissa_bits = 23, bias = 127;
  // x + magic rounds x to the nearest integer, and leaves it with the bias in the lowest bits
  static constexpr float magic = 0x1.8p23f + bias;
  static constexpr float ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cp-20f;  // n * ln2_hi is exact
  static constexpr float exp_low = -104.0f, exp_high = 89.0f;              // past these: 0 and inf
  static constexpr float sigmoid_low = -88.0f, sigmoid_high = 87.0f, tanh_low = -10.0f;
  // (e^r - 1 - r) / r^2 on |r| <= ln2 / 2, its constant term held at 1/2
  static constexpr float expm1[] = {0x1.6d7c60p-10f, 0x1.123b22p-7f, 0x1.5554bep-5f, 0x1.555490p-3f, 0.5f};
};
template <> struct Coefficients<double> {
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double magic = 0x1.8p52 + bias;
  static constexpr double ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double exp_low = -746.0, exp_high = 710.0;
  static constexpr double sigmoid_low = -709.0, sigmoid_high = 708.0, tanh_low = -20.0;
  static constexpr double expm1[] = {
      0x1.af79e9481ae73p-26, 0x1.28a0d38b76466p-22, 0x1.71dde80fcb426p-19, 0x1.a019a9ed6a27ap-16, 0x1.a01a01b6a45c3p-13,
      0x1.6c16c17d25178p-10, 0x1.111111110e4f2p-7,  0x1.55555555530e0p-5,  0x1.555555555555dp-3,  0.5};
};

template <class T, int N> GATEWISE_FN Vec<T> polynomial(const T (&highest_first)[N], Vec<T> x) {
  Vec<T> p(highest_first[0]);
  GATEWISE_UNROLL
  for (int i = 1; i < N; ++i) p = fma(p, x, Vec<T>(highest_first[i]));
  return p;
}

// e^x = 2^n (1 + q). The caller has clamped x so that n fits its use.
template <class T> struct SplitExp {
  typename Vec<T>::Integer biased_n;  // in the lowest bits; above them stands what a shift drops
  Vec<T> q;

  // 2^n for n within the normal exponents; n = -bias gives 0
  GATEWISE_FN Vec<T> scale() const { return Vec<T>::of(biased_n << Coefficients<T>::mantissa_bits); }
};
// Of Sign * x: the sign costs nothing inside a multiply-add.
template <int Sign, class T> GATEWISE_FN SplitExp<T> split_exp(Vec<T> x) {
  using C = Coefficients<T>;
  const Vec<T> magic(C::magic);
  const Vec<T> shifted = fma(x, Vec<T>(Sign * T(0x1.71547652b82fep0)), magic);  // log2(e)
  const Vec<T> n = shifted - magic;
  const Vec<T> reduced = fma(n, Vec<T>(-C::ln2_hi), Sign < 0 ? -x : x);  // exact
  const Vec<T> r = fma(n, Vec<T>(-C::ln2_lo), reduced);
  if (kFused) return {shifted.bits(), fma(polynomial(C::expm1, r), r * r, r)};
  const Vec<T> lost = (reduced - r) - n * Vec<T>(C::ln2_lo);  // there are more roundings here: this one is given back
  return {shifted.bits(), polynomial(C::expm1, r) * (r * r) + lost + r};
}

template <class T> GATEWISE_FN Vec<T> exp(Vec<T> x) {
  using C = Coefficients<T>;
  const SplitExp<T> e = split_exp<1>(at_least(Vec<T>(C::exp_low), at_most(Vec<T>(C::exp_high), x)));
  // 2^n may overflow where the result does not: scale in two steps
  const auto n = e.biased_n - Vec<T>(C::magic).bits(), half = n >> 1;
  const SplitExp<T> first{half + C::bias, e.q}, second{n - half + C::bias, e.q};
  return (Vec<T>(1) + e.q) * first.scale() * second.scale();
}

template <class T> GATEWISE_FN Vec<T> sigmoid(Vec<T> x) {  // 1 / (1 + e^-x)
  using C = Coefficients<T>;
  const SplitExp<T> e = split_exp<-1>(at_least(Vec<T>(C::sigmoid_low), at_most(Vec<T>(C::sigmoid_high), x)));
  const Vec<T> one(1), scale = e.scale();
  return one / (fma(scale, e.q, one) + scale);  // 1 + scale first would lose the 1 where scale is large
}

template <class T> GATEWISE_FN Vec<T> tanh(Vec<T> x) {
  // (e^2a - 1) / (e^2a + 1) of a = -|x|: there 2^n is at most 1, so that 2^n - 1 is exact and each side of the
  // division is rounded once. The sign is put back at the end, which also keeps that of a zero.
  using C = Coefficients<T>;
  const Vec<T> one(1);
  const auto sign = Vec<T>(T(-0.0)).bits();
  const Vec<T> a = at_least(Vec<T>(C::tanh_low), Vec<T>::of(x.bits() | sign));
  const SplitExp<T> e = split_exp<1>(a + a);
  const Vec<T> scale = e.scale();
  const Vec<T> y = fma(scale, e.q, scale - one) / fma(scale, e.q, scale + one);
  return Vec<T>::of((y.bits() & ~sign) | (x.bits() & sign));
}

template <class T> GATEWISE_FN Vec<T> clamp(Vec<T> x, Vec<T> limit) { return at_least(-limit, at_most(limit, x)); }
template <class T> GATEWISE_FN Vec<T> d_clamp(Vec<T> d, Vec<T> x, Vec<T> limit) {
  return select((limit <= x) | (x <= -limit), Vec<T>(0), d);
}
template <class T> GATEWISE_FN Vec<T> relu(Vec<T> x) { return at_least(Vec<T>(0), x); }
template <class T> GATEWISE_FN Vec<T> d_relu(Vec<T> y) { return select(y <= Vec<T>(0), Vec<T>(0), Vec<T>(1)); }

// Subnormal gradients cost a hundred times a normal one, and recurrent gradients do decay that far. While this
// object lives, its thread reads and writes subnormals as zero; then the caller's mode is back.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }  // flush-to-zero, denormals-are-zero
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  unsigned long long saved_;
#else
  FlushSubnormals() {}  // no portable way: subnormals are computed as they are
#endif
};

// The CPU's own clock: cheap enough to read around every tile
GATEWISE_FN std::uint64_t now() {
#if defined(__x86_64__)
  return __rdtsc();
#elif defined(__aarch64__)
  std::uint64_t ticks;
  asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
  return ticks;
#else
  return 0;  // no portable clock this cheap: nothing is measured
#endif
}

}}}  // namespace gatewise::GATEWISE_ARCH
