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

#ifdef __CUDACC__
#define GATEWISE_PLAN_FN __host__ __device__
#else
#define GATEWISE_PLAN_FN
#endif

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
  Index batch_tile;                 // sequences that a block multiplies before it runs their cells
  Index shared_bytes;               // dynamic shared memory of a block
  Index weight_registers;           // a thread's registers that hold weights
  Index registers;                  // a thread's, all in all: what no kernel of persistent.hpp exceeds
  Index fragments;                  // of the block's weights, with what is empty for want of rows or columns
  Index register_fragments;         // those in registers; the others are in shared memory
  Index blocks_per_multiprocessor;  // how many could be resident; at most one is launched

  bool persistent() const { return reason == Reason::persistent; }
};

// A fragment is what a warp multiplies at a time: 8 rows of weights, 64 bytes each, of which a lane has 16. Lane l has
// those of row l / 4 from byte 16 (l % 4) on. That is the second operand of two tensor-core products of 16 sequences, 8
// rows and 32 bytes (m16n8k8 of tf32, m16n8k16 of bf16), whose columns may be taken in any order, the same for h.
// Without tensor cores the lane multiplies its numbers, with 4 sequences at a time, and 4 lanes add what they got.
constexpr Index fragment_rows = 8, fragment_row_bytes = 64, fragment_bytes = fragment_rows * fragment_row_bytes;
constexpr Index lanes = 32, fragment_registers = fragment_bytes / lanes / 4;
constexpr Index batch_fragment = 16;  // sequences in a product

// A warp takes up to four fragments in a round, each with sums of its own: as many tiles of 8 rows as there are, so
// that h is read once for all of them, and where there are few, the next pieces of their rows.
constexpr int round_fragments = 4, round_registers = int(round_fragments * fragment_registers);

// Registers are named by instructions, so how many of them hold weights is fixed when a kernel is compiled; further
// weights lie in shared memory. The rest of the 255 that a thread of 256 can have is for sums, operands and the cell.
#ifdef GATEWISE_WEIGHT_REGISTERS  // fewer, so that a test's small problem fills them
constexpr Index weight_registers(Index) { return GATEWISE_WEIGHT_REGISTERS; }
#else
constexpr Index weight_registers(Index accumulator) { return accumulator == 4 ? 128 : 96; }
#endif
constexpr Index max_registers = 255, most_threads = 256;  // what the kernels are compiled for: __launch_bounds__
constexpr Index block_sizes[] = {64, 128, 256};
constexpr Index batch_tiles[] = {16, 32};
constexpr Index cell_slots = 8;   // cells whose state a thread keeps, for the same reason a fixed number
constexpr Index sum_padding = 8;  // numbers between sums of two sequences: rows of tiles spread over the banks

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

// How the warps of a block share out its weights: groups of warps by rows, in each group every warp a run of columns.
struct Shares {
  int row_groups, tiles;  // tiles of 8 rows in each group, at most round_fragments
  int column_groups;      // warps in each group: warp w has rows of group w % row_groups, columns of w / row_groups
  int pieces;             // of 64 bytes in a row
  int round_pieces;       // pieces of a row that a round takes
  int rounds;             // of the warp that has the most

  GATEWISE_PLAN_FN int round_size() const { return tiles * round_pieces; }  // fragments
  // Of a round's, the piece that its q-th fragment is of
  GATEWISE_PLAN_FN int piece(int q) const { return tiles == 1 ? q : tiles == 2 ? q / 2 : 0; }
  GATEWISE_PLAN_FN int rows() const { return row_groups * tiles * int(fragment_rows); }
  GATEWISE_PLAN_FN int begin(int column_group) const { return pieces * column_group / column_groups; }
};

inline Index unit_rows(const StepProblem& problem) { return problem.backward ? 1 : problem.gates; }
inline Index product_columns(const StepProblem& problem) {
  return problem.backward ? problem.gates * problem.H : problem.R;
}
inline Index row_pieces(const StepProblem& problem) {
  return ceil_div(product_columns(problem) * problem.storage, fragment_row_bytes);
}
// Of a block that owns so many units. No column group: there are too few warps for the rows.
inline Shares share_out(const StepProblem& problem, Index units, Index block) {
  const int row_tiles = int(ceil_div(unit_rows(problem) * units, fragment_rows)), warps = int(block / lanes);
  Shares of{};
  of.row_groups = int(ceil_div(row_tiles, round_fragments)), of.tiles = int(ceil_div(row_tiles, of.row_groups));
  of.pieces = int(row_pieces(problem)), of.round_pieces = round_fragments / of.tiles;
  of.column_groups = std::min(warps / of.row_groups, of.pieces);
  if (of.column_groups) of.rounds = int(ceil_div(ceil_div(of.pieces, of.column_groups), of.round_pieces));
  return of;
}

