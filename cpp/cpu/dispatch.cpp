// The only file that asks the CPU what it can do. GATEWISE_ARCH forces an answer; it is read at every call, so
// that one process can compare arches.
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "gatewise/gatewise.hpp"

namespace gatewise {

// The build defines GATEWISE_HAS_<arch> for every arch that it compiled.
#define GATEWISE_DECLARE(arch)      \
  namespace arch {                  \
  extern const ArchKernels kernels; \
  }
#ifdef GATEWISE_HAS_AVX512
GATEWISE_DECLARE(avx512)
#endif
#ifdef GATEWISE_HAS_AVX2
GATEWISE_DECLARE(avx2)
#endif
#ifdef GATEWISE_HAS_NEON
GATEWISE_DECLARE(neon)
#endif
GATEWISE_DECLARE(generic)

ArchList archs() {
  static const Arch list[] = {
#ifdef GATEWISE_HAS_AVX512
      {"avx512",
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
       },
       &avx512::kernels},
#endif
#ifdef GATEWISE_HAS_AVX2
      {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &avx2::kernels},
#endif
#ifdef GATEWISE_HAS_NEON
      {"neon", [] { return true; }, &neon::kernels},  // part of every aarch64
#endif
      {"generic", [] { return true; }, &generic::kernels},
  };
  return {std::begin(list), std::end(list)};
}

const Arch& choose_arch() {
  const ArchList all = archs();
  static const Arch& best = [&]() -> const Arch& {
    const Arch* arch = all.begin;
    while (!arch->runs_here()) ++arch;
    return *arch;
  }();
  const char* forced = std::getenv("GATEWISE_ARCH");
  if (forced == nullptr || *forced == '\0') return best;
  std::string known;
  for (const Arch* arch = all.begin; arch != all.end; ++arch) {
    const bool runs = arch->runs_here();
    if (runs && arch->name == std::string(forced)) return *arch;
    known += std::string(known.empty() ? "" : ", ") + arch->name + (runs ? "" : " (not on this CPU)");
  }
  throw std::invalid_argument("GATEWISE_ARCH: expected one of " + known + "; got '" + forced + "'");
}

}  // namespace gatewise
