// A stream: stacked layers that are fed one step at a time. Weights are packed and every buffer is made once, so a
// step allocates nothing. It holds its own copy of everything: a snapshot of the weights, the state, the output.
#pragma once
#include <atomic>
#include <memory>
#include <stdexcept>
#include <vector>

#include "packed.hpp"

namespace gatewise::binding {

class AnySteps {
 public:
  virtual ~AnySteps() = default;
  virtual py::object step(py::handle x, bool tiny) = 0;
  virtual py::tuple state() const = 0;
  virtual void reset(py::handle h, py::handle c) = 0;
};

// The part that knows the element type. h is [L, N, R], c [L, N, H], twice: a step reads one and writes the other.
template <class T> class Steps final : public AnySteps {
 public:
  Steps(const std::vector<const LayerProblem*>& problems, int threads)
      : L(Index(problems.size())), N(problems[0]->dims.N), I(problems[0]->dims.I), H(problems[0]->dims.H),
        R(problems[0]->dims.R), threads_(threads), y_(empty<T>({N, R})), inner_y_(std::size_t(N * R)) {
    std::size_t scratch = 0;
    for (const LayerProblem* p : problems) {
      layers_.push_back({&p->cell<T>(), p->problem<T>(), pack<T>(*p, p->problem<T>())});
      // Nothing is read there: what lies there now may be gone by then. Only whether there is a projection counts.
      Weights<T>& weights = layers_.back().problem.weights;
      weights = {nullptr, nullptr, nullptr, nullptr, nullptr, weights.w_hr ? y_numbers() : nullptr};
      scratch = std::max(scratch, p->sizes.forward_scratch);
    }
    scratch_ = allocate(scratch);
    for (int k = 0; k < 2; ++k) h_[k].resize(std::size_t(L * N * R)), c_[k].resize(std::size_t(L * N * H));
  }

  // x may be the output of the step before, which is written when x has been read.
  py::object step(py::handle x, bool tiny) override {
    const Array input = borrow<T>(x, "x", {{"N", N}, {"I", I}});
    {
      const WhileComputing others_may_run(tiny);
      run(input.data<const T>());
    }
    std::memcpy(numbers(y_), h_[now_].data() + (L - 1) * N * R, std::size_t(N * R) * sizeof(T));
    return y_;
  }

  py::tuple state() const override {
    const auto copy = [&](const std::vector<T>& from, Index width) {
      const py::object array = empty<T>({L, N, width});
      std::copy(from.begin(), from.end(), numbers(array));
      return array;
    };
    return py::make_tuple(copy(h_[now_], R), copy(c_[now_], H));
  }

  void reset(py::handle h, py::handle c) override {
    const Axis l{"L", L}, n{"N", N}, j{"H", H}, r{R == H ? "H" : "R", R};
    const Array new_h = borrow_optional<T>(h, "h", {l, n, r}), new_c = borrow_optional<T>(c, "c", {l, n, j});
    fill(h_[now_], new_h.data<const T>()), fill(c_[now_], new_c.data<const T>());
    from_zeros_ = h.is_none();
  }

 private:
  struct Layer {
    const CellKernels<T>* kernels;
    Problem<T> problem;
    Memory packed;
  };

  const T* y_numbers() const { return numbers(y_); }
  static T* numbers(const py::object& array) {
    return reinterpret_cast<T*>(py::detail::array_proxy(array.ptr())->data);
  }
  static void fill(std::vector<T>& state, const T* values) {
    if (values) std::copy(values, values + state.size(), state.begin());
    else std::fill(state.begin(), state.end(), T(0));
  }

  void run(const T* x) {
    const int next = 1 - now_;
    for (Index l = 0; l < L; ++l) {
      const Layer& layer = layers_[std::size_t(l)];
      const Index of_h = l * N * R, of_c = l * N * H;
      Problem<T> problem = layer.problem;
      problem.sequence.x = x;
      problem.sequence.h0 = from_zeros_ ? nullptr : h_[now_].data() + of_h;  // as the first of many steps
      problem.sequence.c0 = c_[now_].data() + of_c;
      T* h = h_[next].data() + of_h;
      layer.kernels->forward({problem, inner_y_.data(), h, c_[next].data() + of_c, nullptr, nullptr, scratch_.get(),
                              threads_, layer.packed.get(), nullptr, now_ == 1});
      x = h;
    }
    now_ = next, from_zeros_ = false;
  }

  const Index L, N, I, H, R;
  const int threads_;
  const py::object y_;      // what every step returns
  std::vector<T> inner_y_;  // what the kernels call y; one step of it is h as well
  std::vector<Layer> layers_;
  Memory scratch_;
  std::vector<T> h_[2], c_[2];
  int now_ = 0;
  bool from_zeros_ = true;
};

class Stream {
 public:
  // One problem of one step for every layer, from the lowest to the highest
  Stream(const std::vector<const LayerProblem*>& problems, py::handle num_threads) {
    const Threads threads = choose_threads(num_threads);
    for (const LayerProblem* p : problems) tiny_ = tiny_ && p->is_tiny();
    const int count = tiny_ && threads.asked == 0 ? 1 : threads.count();
    if (problems.at(0)->is_double) steps_ = std::make_unique<Steps<double>>(problems, count);
    else steps_ = std::make_unique<Steps<float>>(problems, count);
  }

  py::object step(py::handle x) {
    const Entered entered(*this);
    return steps_->step(x, tiny_);
  }
  py::tuple state() {
    const Entered entered(*this);
    return steps_->state();
  }
  void reset(py::handle h, py::handle c) {
    const Entered entered(*this);
    steps_->reset(h, c);
  }

 private:
  // One thread at a time. Waiting for it is no way out: it may itself wait for the GIL, which this one holds.
  class Entered {
   public:
    explicit Entered(Stream& stream) : inside_(stream.inside_) {
      if (inside_.exchange(true, std::memory_order_acquire))
        throw std::runtime_error("stream: another thread is inside a step; give each thread a stream of its own");
    }
    Entered(const Entered&) = delete;
    ~Entered() { inside_.store(false, std::memory_order_release); }

   private:
    std::atomic<bool>& inside_;
  };

  std::unique_ptr<AnySteps> steps_;
  bool tiny_ = true;
  std::atomic<bool> inside_{false};
};

}  // namespace gatewise::binding