// What is exchanged: a row a sequence, of two steps: the one that is read and the one that is written. Rows are filled
// up with zeros, to what a product takes.
inline Index exchange_bytes(const StepProblem& problem) {
  return 2 * round_up(problem.N, batch_tiles[1]) * row_pieces(problem) * fragment_row_bytes;
}
// The warps of a row group leave sums of their own columns for the cells, which add them in a fixed order.
inline Index sums_bytes(const StepProblem& problem, const Shares& of, Index batch_tile) {
  return of.column_groups * batch_tile * (of.rows() + sum_padding) * problem.accumulator;
}

namespace detail {

inline Plan stepwise(const DeviceLimits& device, const StepProblem& problem, Reason reason) {
  // A block makes a tile of batch x rows of the product, whose operands come 128 bytes of columns at a time, twice
  // buffered, and its cells. The widest tile reads the fewest bytes, but not at the price of idle multiprocessors. All
  // of it fits into the 48 KB that every device has without opting in.
  constexpr Index column_bytes = 128 + 16;
  const Index of_unit = unit_rows(problem);
  Plan plan{reason};
  plan.block = 256;
  plan.batch_tile = problem.N <= batch_tiles[0] ? batch_tiles[0] : batch_tiles[1];
  plan.grid_rows = ceil_div(problem.N, plan.batch_tile);
  for (const Index rows : {64, 32, 16, 8}) {
    plan.units = std::max<Index>(1, rows / of_unit);
    plan.grid_units = ceil_div(problem.H, plan.units);
    const Index operands = 2 * (plan.batch_tile + plan.units * of_unit) * column_bytes;
    plan.shared_bytes = operands + plan.batch_tile * plan.units * of_unit * problem.accumulator;
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

  // Nothing but the L2 cache can feed every block with all of h at each step.
  if (exchange_bytes(problem) > device.l2_bytes) return stepwise(Reason::exchange);

  // One block a multiprocessor: two would hold no more weights than one, read h twice and make the barrier longer. The
  // fewest units that let the grid cover all; then as many as fill the same fragments, which costs no memory and saves
  // blocks.
  const Index of_unit = unit_rows(problem);
  const Index row_tiles = ceil_div(of_unit * ceil_div(problem.H, device.multiprocessors), fragment_rows);
  const Index units = std::min(problem.H, row_tiles * fragment_rows / of_unit);
  const Index held = weight_registers(problem.accumulator);

  // Of all that fits, what reads the fewest weights from shared memory; then what leaves the busiest warp the least to
  // multiply; then the fewest threads, to wait for each other at barriers. Last what passes over the batch least often:
  // the size of the batch decides nothing that changes a bit of a sequence, where more than one block size would do.
  Plan best{Reason::weights};
  auto least = std::make_tuple(Index(0), Index(0), Index(0), Index(0), Index(0));
  for (const Index block : block_sizes)
    for (const Index batch_tile : batch_tiles) {
      const Shares of = share_out(problem, units, block);
      if (!of.column_groups) continue;
      const Index passes = ceil_div(problem.N, batch_tile), warps = of.row_groups * of.column_groups;
      const Index in_registers = std::min<Index>(of.rounds, held / round_registers);
      Plan plan{Reason::persistent, ceil_div(problem.H, units), 1, block, units, batch_tile};
      plan.weight_registers = held, plan.registers = max_registers;
      plan.fragments = warps * of.rounds * of.round_size();
      plan.register_fragments = warps * in_registers * of.round_size();
      const Index in_shared = plan.fragments - plan.register_fragments;
      plan.shared_bytes = in_shared * fragment_bytes + sums_bytes(problem, of, batch_tile);
      plan.blocks_per_multiprocessor = resident_blocks(device, block, plan.registers, plan.shared_bytes);
      if (plan.blocks_per_multiprocessor < 1) continue;
      if (passes * ceil_div(std::min(problem.N, batch_tile) * units, block) > cell_slots) {
        if (!best.persistent()) best.reason = Reason::batch;  // the weights would fit
        continue;
      }
      const auto cost = std::make_tuple(in_shared, ceil_div(of.pieces, of.column_groups) * of.tiles, block, passes,
                                        plan.shared_bytes);
      if (!best.persistent() || cost < least) best = plan, least = cost;
    }
  return best.persistent() ? best : stepwise(best.reason);
}

}  // namespace gatewise::cuda
