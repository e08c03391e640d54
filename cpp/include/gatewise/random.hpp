// Random bits that are a function of where they are used: (seed, step, sequence, unit) -> 32 bits. So a mask is the
// same for any number of threads and on any arch, and backward draws it again instead of keeping it.
//
// The mixers are splitmix64's (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014) and the
// multiply-xorshift "lowbias32" of Wellons' hash prospector. Python's twin stands in python/gatewise/reference.py.
#pragma once
#include <cstdint>

#include "gatewise/arch.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH {

GATEWISE_FN std::uint64_t mix64(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
// Of the lowest 32 bits of a number, or of every lane of a register; what stands above them must be zero, and is.
template <class U> GATEWISE_FN U mix32(U x) {
  constexpr std::uint32_t all = 0xffffffffu;
  x = x ^ (x >> 16);
  x = (x * 0x7feb352du) & all;
  x = x ^ (x >> 15);
  x = (x * 0x846ca68bu) & all;
  return x ^ (x >> 16);
}

// What one row of units shares
GATEWISE_FN std::uint64_t random_key(std::uint64_t seed, std::int64_t step, std::int64_t sequence) {
  const std::uint64_t of_step = mix64(seed + 0x9e3779b97f4a7c15u * (std::uint64_t(step) + 1));
  return mix64(of_step + 0xd1b54a32d192ed03u * (std::uint64_t(sequence) + 1));
}
template <class U> GATEWISE_FN U random_bits(std::uint64_t key, U unit) {
  constexpr std::uint32_t all = 0xffffffffu;
  return mix32(mix32((unit * 0x9e3779b9u + std::uint32_t(key)) & all) ^ std::uint32_t(key >> 32));
}
// Another 32 for the same unit
template <class U> GATEWISE_FN U more_bits(U bits) { return mix32((bits + 0x85ebca6bu) & 0xffffffffu); }

// An event of probability p is: the bits without their lowest are below this.
GATEWISE_FN std::int32_t random_limit(double p) { return std::int32_t(p * 0x1p31); }

}}  // namespace gatewise::GATEWISE_ARCH
