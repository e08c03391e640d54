// Packed weights that outlive a call. A layer's weights are the user's to write into, so nothing tells when they
// change: beside the packed weights lies a copy of what they were packed from, and a use compares all of it, bit for
// bit. Reading the weights so takes a fraction of the time that packing takes. A caller who knows that nobody can have
// written since the last use says so by the same `promise`, a number that is not 0, and they are not read at all.
#pragma once
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "memory.hpp"
#include "problem.hpp"

namespace gatewise::binding {

template <class T> Memory pack(const LayerProblem& p, const Problem<T>& problem) {
  Memory packed = allocate(p.sizes.packed);
  p.cell<T>().pack(problem, packed.get());
  return packed;
}

class PackedWeights {
 public:
  static constexpr std::size_t kWeights = 6;
  // What was packed is never written again: a call that runs on it while another packs anew keeps it alive.
  struct Packed {
    const Kernels* kernels;  // of one cell on one arch
    bool is_double;
    Dims dims;
    std::array<std::vector<char>, kWeights> weights;
    Memory packed;
  };

  // Packing takes up to half of a call of one row, some per cent of one of a hundred, one per cent of one of two
  // thousand; of more it is not worth the memory. A single step reads them as they are, half as much memory as the two
  // copies that are to be compared: LSTM, I = H = 256, N = 1, weights in the third level of cache: 264 -> 71 µs.
  static bool pays(const LayerProblem& p, Index promise) {
    return p.count_rows() <= kMostRows && (promise != 0 || p.dims.T > 1);
  }

  // The problem's weights packed for its kernels. Needs no GIL.
  template <class T> std::shared_ptr<const Packed> of(const LayerProblem& p, Index promise) {
    const Seen now{promise, places_of<T>(p)};
    std::shared_ptr<const Packed> old;
    Seen last;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      old = packed_, last = seen_;
    }
    const bool fits = old && is_for<T>(*old, p);
    if (fits && promise != 0 && now == last) return old;
    auto packed = old;
    if (!fits || !has_weights_of<T>(*old, p)) packed = make<T>(p), ++count_;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (packed_ == old) packed_ = packed, seen_ = now;  // else another thread was here, and may have seen later ones
    return packed;
  }

  // Every other use is to walk the weights from the last, which the one before has left in cache.
  bool turn() { return turns_.fetch_add(1, std::memory_order_relaxed) % 2; }
  // How many times it had to pack
  int count() const { return count_; }

 private:
  static constexpr Index kMostRows = 2048;

  using Places = std::array<const void*, kWeights>;
  struct Seen {  // which weights packed_ was last found to be made of
    Index promise = 0;
    Places places{};
    bool operator==(const Seen& other) const { return promise == other.promise && places == other.places; }
  };

  std::mutex mutex_;  // of packed_ and seen_, for the blink of an eye
  std::shared_ptr<const Packed> packed_;
  Seen seen_;
  std::atomic<int> count_{0};
  std::atomic<unsigned> turns_{0};

  template <class T> struct Span {
    const T* values;
    std::size_t bytes;
  };
  template <class T> static std::array<Span<T>, kWeights> weights_of(const LayerProblem& p) {
    const Weights<T> w = p.problem<T>().weights;
    const std::size_t hidden = std::size_t(p.dims.H) * sizeof(T), rows = std::size_t(p.info.G) * hidden;
    return {{{w.w_ih, rows * std::size_t(p.dims.I)},
             {w.w_hh, w.w_hh ? rows * std::size_t(p.dims.R) : 0},
             {w.b_ih, w.b_ih ? rows : 0},
             {w.b_hh, w.b_hh ? rows : 0},
             {w.w_unit, w.w_unit ? hidden * std::size_t(p.info.U) : 0},
             {w.w_hr, w.w_hr ? hidden * std::size_t(p.dims.R) : 0}}};
  }

  template <class T> static Places places_of(const LayerProblem& p) {
    Places places{};
    const auto weights = weights_of<T>(p);
    for (std::size_t k = 0; k < places.size(); ++k) places[k] = weights[k].values;
    return places;
  }
  template <class T> static bool is_for(const Packed& packed, const LayerProblem& p) {
    return packed.kernels == &p.kernels && packed.is_double == p.is_double && packed.dims.I == p.dims.I &&
           packed.dims.H == p.dims.H && packed.dims.R == p.dims.R;
  }
  template <class T> static bool has_weights_of(const Packed& packed, const LayerProblem& p) {
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
    std::array<const T*, kWeights> copies{};
    for (std::size_t k = 0; k < weights.size(); ++k) {
      const char* bytes = reinterpret_cast<const char*>(weights[k].values);
      if (bytes) packed->weights[k].assign(bytes, bytes + weights[k].bytes);
      if (bytes) copies[k] = reinterpret_cast<const T*>(packed->weights[k].data());
    }
    Problem<T> problem = p.problem<T>();
    problem.weights = {copies[0], copies[1], copies[2], copies[3], copies[4], copies[5]};
    packed->packed = pack<T>(p, problem);
    return packed;
  }
};

}  // namespace gatewise::binding
