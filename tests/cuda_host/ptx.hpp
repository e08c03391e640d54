// What translated PTX (ptx.py) calls: reinterpretation of registers, checked memory, and instructions that are not an
// operator of C++. Instructions that CUDA calls approximate are exact here.
#pragma once
#include <cfenv>
#include <limits>

#include "cuda_host.hpp"

namespace ptx {

using cuda_host::Access;
using cuda_host::Place;

// A register's value as another type: the same bits, or, between integers of different width, the same number
template <class To, class From> __forceinline__ To as(From from) {
  if constexpr (std::is_same_v<To, From>) return from;
  else if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) return To(from);
  else return cuda_host_bits<To>(from);
}
template <class Register, class T> __forceinline__ void put(Register& to, T value) { to = as<Register>(value); }

// --- Memory. `whole` is the access's size, of which this is a part: the vectors of .v2 and .v4 are checked as one
// -----

struct Local {  // the thread's own array
  std::uint64_t base, bytes;
};
enum class Space { global, shared, generic };
template <class T, Space space> __forceinline__ T* window(std::uint64_t address, unsigned part, unsigned whole,
                                                          Access access, Local local, Place place) {
  char* start;
  if (space == Space::generic && address - local.base < local.bytes) {
    if (address - local.base + whole > local.bytes) cuda_host::fail("an access beyond the local array", place);
    start = reinterpret_cast<char*>(address);
  } else if (space == Space::shared || (space == Space::generic && address & cuda_host::shared_window_bit)) {
    start = static_cast<char*>(cuda_host::shared_window(address & ~cuda_host::shared_window_bit, whole, place));
  } else {
    start = static_cast<char*>(cuda_host::global_window(address, whole, access, place));
  }
  return reinterpret_cast<T*>(start + part);
}

