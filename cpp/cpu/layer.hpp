// The layer: its entry points, forward and backward, for any cell.
#pragma once
#include "backward.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH { namespace {

// A pass is built from its call and an arena; every thread of the team then runs a copy of it.
template <class PassType> void run_pass(PassType& pass, Ticks* ticks) {
  Meter whole(ticks);
  pass.fill();
  run_team(
      pass.how.threads,
      [](const void* shared, Team& team, int id) {
        PassType own = *static_cast<const PassType*>(shared);
        if (id == 0) own.meter = Meter(own.call.ticks);
        own.run(team, id);
      },
      &pass);
  whole.stop(&Ticks::all);
}

template <class Cell, class T> void forward(const Forward<T>& call) {
  Arena arena(call.scratch);
  ForwardPass<Cell, T> pass(call, arena);
  run_pass(pass, call.ticks);
}
template <class Cell, class T> void backward(const Backward<T>& call) {
  Arena arena(call.scratch);
  BackwardPass<Cell, T> pass(call, arena);
  run_pass(pass, call.ticks);
}
template <class Cell, class T> void pack_weights(const Problem<T>& problem, void* packed) {
  Arena arena(packed);
  PackedWeights<Cell, T> weights(problem, arena);
  weights.prepare(problem.weights);
  weights.fill(problem.weights, 0, 1);
}

// Scratch as it is when everything is wanted
template <class Cell, class T> Sizes sizes(const Problem<T>& problem) {
  T any;
  Arena forward_arena(nullptr), backward_arena(nullptr), packed_arena(nullptr);
  const PackedWeights<Cell, T> weights(problem, packed_arena);
  const ForwardPass<Cell, T> f({problem, {}, {}, {}, {}, {}, {}, 1}, forward_arena);
  Backward<T> everything{};
  everything.problem = problem, everything.threads = 1;
  everything.dx = everything.dw_ih = everything.dw_hh = everything.dw_hr = &any;
  const BackwardPass<Cell, T> b(everything, backward_arena);
  const bool checkpoints = problem.save == Save::checkpoints;
  const Index saved = problem.save == Save::all ? ForwardPass<Cell, T>::saved_size(weights, f.rows.count) : 0;
  const Index states = f.P * Vec<T>::width * (checkpoints ? f.checkpoints() * f.d.N : f.state_rows());
  return {std::size_t(saved), std::size_t(Cell::has_c ? states : 0), packed_arena.bytes(), forward_arena.bytes(),
          backward_arena.bytes()};
}

}}}  // namespace gatewise::GATEWISE_ARCH
