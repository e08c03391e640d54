// The launch plan: how a layer's steps are dealt out over a device. One pure function of the device's limits and the
// problem, in plain C++: it runs, and is tested, where there is no CUDA.
//
// The persistent plan takes the whole sequence in one cooperative launch. A block owns some hidden units and keeps the
// weights that make them on chip, first in registers, then in shared memory:
//   forward   h[N, R] of the step before meets the G rows of w_hh that each unit has: G * U rows, R columns
//   backward  the gate gradients [N, G * H] meet the column of w_hh that each unit has, taken as a row: U rows, G * H
//             columns. So backward holds as many bytes as forward, and no block adds to what another one made.
// Every block reads all that was exchanged in a step, and no block may start a step before all have ended the last one:
// one barrier a step, over all blocks, which therefore must all be resident at once.
//
// Where no persistent plan fits, the stepwise one launches a product with the cell as its epilogue for each step.
#pragma once
#include <algorithm>
#include <cstddef>
#include <tuple>

#include "gatewise/gatewise.hpp"

namespace gatewise::cuda {

// Filled by device_limits() of kernels.hpp
struct DeviceLimits {
  Index multiprocessors;
  Index shared_per_block;           // bytes, the most that a kernel may opt in to: sharedMemPerBlockOptin
  Index shared_per_multiprocessor;  // bytes, of which every block also takes what the driver reserves
  Index registers_per_multiprocessor;
  Index threads_per_block, threads_per_multiprocessor, blocks_per_multiprocessor;
  Index warp_size;
  Index l2_bytes;
  Index major, minor;  // compute capability
};

// What the plan needs to know of a cell (cells.hpp) and a layer.
struct StepProblem {
  Index gates;
  bool has_c;
  bool has_product;   // its h meets w_hh
  bool has_middle;    // a stage of the layer in the middle of a step, or numbers standardised over a row
  Index N, H, R;      // sequences, hidden units, numbers in h
  Index storage;      // bytes of a weight and of a number exchanged
  Index accumulator;  // bytes of a sum
  bool backward;
};

enum class Reason { persistent, empty, device, no_product, middle, projection, weights, batch, exchange };

inline const char* sentence(Reason reason) {
  switch (reason) {
    case Reason::persistent:
      return "persistent: the weights stay on chip for the whole sequence";
    case Reason::empty:
      return "there is no sequence or no hidden unit";
    case Reason::device:
      return "the device has no warps of 32 threads or a compute capability below 7.5";
    case Reason::no_product:
      return "the cell has no recurrent product, so there are no weights to keep";
    case Reason::middle:
      return "the cell exchanges numbers in the middle of a step, which takes a second barrier";
    case Reason::projection:
      return "the projection exchanges numbers in the middle of a step: a second barrier";
    case Reason::weights:
      return "the recurrent weights are more than registers and shared memory hold";
    case Reason::batch:
      return "the batch is so large that a block's cell states do not fit into its registers";
    case Reason::exchange:
      return "what two steps exchange is more than the L2 cache holds";
  }
  return "";
}

// Registers, shared memory and threads in numbers; of the stepwise plan those after `weight_registers` are 0, except
// shared_bytes and the tile.
struct Plan {
  Reason reason;
  Index grid_units, grid_rows;      // blocks over hidden units, blocks over the batch (1 if persistent)
  Index block;                      // threads
  Index units;                      // that a block owns; the last one may own fewer
  Index batch_tile;                 // sequences that a block multiplies at a time
  Index shared_bytes;               // dynamic shared memory of a block
  Index weight_registers;           // a thread's registers that hold weights: which instance of the kernel
  Index registers;                  // a thread's, all in all: what the instance must not exceed
  Index fragments;                  // of the block's weights, in pieces of fragment_bytes
  Index register_fragments;         // those in registers; the others are in shared memory
  Index blocks_per_multiprocessor;  // how many could be resident; at most one is launched

