// The product at the heart of everything: a tile of MR rows by NR registers, accumulated in registers, and the
// packed weights it reads. Each element is one chain of fused multiply-adds in the order of k, whatever the tile's
// shape: a row's bits depend on neither its neighbours nor the number of threads.
#pragma once
#include "rows.hpp"
#include "vec.hpp"

namespace gatewise { inline namespace GATEWISE_ARCH { namespace {

// Registers a product may accumulate in; the rest hold its operands.
constexpr int kAccumulators = GATEWISE_VECTOR_REGISTERS * 3 / 4;
constexpr int rows_per_tile(int registers_per_row) {
  const int rows = kAccumulators / registers_per_row;
  return rows < 8 ? rows : 8;  // row pointers live in general registers, of which there are 16
}

constexpr int kMaxRegisters = 4, kMaxRows = rows_per_tile(1);

// A tile leaves its registers through a buffer in L1, [row][register][lane], and epilogues are plain loops over it.
// So the product is compiled once per shape for all cells, and a cell once for all shapes.
template <class T> struct Tile { alignas(64) T numbers[kMaxRows * kMaxRegisters * Vec<T>::width]; };

// acc[r][v] += sum over k of *a(r, k) * b(k, v): a() points to one number, b() to one register's worth.
template <class T, int MR, int NR, class A, class B>
GATEWISE_FN void multiply(Vec<T> (&acc)[MR][NR], Index K, A a, B b) {
  for (Index k = 0; k < K; ++k) {
    Vec<T> w[NR];
    GATEWISE_UNROLL
    for (int v = 0; v < NR; ++v) w[v] = Vec<T>::load(b(k, v));
    GATEWISE_UNROLL
    for (int r = 0; r < MR; ++r) {
      const Vec<T> x = Vec<T>::broadcast(a(r, k));
      GATEWISE_UNROLL
      for (int v = 0; v < NR; ++v) acc[r][v] = fma(x, w[v], acc[r][v]);
    }
  }
}

template <class T, int MR, int NR> GATEWISE_FN void clear(Vec<T> (&acc)[MR][NR]) {
  GATEWISE_UNROLL
  for (int r = 0; r < MR; ++r) {
    GATEWISE_UNROLL
    for (int v = 0; v < NR; ++v) acc[r][v] = Vec<T>(0);
  }
}
template <class T, int MR, int NR> GATEWISE_FN void write(const Vec<T> (&acc)[MR][NR], Tile<T>& tile) {
  GATEWISE_UNROLL
  for (int r = 0; r < MR; ++r) {
    GATEWISE_UNROLL
    for (int v = 0; v < NR; ++v) acc[r][v].store(tile.numbers + (r * NR + v) * Vec<T>::width);
  }
}

// Where a row's numbers lie: `full` segments of K, `stride` apart, then one of last_K, shifted from its place.
struct Segments { Index K, full, stride, last_K, last_shift; };
constexpr Segments one_segment(Index K) { return {0, 0, 0, K, 0}; }

// Rows of numbers times packed weights [numbers of a row][NR][W]. The segments come by reference, made long before: an
// argument on the stack was read back behind all of an epilogue's stores, and cost 4 % of a training step. On the way
// it asks for as many registers' worth of `ahead`, for a cache beyond L1, as a row has numbers: where a register is a
// line of it. Narrower ones wait less for memory, and have no instruction to spare.
template <class T, int MR, int NR>
void multiply_rows(const T* const* rows, const Segments& s, const T* packed, Tile<T>& tile, const T* ahead) {
  constexpr Index W = Vec<T>::width;
  const T* a[MR];
  GATEWISE_UNROLL
  for (int r = 0; r < MR; ++r) a[r] = rows[r];
  Vec<T> acc[MR][NR];
  clear(acc);
  for (Index i = 0; i <= s.full; ++i) {
    const Index K = i < s.full ? s.K : s.last_K, shift = i < s.full ? 0 : s.last_shift;
    multiply(
        acc, K, [&](int r, Index k) { return a[r] + shift + k; },
        [&](Index k, int v) {
          if (v == 0 && GATEWISE_VECTOR_BYTES == 64) __builtin_prefetch(ahead + k * W, 0, 2);
          return packed + (k * NR + v) * W;
        });
    packed += K * NR * W, ahead += K * W;
    GATEWISE_UNROLL
    for (int r = 0; r < MR; ++r) a[r] += s.stride;
  }
  write(acc, tile);
}

// Columns of numbers, packed [K][height], times K rows of registers: register v of row k is at b[v] + k * stride.
template <class T, int MR, int NR>
void multiply_columns(const T* packed, Index height, Index K, const T* const* b, Index stride, Tile<T>& tile) {
  const T* from[NR];
  GATEWISE_UNROLL
  for (int v = 0; v < NR; ++v) from[v] = b[v];
  Vec<T> acc[MR][NR];
  clear(acc);
  multiply(
      acc, K, [&](int r, Index k) { return packed + k * height + r; },
      [&](Index k, int v) { return from[v] + k * stride; });
  write(acc, tile);
}

// The products by shape: kMultiplyRows<T>[NR - 1][MR - 1]
template <class T> using MultiplyRows = void (*)(const T* const*, const Segments&, const T*, Tile<T>&, const T* ahead);
template <class T> using MultiplyColumns = void (*)(const T*, Index, Index, const T* const*, Index, Tile<T>&);
template <class T, int NR, class Rows> struct Shapes;
template <class T, int NR, int... I> struct Shapes<T, NR, std::integer_sequence<int, I...>> {
  static constexpr MultiplyRows<T> rows[] = {multiply_rows<T, I + 1, NR>...};
  static constexpr MultiplyColumns<T> columns[] = {multiply_columns<T, I + 1, NR>...};
};
template <class T, int NR> using ShapesOf = Shapes<T, NR, std::make_integer_sequence<int, rows_per_tile(NR)>>;
template <class T> constexpr const MultiplyRows<T>* kMultiplyRows[kMaxRegisters] = {
    ShapesOf<T, 1>::rows, ShapesOf<T, 2>::rows, ShapesOf<T, 3>::rows, ShapesOf<T, 4>::rows};
template <class T> constexpr const MultiplyColumns<T>* kMultiplyColumns[kMaxRegisters] = {
    ShapesOf<T, 1>::columns, ShapesOf<T, 2>::columns, ShapesOf<T, 3>::columns, ShapesOf<T, 4>::columns};

// Covers [0, n) with tiles of at most `most` rows of nearly equal height (16 = 6 + 5 + 5, not 6 + 6 + 4: short tiles
// wait for loads). f(first row, height)
template <class F> GATEWISE_FN void for_each_tile(Index n, Index most, F f) {
  Index done = 0;
  for (Index tiles = ceil_div(n, most); tiles > 0; --tiles) {
    const Index height = ceil_div(n - done, tiles);
    f(done, height);
    done += height;
  }
}

// How gate rows of a weight matrix [G*H, K] map to registers. A panel is one register's worth of hidden units, all
// gates of them; a group is as many panels as make a tile four registers wide. `gate(slot)` gives the gate order. In
// the last panel, of fewer units than a register has lanes, the gates lie end to end: an LSTM of H = 100 has 4 units
// there, and their 16 gates are one register, not four.
template <int Gates> struct Panels {
  static constexpr int per_group = Gates >= 3 ? 1 : Gates == 2 ? 2 : GATEWISE_VECTOR_REGISTERS == 32 ? 4 : 2;
  static Index in_group(Index group, Index panels) { return least(panels - group * per_group, per_group); }
  // Numbers before a group, of packed rows of K
  static Index place(Index group, Index W, Index K) { return group * per_group * Gates * W * K; }
  static Index registers(Index group, Index H, Index W) {
    const Index before = (in_group(group, ceil_div(H, W)) - 1), units = H - (group * per_group + before) * W;
    return before * Gates + ceil_div(Gates * least(W, units), W);
  }
};

// The registers of one group of panels: f(its place in the group, rows, lanes): the row of w in each of its first
// lanes. Only a group's last register may have fewer than all.
template <class T, int Gates, class Gate, class F> void for_each_register(Index H, Gate gate, Index group, F f) {
  constexpr Index W = Vec<T>::width;
  const Index first = group * Panels<Gates>::per_group, panels = Panels<Gates>::in_group(group, ceil_div(H, W));
  for (Index b = 0; b < panels; ++b) {
    const Index unit = (first + b) * W, units = least(W, H - unit);
    Index rows[W], lanes = 0, v = 0;
    for (int slot = 0; slot < Gates; ++slot)
      for (Index row = gate(slot) * H + unit, end = row + units; row < end; ++row) {
        rows[lanes++] = row;
        if (lanes < W) continue;
        f(b * Gates + v++, rows, lanes);
        lanes = 0;
      }
    if (lanes) f(b * Gates + v, rows, lanes);
  }
}

// One group, packed[k][register][lane] = w[row in that lane][k], zero where there is none; less mean[k] and mean[K +
// k], what the first left of it, unless that is null
template <class T, int Gates, class Gate>
void pack(const T* w, Index H, Index K, Gate gate, Index group, T* packed, const T* mean = nullptr) {
  constexpr Index W = Vec<T>::width;
  const Index registers = Panels<Gates>::registers(group, H, W);
  for_each_register<T, Gates>(H, gate, group, [=](Index v, const Index* rows, Index lanes) {
    const T* from[W];
    GATEWISE_UNROLL
    for (Index lane = 0; lane < W; ++lane) from[lane] = w + rows[lane < lanes ? lane : 0] * K;
    T* out = packed + v * W;
    for (Index k = 0; k < K; k += W, out += W * registers * W)
      with_lanes<T>(K - k, [=](auto numbers) {
        Vec<T> block[W];
        GATEWISE_UNROLL
        for (Index lane = 0; lane < W; ++lane) block[lane] = Vec<T>::load(from[lane] + k, numbers);
        if (mean) {
          const Vec<T> most = Vec<T>::load(mean + k, numbers), rest = Vec<T>::load(mean + K + k, numbers);
          GATEWISE_UNROLL
          for (Index lane = 0; lane < W; ++lane) block[lane] = (block[lane] - most) - rest;
        }
        if (lanes < W) {
          GATEWISE_UNROLL
          for (Index lane = 1; lane < W; ++lane)
            if (lane >= lanes) block[lane] = Vec<T>(T(0));
        }
        transpose(block);
        GATEWISE_UNROLL
        for (Index i = 0; i < W; ++i)
          if (i < numbers) block[i].store(out + i * registers * W);
      });
  });
}

// Rows of numbers times one register of weights that are not packed, w[row in that lane][k], transposed on the way: for
// weights that are read once, by so few rows. It reads them half as fast as memory goes; packed first, a quarter.
template <class T> constexpr int kUnpackedRows = int(least(8, kAccumulators - Vec<T>::width));

template <class T, int MR> void multiply_unpacked(const T* const* numbers, Index K, const T* w, const Index* rows,
                                                  Index lanes, T* out, Index stride) {
  constexpr Index W = Vec<T>::width;
  const T *a[MR], *from[W];
  GATEWISE_UNROLL
  for (int r = 0; r < MR; ++r) a[r] = numbers[r];
  GATEWISE_UNROLL
  for (Index lane = 0; lane < W; ++lane) from[lane] = w + rows[lane < lanes ? lane : 0] * K;
  Vec<T> acc[MR];
  GATEWISE_UNROLL
  for (int r = 0; r < MR; ++r) acc[r] = Vec<T>(0);
  for (Index k = 0; k < K; k += W)
    with_lanes<T>(K - k, [&](auto count) {
      Vec<T> block[W];
      GATEWISE_UNROLL
      for (Index lane = 0; lane < W; ++lane) block[lane] = Vec<T>::load(from[lane] + k, count);
      transpose(block);
      GATEWISE_UNROLL
      for (Index i = 0; i < W; ++i) {
        if (i >= count) break;
        GATEWISE_UNROLL
        for (int r = 0; r < MR; ++r) acc[r] = fma(Vec<T>::broadcast(a[r] + k + i), block[i], acc[r]);
      }
    });
  GATEWISE_UNROLL
  for (int r = 0; r < MR; ++r) acc[r].store(out + r * stride);
}

// By the number of rows, kMultiplyUnpacked<T>[MR - 1]
template <class T> using MultiplyUnpacked = void (*)(const T* const*, Index, const T*, const Index*, Index, T*, Index);
template <class T, class Rows> struct Unpacked;
template <class T, int... I> struct Unpacked<T, std::integer_sequence<int, I...>> {
  static constexpr MultiplyUnpacked<T> rows[] = {multiply_unpacked<T, I + 1>...};
};
template <class T> constexpr const MultiplyUnpacked<T>* kMultiplyUnpacked =
    Unpacked<T, std::make_integer_sequence<int, kUnpackedRows<T>>>::rows;

// Each column's mean, in two parts: the second is the mean of what differs from the first
template <class T> void column_means(const T* w, Index rows, Index K, T* mean) {
  for (Index k = 0; k < K; k += Vec<T>::width)
    for (int part = 0; part < 2; ++part) {
      const Vec<T> most = part ? Vec<T>::load(mean + k, K - k) : Vec<T>(T(0));
      Vec<T> sum(T(0));
      for (Index row = 0; row < rows; ++row) sum = sum + (Vec<T>::load(w + row * K + k, K - k) - most);
      (sum / Vec<T>(T(rows))).store(mean + part * K + k, K - k);
    }
}

// The inverse, added: w[row in that lane][k] += packed[...]
template <class T, int Gates, class Gate>
void unpack_add(const T* packed, Index H, Index K, Gate gate, Index group, T* w) {
  constexpr Index W = Vec<T>::width;
  const Index registers = Panels<Gates>::registers(group, H, W);
  for_each_register<T, Gates>(H, gate, group, [&](Index v, const Index* rows, Index lanes) {
    for (Index k = 0; k < K; k += W)
      with_lanes<T>(K - k, [&](auto numbers) {
        Vec<T> block[W];
        const T* in = packed + (k * registers + v) * W;
        GATEWISE_UNROLL
        for (Index i = 0; i < W; ++i) block[i] = i < numbers ? Vec<T>::load(in + i * registers * W) : Vec<T>(T(0));
        transpose(block);
        GATEWISE_UNROLL
        for (Index lane = 0; lane < W; ++lane) {
          if (lane >= lanes) break;
          T* to = w + rows[lane] * K + k;
          (Vec<T>::load(to, numbers) + block[lane]).store(to, numbers);
        }
      });
  });
}

// The same matrix for products the other way, gates in and columns out: a column group is up to four registers of
// columns. packed[group][panel][slot][unit][column] = w[gate(slot) * H + unit][column], less the mean as in pack()
constexpr int kColumnRegisters = GATEWISE_VECTOR_REGISTERS == 32 ? 4 : 2;

template <class T> Index column_groups(Index columns) { return ceil_div(columns, kColumnRegisters * Vec<T>::width); }

template <class T, int Gates, class Gate>
void pack_columns(const T* w, Index H, Index columns, Gate gate, Index group, T* packed, const T* mean) {
  constexpr Index W = Vec<T>::width;
  const Index first = group * kColumnRegisters * W;
  const Index wide = least(kColumnRegisters, ceil_div(columns, W) - group * kColumnRegisters);
  T* out = packed + first * Gates * H;
  for (Index unit = 0; unit < H; unit += W)
    for (int slot = 0; slot < Gates; ++slot)
      for (Index row = gate(slot) * H + unit, end = row + least(W, H - unit); row < end; ++row, out += wide * W)
        for (Index v = 0; v < wide; ++v) {
          const Index column = first + v * W;
          Vec<T> numbers = Vec<T>::load(w + row * columns + column, columns - column);
          if (mean)
            numbers = (numbers - Vec<T>::load(mean + column, columns - column)) -
                      Vec<T>::load(mean + columns + column, columns - column);
          numbers.store(out + v * W);
        }
}

}}}  // namespace gatewise::GATEWISE_ARCH
