// Runs problems on one arch, so that the instructions of each forward and each backward pass can be counted:
//
//   instructions ARCH PROBLEM...         under valgrind --tool=callgrind --toggle-collect=counted
//   instructions --step ARCH PROBLEM...  by itself, one instruction at a time; thousands of times slower than the pass
//
// A problem is written as in `gatewise bench`. Prints the compiler; then a line a pass: problem, pass, the least it
// could take (its multiply-adds, a register each), and with --step its instructions. benchmarks/instructions.py calls
// this and judges.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "layer.hpp"

using namespace gatewise;

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
static void set_trap_flag(bool) { throw std::invalid_argument("--step: an x86-64 CPU is needed"); }
#endif

static std::uint64_t count_steps(void (*run)(const void*), const void* context) {
  std::signal(SIGTRAP, [](int) { steps = steps + 1; });
  steps = 0;
  set_trap_flag(true);
  counted(run, context);
  set_trap_flag(false);
  return steps;
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
#if defined(__clang__)
  std::printf("clang++ %d.%d.%d\n", __clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  std::printf("g++ %d.%d.%d\n", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
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
