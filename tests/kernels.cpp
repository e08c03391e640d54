// Runs the kernel library by itself, where Python does not reach: under the sanitizers, under an emulator.
//
//   kernels [ARCH]                          random problems: one thread's bits are compared with three threads', and
//                                           inference with training; prints how many problems ran
//   kernels --results PROBLEM...            a line for each result on each arch that runs here: arch, problem, name,
//                                           values; the inputs are the same numbers on every machine
//   kernels --evaluate ARCH FUNCTION DTYPE  exp, tanh or sigmoid of the numbers on standard input, raw in, raw out
//
// Exits with 1 if bits differ or a NaN is left. tests/test_kernels_sanitized.py and tests/test_neon.py run it.
#include <cstdlib>

#include "layer.hpp"

using namespace gatewise;

std::mt19937 generator(3);
Index between(Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(generator); }
bool coin() { return between(0, 1) == 1; }

template <class T> struct Checked {
  const Arch& arch;
  Layer<T> layer;

  void require(bool truth, const std::string& array, const char* otherwise) const {
    if (truth) return;
    std::printf("%s %s: %s: %s\n", arch.name, layer.cell.info.name, array.c_str(), otherwise);
    std::exit(1);
  }
  // The first arrays of results(): all of them, or those of a forward pass
  void require_same_bits(Layer<T> other, std::size_t arrays, const char* otherwise) {
    const auto mine = layer.results(), others = other.results();
    for (std::size_t i = 0; i < arrays; ++i) {
      const auto &a = *mine[i].second, &b = *others[i].second;
      require(a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0, mine[i].first, otherwise);
    }
  }
};

template <class T> void check(const Arch& arch, const Kernels& cell, Dims dims) {
  Options options;
  for (bool* option :
       {&options.lengths, &options.reverse, &options.b_ih, &options.b_hh, &options.dx, &options.state, &options.reset,
        &options.mask, &options.zoneout, &options.clip, &options.project, &options.batch_major})
    *option = coin();
  options.save = Save(between(0, 2)), options.reset_to = ResetTo(between(0, 1));
  if (options.project && cell.info.has_c && !cell.info.normed) dims.R = between(1, dims.H);
  Checked<T> one{arch, {cell, dims, options, generator}};
  Layer<T> three = one.layer, inference = one.layer;
  one.layer.forward(1), one.layer.backward(1);
  three.forward(3), three.backward(3);
  inference.forward(3, false);
  for (const auto& [name, array] : one.layer.results())
    for (const T value : *array) one.require(!std::isnan(value), name, "a NaN is left");
  one.require_same_bits(three, three.results().size(), "three threads differ from one");
  one.require_same_bits(inference, 3, "inference differs from training");
}

int check_random_problems(const std::string& only) {
  int problems = 0;
  const auto both = [&](const Arch& arch, const Kernels& cell, Dims f32, Dims f64) {
    check<float>(arch, cell, f32), check<double>(arch, cell, f64);
    problems += 2;
  };
  const auto small = [] {
    const Index H = between(1, 40);
    return Dims{between(0, 6), between(0, 9), between(1, 20), H, H};
  };
  for (const Arch* arch = archs().begin; arch != archs().end; ++arch) {
    if (!arch->runs_here() || (!only.empty() && only != arch->name)) continue;
    for (int c = 0; c < arch->kernels->cell_count; ++c) {
      const Kernels& cell = arch->kernels->cells[c];
      // Small and odd; then above the threshold at which a team forms, shared by rows, by panels, in several chunks
      for (int k = 0; k < 6; ++k) both(*arch, cell, small(), small());
      for (const Dims d : {Dims{8, 40, 11, 65, 65}, Dims{4, 5, 20, 258, 258}, Dims{300, 8, 2, 33, 33}})
        both(*arch, cell, d, d);
    }
  }
  std::printf("%d problems\n", problems);
  return 0;
}

template <class T> void print_results(const Arch& arch, const Named& named) {
  std::mt19937 seeded(3);
  Layer<T> layer(cell_named(arch, named.cell), named.dims, named.options, seeded);
  layer.forward(1), layer.backward(1);
  for (const auto& [name, array] : layer.results()) {
    std::printf("%s %s %s", arch.name, named.text.c_str(), name.c_str());
    for (const T value : *array) std::printf(" %.17g", double(value));
    std::puts("");
  }
}

template <class T> void evaluate(const Functions<T>& functions, const std::string& name) {
  const Map<T> map = name == "exp"       ? functions.exp
                     : name == "tanh"    ? functions.tanh
                     : name == "sigmoid" ? functions.sigmoid
                                         : throw std::invalid_argument("function: none is called " + name);
  std::vector<T> x;
  for (T value; std::fread(&value, sizeof value, 1, stdin) == 1;) x.push_back(value);
  std::vector<T> y(x.size());
  map(x.data(), y.data(), x.size());
  std::fwrite(y.data(), sizeof(T), y.size(), stdout);
}

int main(int argc, char** argv) try {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (argc <= 2 && mode[0] != '-') return check_random_problems(mode);
  if (mode == "--evaluate" && argc == 5) {
    const ArchKernels& kernels = *arch_named(argv[2]).kernels;
    if (argv[4] == std::string("f32")) evaluate(kernels.f32, argv[3]);
    else evaluate(kernels.f64, argv[3]);
  } else if (mode == "--results") {
    for (int i = 2; i < argc; ++i)
      for (const Arch* arch = archs().begin; arch != archs().end; ++arch) {
        if (!arch->runs_here()) continue;
        const Named named(argv[i]);
        if (named.dtype == "f32") print_results<float>(*arch, named);
        else print_results<double>(*arch, named);
      }
  } else throw std::invalid_argument("expected [ARCH], --results PROBLEM... or --evaluate ARCH FUNCTION DTYPE");
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "kernels: %s\n", error.what());
  return 2;
}
