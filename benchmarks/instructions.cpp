// Runs problems on one arch, so that the instructions of each forward and each backward pass can be counted:
//
//   instructions ARCH PROBLEM...         under valgrind --tool=callgrind --toggle-collect=counted
//   instructions --step ARCH PROBLEM...  by itself, one instruction at a time; thousands of times slower than the pass
//
// A problem is written as in `gatewise bench`. Prints the compiler; then a line a pass: problem, pass, the least it
// could take (its multiply-adds, a register each), and with --step its instructions. Exits with 3 and a sentence where
// the arch does not run, or single steps do not work. benchmarks/instructions.py calls this and judges.
#include <sys/resource.h>

#include <csignal>
#include <cstdint>

#include "layer.hpp"

using namespace gatewise;

// The C library picks its memcpy by CPU, and counts would differ from machine to machine. These stand in front of it,
// at a price that is everyone's: eight bytes a round. (Without the empty statement the compiler sees what such a loop
// does, and calls the function in which it stands.)
extern "C" void* memcpy(void* __restrict to, const void* __restrict from, std::size_t n) {
  auto* t = static_cast<unsigned char*>(to);
  auto* f = static_cast<const unsigned char*>(from);
  for (; n >= 8; n -= 8, t += 8, f += 8) {
    asm volatile("" ::: "memory");
    __builtin_memcpy(t, f, 8);
  }
  for (; n > 0; --n) {
    asm volatile("" ::: "memory");
    *t++ = *f++;
  }
  return to;
}
extern "C" void* memset(void* to, int value, std::size_t n) {
  auto* t = static_cast<unsigned char*>(to);
  const std::uint64_t eight = 0x0101010101010101u * static_cast<unsigned char>(value);
  for (; n >= 8; n -= 8, t += 8) {
    asm volatile("" ::: "memory");
    __builtin_memcpy(t, &eight, 8);
  }
  for (; n > 0; --n) {
    asm volatile("" ::: "memory");
    *t++ = static_cast<unsigned char>(value);
  }
  return to;
}

extern "C" __attribute__((noinline)) void counted(void (*run)(const void*), const void* context) {
  run(context);
  asm volatile("");  // or the call above becomes a jump, and this function is left before it
}

// ---- single steps: with the trap flag set, the CPU signals after every instruction. For the arch that valgrind does
// not know, on machines whose counters a hypervisor hides.

static volatile std::uint64_t steps;

#if defined(__x86_64__)
static void set_trap_flag(bool on) {
  // Below the red zone, which the compiler may be using
  asm volatile(
      "lea -128(%%rsp), %%rsp \n pushfq \n andq $~0x100, (%%rsp) \n orq %0, (%%rsp) \n popfq \n lea 128(%%rsp), %%rsp"
      :
      : "r"(on ? std::uint64_t(0x100) : 0)
      : "memory", "cc");
}
#else
static void set_trap_flag(bool) {}  // so single_steps_work() says no
#endif

static std::uint64_t count_steps(void (*run)(const void*), const void* context) {
  steps = 0;
  set_trap_flag(true);
  counted(run, context);
  set_trap_flag(false);
  return steps;
}

// Emulators, and kernels that stand in for Linux, may deliver no signal, or not one an instruction.
static bool single_steps_work() {
  const rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);  // a trap that is not delivered kills the program; nobody wants its memory
  std::signal(SIGTRAP, [](int) { steps = steps + 1; });
  const auto empty = count_steps([](const void*) {}, nullptr);
  const auto ten = count_steps(
      [](const void*) { asm volatile("nop\n nop\n nop\n nop\n nop\n nop\n nop\n nop\n nop\n nop"); }, nullptr);
  return ten == empty + 10;
}

// ---- problems

template <class Call> struct Pass {
  void (*kernel)(const Call&);
  Call call;
  static void run(const void* pass) { static_cast<const Pass*>(pass)->kernel(static_cast<const Pass*>(pass)->call); }
};

template <class T> void run(const Kernels& cell, const Named& named, int lanes, bool by_steps) {
  std::mt19937 generator(3);
  Layer<T> layer(cell, named.dims, named.options, generator);
  const auto count = [&](const char* name, const auto& pass, double multiply_adds) {
    std::printf("%s %s %.0f", named.text.c_str(), name, multiply_adds / lanes);
    if (by_steps) std::printf(" %llu", static_cast<unsigned long long>(count_steps(pass.run, &pass)));
    else counted(pass.run, &pass);
    std::puts("");
  };
  double rows = double(named.dims.T) * double(named.dims.N);
  if (!layer.lengths.empty()) rows = 0;
  for (const Index length : layer.lengths) rows += double(length);
  const double forward = rows * cell.info.G * double(named.dims.H) * double(named.dims.I + named.dims.H);
  count("forward", Pass<Forward<T>>{layer.kernels().forward, layer.forward_call(1)}, forward);
  count("backward", Pass<Backward<T>>{layer.kernels().backward, layer.backward_call(1)}, 2 * forward);
}

int main(int argc, char** argv) try {
  const bool by_steps = argc > 1 && std::string(argv[1]) == "--step";
  if (argc < by_steps + 3) throw std::invalid_argument("expected [--step] ARCH PROBLEM...");
  const Arch& arch = arch_named(argv[by_steps + 1]);
  if (!arch.runs_here()) {
    std::printf("%s does not run here\n", arch.name);
    return 3;
  }
  if (by_steps && !single_steps_work()) {
    std::puts("single steps do not work here");
    return 3;
  }
#if defined(__clang__)
  std::printf("clang++ %d.%d.%d", __clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  std::printf("g++ %d.%d.%d", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
#if defined(__CET__) || defined(__SSP_STRONG__) || defined(_FORTIFY_SOURCE)
  std::printf(" hardened");  // as distributions configure it; the same version elsewhere makes other code
#endif
  std::puts("");
  for (int i = by_steps + 2; i < argc; ++i) {
    const Named named(argv[i]);
    const Kernels& cell = cell_named(arch, named.cell);
    if (named.dtype == "f32") run<float>(cell, named, arch.kernels->lanes_f32, by_steps);
    else run<double>(cell, named, arch.kernels->lanes_f64, by_steps);
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "instructions: %s\n", error.what());
  return 2;
}