// What waits in a loop for memory reads it with an order or volatile: then the others run first
template <class T, int order> T load_ordered(const T* p) {
  cuda_host::yield();
  T value;
  __atomic_load(p, &value, order);
  return value;
}
template <class T, int order> void store_ordered(T* p, T value) {
  __atomic_store(p, &value, order);
  cuda_host::progress();
}
template <class T> __forceinline__ T parameter(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <int order, class T, class F> T update(T* p, F f) {
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do next = f(old);
  while (!__atomic_compare_exchange(p, &old, &next, true, order, __ATOMIC_RELAXED));
  cuda_host::progress();
  return old;
}
template <int order, class T> T atom_add(T* p, T v) {
  return update<order>(p, [=](T old) { return T(old + v); });
}
template <int order, class T> T atom_min(T* p, T v) {
  return update<order>(p, [=](T old) { return old < v ? old : v; });
}
template <int order, class T> T atom_max(T* p, T v) {
  return update<order>(p, [=](T old) { return old > v ? old : v; });
}
template <int order, class T> T atom_or(T* p, T v) {
  return update<order>(p, [=](T old) { return T(old | v); });
}
template <int order, class T> T atom_and(T* p, T v) {
  return update<order>(p, [=](T old) { return T(old & v); });
}
template <int order, class T> T atom_exch(T* p, T v) {
  return update<order>(p, [=](T) { return v; });
}
template <int order, class T> T atom_cas(T* p, T expected, T v) {
  cuda_host::yield();  // it may stand in a loop that waits
  __atomic_compare_exchange(p, &expected, &v, false, order, __ATOMIC_RELAXED);
  return expected;
}

// --- Warps -----------------------------------------------------------------------------------------------------------

// shfl.sync: `b` is the lane or the distance, `c` packs the last lane of a segment and the segment's mask
template <char mode> std::uint32_t shfl(std::uint32_t value, std::uint32_t b, std::uint32_t c, std::uint32_t mask,
                                        bool& in_range, Place place) {
  const int lane = cuda_host::current->lane, distance = int(b & 31), segment = int(c >> 8 & 31), clamp = int(c & 31);
  const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  int source;
  if (mode == 'u') source = lane - distance, in_range = source >= last;
  else if (mode == 'd') source = lane + distance, in_range = source <= last;
  else if (mode == 'b') source = lane ^ distance, in_range = source <= last;
  else source = first | (distance & ~segment), in_range = source <= last;
  return cuda_host::shuffle(mask, value, in_range ? source : lane, place);
}

// --- Arithmetic ------------------------------------------------------------------------------------------------------

template <class T> T fma_rn(T a, T b, T c) { return std::fma(a, b, c); }
template <int mode> float rounded_fma(float a, float b, float c) {
  const int before = std::fegetround();
  std::fesetround(mode);
  volatile float va = a, vb = b, vc = c;
  volatile float result = std::fma(va, vb, vc);
  std::fesetround(before);
  return result;
}
template <class T> T mul_hi(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return T(Wide(a) * Wide(b) >> 64);
  } else {
    using Wide = std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>;
    return T(Wide(a) * Wide(b) >> 8 * sizeof(T));
  }
}
template <class T> T shl(T a, std::uint32_t n) { return n >= 8 * sizeof(T) ? T(0) : T(a << n); }
template <class T> T shr(T a, std::uint32_t n) { return n >= 8 * sizeof(T) ? T(a < 0 ? -1 : 0) : T(a >> n); }
inline std::uint32_t shf_l(std::uint32_t low, std::uint32_t high, std::uint32_t n) {
  return std::uint32_t(((std::uint64_t(high) << 32 | low) << n) >> 32);
}
inline std::uint32_t shf_r(std::uint32_t low, std::uint32_t high, std::uint32_t n) {
  return std::uint32_t((std::uint64_t(high) << 32 | low) >> n);
}
template <class T> T bfi(T a, T b, std::uint32_t position, std::uint32_t length) {
  position &= 255, length &= 255;
  const T mask = shl<T>(length >= 8 * sizeof(T) ? T(~T(0)) : T((T(1) << length) - 1), position);
  return T((b & ~mask) | (shl<T>(a, position) & mask));
}
template <class T> T bfe(T a, std::uint32_t position, std::uint32_t length) {
  position &= 255, length &= 255;
  constexpr std::uint32_t bits = 8 * sizeof(T);
  if (length == 0) return 0;
  if (position >= bits) return T(a < 0 ? -1 : 0);
  if (length > bits - position) length = bits - position;
  using Unsigned = std::make_unsigned_t<T>;
  return T(T(Unsigned(a) << (bits - position - length)) >> (bits - length));
}
inline std::uint32_t prmt(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t(b) << 32 | a;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t select = selector >> 4 * i & 15, byte = std::uint32_t(bytes >> 8 * (select & 7)) & 255;
    result |= (select & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}
inline std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t table) {
  std::uint32_t result = 0;
  for (std::uint32_t i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline std::uint32_t brev(std::uint32_t a) {
  std::uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
  return result;
}
// The place of the highest bit, or how far to shift it to the left for it to be the last; ~0 where there is none
template <bool shift> std::uint32_t bfind(std::uint32_t a) {
  return a == 0 ? ~0u : std::uint32_t(shift ? __builtin_clz(a) : 31 - __builtin_clz(a));
}
template <class T> T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  else return a < b ? a : b;
}
template <class T> T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  else return a > b ? a : b;
}
template <class T> T minimum_nan(T a, T b) { return std::isnan(a) || std::isnan(b) ? T(NAN) : std::fmin(a, b); }
template <class T> T maximum_nan(T a, T b) { return std::isnan(a) || std::isnan(b) ? T(NAN) : std::fmax(a, b); }
inline float ftz(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
template <class T> T saturate(T x) { return x > 0 ? (x < 1 ? x : T(1)) : T(0); }
template <class T> T rcp(T a) { return 1 / a; }
template <class T> T rsqrt(T a) { return 1 / std::sqrt(a); }

// A float, already rounded to an integer, as one: out of range it is clamped, and NaN is 0
template <class To, class From> To to_integer(From x) {
  if (std::isnan(x)) return 0;
  if (x <= From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (x >= From(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(x);
}
inline std::uint32_t to_tf32(float x) {  // to nearest, ties away
  const auto bits = as<std::uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

}  // namespace ptx