  bool persistent() const { return reason == Reason::persistent; }
};

// A fragment is what a warp multiplies at a time: 8 rows of weights, 64 bytes each, four registers in each lane. That
// is the second operand of two tensor-core products of 16 sequences, 8 rows and 32 bytes: m16n8k8 of tf32, m16n8k16 of
// bf16. Without tensor cores the same bytes go to the same lanes.
constexpr Index fragment_rows = 8, fragment_row_bytes = 64, fragment_bytes = fragment_rows * fragment_row_bytes;
constexpr Index batch_fragment = 16;  // sequences in a product
constexpr Index lanes = 32, fragment_registers = fragment_bytes / lanes / 4;

// Registers are named by instructions, so how many of them hold weights is fixed when a kernel is compiled: it has an
// instance for each of these. A multiprocessor has 65536 registers, 128 for each of 512 threads, 255 for each of 256:
// the more of them hold weights, the fewer threads can run.
constexpr Index weight_registers[] = {0, 32, 96, 160};
constexpr Index block_sizes[] = {128, 256, 512};
constexpr Index batch_tiles[] = {16, 32};
constexpr Index cell_slots = 8;  // cells whose state a thread keeps, for the same reason a fixed number
constexpr Index max_registers = 255;
constexpr Index padded_row_bytes = fragment_row_bytes + 16;  // staged rows 80 bytes apart: 8 of them in 8 x 4 banks

constexpr Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

// How many blocks of a kernel are resident on one multiprocessor, as the hardware allocates. 0: it cannot be launched.
inline Index resident_blocks(const DeviceLimits& device, Index threads, Index registers, Index shared_bytes) {
  if (threads < 1 || threads > device.threads_per_block || registers > max_registers) return 0;
  if (shared_bytes > device.shared_per_block) return 0;
  const Index warps = ceil_div(threads, device.warp_size);
  const Index by_threads = device.threads_per_multiprocessor / device.warp_size / warps;

  // A warp gets its registers in units of 256, all from one of four equal parts of the register file.
  constexpr Index parts = 4, register_unit = 256;
  const Index warp_registers = round_up(std::max<Index>(registers, 1) * device.warp_size, register_unit);
  const Index by_registers = device.registers_per_multiprocessor / parts / warp_registers * parts / warps;

  // From compute capability 8.0 on the driver keeps 1 KB of each block for itself. Memory comes in units of 128 bytes,
  // 256 before.
  const Index reserved = device.major >= 8 ? 1024 : 0, unit = device.major >= 8 ? 128 : 256;
  const Index taken = round_up(shared_bytes + reserved, unit);
  const Index by_shared = taken ? device.shared_per_multiprocessor / taken : device.blocks_per_multiprocessor;
  return std::min({by_threads, by_registers, by_shared, device.blocks_per_multiprocessor});
}

// Registers a thread of the persistent kernel needs besides its weights.
inline Index working_registers(const StepProblem& problem) {
  const Index words = problem.accumulator / 4;
  const Index addresses = 32;                                      // pointers, strides, counters
  const Index gates = 4 * problem.gates * words;                   // gx, gh, the activated gates and their gradients
  const Index sums = batch_tiles[1] / batch_fragment * 4 * words;  // 16 x 8 sums over 32 lanes, for the larger tile
  const Index operands = 2 * fragment_registers + fragment_registers;   // 16 rows of h, 8 of weights, 64 bytes each
  const Index states = Index{problem.has_c} + Index{problem.backward};  // c; of backward dc, and dh past the product
  return addresses + gates + sums + operands + states * cell_slots * words;
}

// Bytes of shared memory of a block of the persistent kernel besides its weights.
inline Index working_shared(const StepProblem& problem, Index warps, Index batch_tile, Index row_tiles) {
  // Each warp fetches the columns of h that meet its own fragments: one step of 64 bytes while it multiplies the last.
  const Index staged = warps * 2 * batch_tile * padded_row_bytes;
  // The warps share out the fragments in order, rows of tiles first, in equal runs. So a warp sums over a part of the
  // columns, and leaves its sums for the cells, which add the parts in a fixed order. A run that begins in one row of
  // tiles and ends in another leaves two; runs and rows end in at most warps + row_tiles - 1 places.
  const Index sums = (warps + row_tiles - 1) * fragment_rows * batch_tile * problem.accumulator;
  return staged + sums;
}

namespace detail {

inline Plan stepwise(const DeviceLimits& device, const StepProblem& problem, Reason reason) {
  // A block makes a tile of batch x rows of the product, whose operands come 128 bytes of columns at a time, twice
  // buffered, and its cells. The widest tile reads the fewest bytes, but not at the price of idle multiprocessors. All
  // of it fits into the 48 KB that every device has without opting in.
  constexpr Index column_bytes = 128 + 16;
  const Index unit_rows = problem.backward ? 1 : problem.gates;
  Plan plan{reason};
  plan.block = 256;
  plan.batch_tile = problem.N <= batch_tiles[0] ? batch_tiles[0] : batch_tiles[1];
  plan.grid_rows = ceil_div(problem.N, plan.batch_tile);
  for (const Index rows : {64, 32, 16, 8}) {
    plan.units = std::max<Index>(1, rows / unit_rows);
    plan.grid_units = ceil_div(problem.H, plan.units);
    const Index operands = 2 * (plan.batch_tile + plan.units * unit_rows) * column_bytes;
    plan.shared_bytes = operands + plan.batch_tile * plan.units * unit_rows * problem.accumulator;
    if (plan.grid_units * plan.grid_rows >= device.multiprocessors) break;
  }
  return plan;
}

}  // namespace detail

inline Plan plan_layer(const DeviceLimits& device, const StepProblem& problem) {
  const auto stepwise = [&](Reason reason) { return detail::stepwise(device, problem, reason); };
  if (problem.N < 1 || problem.H < 1) return stepwise(Reason::empty);
  if (device.warp_size != lanes || device.major * 10 + device.minor < 75) return stepwise(Reason::device);
  if (!problem.has_product) return stepwise(Reason::no_product);
  if (problem.has_middle) return stepwise(Reason::middle);
  if (problem.R != problem.H) return stepwise(Reason::projection);

  // Nothing but the L2 cache can feed every block with all of h at each step. h of two steps is there at once: the one
  // that is read and the one that is written.
  const Index columns = problem.backward ? problem.gates * problem.H : problem.R;
  if (2 * problem.N * columns * problem.storage > device.l2_bytes) return stepwise(Reason::exchange);

  // One block a multiprocessor: two would hold no more weights than one, read h twice and make the barrier longer. The
  // fewest units that let the grid cover all; then as many as fill the same fragments, which costs no memory and saves
  // blocks.
  const Index unit_rows = problem.backward ? 1 : problem.gates;
  const Index row_tiles = ceil_div(unit_rows * ceil_div(problem.H, device.multiprocessors), fragment_rows);
  const Index units = std::min(problem.H, row_tiles * fragment_rows / unit_rows);
  const Index fragments = row_tiles * ceil_div(columns * problem.storage, fragment_row_bytes);

  // Of all that fits, what reads the fewest weights from shared memory (each pass over the batch reads them all); then
  // what leaves the busiest warp the least to multiply; then the fewest threads, to wait for each other at barriers.
  const auto cost = [&](const Plan& plan) {
    const Index passes = ceil_div(problem.N, plan.batch_tile), warps = plan.block / lanes;
    return std::make_tuple(passes * (plan.fragments - plan.register_fragments), passes * ceil_div(fragments, warps),
                           plan.block, plan.shared_bytes, plan.weight_registers);
  };
  Plan best{Reason::weights};
  for (const Index held : weight_registers)
    for (const Index block : block_sizes)
      for (const Index batch_tile : batch_tiles) {
        const Index warps = block / lanes, passes = ceil_div(problem.N, batch_tile);
        Plan plan{Reason::persistent, ceil_div(problem.H, units), 1, block, units, batch_tile};
        plan.weight_registers = held;
        plan.registers = round_up(held + working_registers(problem), 8);
        plan.fragments = fragments;
        // Equal runs to within one: either no warp has more than its registers hold, or none has less
        plan.register_fragments = std::min(fragments, warps * (held / fragment_registers));
        plan.shared_bytes = (fragments - plan.register_fragments) * fragment_bytes +
                            working_shared(problem, warps, batch_tile, row_tiles);
        plan.blocks_per_multiprocessor = resident_blocks(device, block, plan.registers, plan.shared_bytes);
        if (plan.blocks_per_multiprocessor < 1) continue;
        if (passes * ceil_div(std::min(problem.N, batch_tile) * units, block) > cell_slots) {
          if (!best.persistent()) best.reason = Reason::batch;  // the weights would fit
          continue;
        }
        if (!best.persistent() || cost(plan) < cost(best)) best = plan;
      }
  return best.persistent() ? best : stepwise(best.reason);
}

}  // namespace gatewise::cuda
