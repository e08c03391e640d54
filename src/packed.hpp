// Packed weights that outlive a call. A layer's weights are the user's to write into, so nothing tells when they
// change: beside the packed weights lies a copy of what they were packed from, and every use compares all of it, bit
// for bit. Reading the weights so takes a fraction of the time that packing takes.
#pragma once
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "problem.hpp"

namespace gatewise::binding {

template <class T> std::unique_ptr<char[]> pack(const LayerProblem& p, const Problem<T>& problem) {
  std::unique_ptr<char[]> packed(new char[p.sizes.packed]);
  p.cell<T>().pack(problem, packed.get());
  return packed;
}

class PackedWeights {
 public:
  // What was packed is never written again: a call that runs on it while another packs anew keeps it alive.
  struct Packed {
    const Kernels* kernels;  // of one cell on one arch
    bool is_double;
    Dims dims;
    std::array<std::vector<char>, 4> weights;
    std::unique_ptr<char[]> packed;
  };

  // To compare takes a third of the time that packing does: of a call of one row that saves up to half, of a hundred
  // rows some per cent, and of more it is not worth the memory.
  static bool pays(const LayerProblem& p) { return p.count_rows() <= kMostRows; }

  // The problem's weights packed for its kernels. Needs no GIL.
  template <class T> std::shared_ptr<const Packed> of(const LayerProblem& p) {
    std::shared_ptr<const Packed> packed;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      packed = packed_;
    }
    if (packed && is_of<T>(*packed, p)) return packed;
    packed = make<T>(p);
    ++count_;
    const std::lock_guard<std::mutex> lock(mutex_);
    return packed_ = packed;
  }

  // How many times it had to pack
  int count() const { return count_; }

 private:
  static constexpr Index kMostRows = 128;

  std::mutex mutex_;  // of packed_, for the blink of an eye
  std::shared_ptr<const Packed> packed_;
  std::atomic<int> count_{0};

  template <class T> struct Span {
    const T* values;
    std::size_t bytes;
  };
  template <class T> static std::array<Span<T>, 4> weights_of(const LayerProblem& p) {
    const Weights<T> w = p.problem<T>().weights;
    const std::size_t rows = std::size_t(p.kernels.info.G * p.dims.H) * sizeof(T);
    return {{{w.w_ih, rows * std::size_t(p.dims.I)},
             {w.w_hh, rows * std::size_t(p.dims.H)},
             {w.b_ih, w.b_ih ? rows : 0},
             {w.b_hh, w.b_hh ? rows : 0}}};
  }

  template <class T> static bool is_of(const Packed& packed, const LayerProblem& p) {
    if (packed.kernels != &p.kernels || packed.is_double != p.is_double) return false;
    if (packed.dims.I != p.dims.I || packed.dims.H != p.dims.H) return false;
    const auto weights = weights_of<T>(p);
    for (std::size_t k = 0; k < weights.size(); ++k) {
      const auto& [values, bytes] = weights[k];
      if (packed.weights[k].size() != bytes) return false;
      if (bytes && std::memcmp(packed.weights[k].data(), values, bytes) != 0) return false;
    }
    return true;
  }

  // Packs the copy, not the original: whoever writes there in the meantime is noticed by the next use.
  template <class T> static std::shared_ptr<const Packed> make(const LayerProblem& p) {
    auto packed = std::make_shared<Packed>(Packed{&p.kernels, p.is_double, p.dims, {}, nullptr});
    const auto weights = weights_of<T>(p);
    std::array<const T*, 4> copies{};
    for (std::size_t k = 0; k < weights.size(); ++k) {
      const char* bytes = reinterpret_cast<const char*>(weights[k].values);
      if (bytes) packed->weights[k].assign(bytes, bytes + weights[k].bytes);
      if (bytes) copies[k] = reinterpret_cast<const T*>(packed->weights[k].data());
    }
    Problem<T> problem = p.problem<T>();
    problem.weights = {copies[0], copies[1], copies[2], copies[3]};
    packed->packed = pack<T>(p, problem);
    return packed;
  }
};

}  // namespace gatewise::binding
