// Tiled products of the layer's rows: C = A B^T + bias (what enters the gates), C = A B (gradients on their way back)
// and C += A^T B (gradients of weights). Rows of A, B and C are found through a stride or an index array, so nothing is
// gathered before a product. Every element of a part is one chain of fused multiply-adds in the order of k, whatever
// the tile, and parts are summed in their order: the same bits from run to run and for any number of rows.
#pragma once
#include "device.hpp"
#include "gatewise/gatewise.hpp"
#include "gatewise/math.hpp"

namespace gatewise::cuda {

// Rows somewhere in memory: row r starts at at[r] * stride, or, rotated, at ((r + turn) mod count) * stride.
template <class E> struct RowsAt {
  E* numbers = nullptr;
  Index stride = 0;
  const Index* at = nullptr;
  Index turn = 0, count = 0;  // no turn: count is not looked at

  __device__ E* operator[](Index r) const {
    if (at) return numbers + at[r] * stride;
    r += turn;
    if (turn && r >= count) r -= count;
    return numbers + r * stride;
  }
};

// C [M, N] from A and B. k runs over `parts` ranges of part_k each (the last may be shorter); range z writes its sum
// to C + z * part_stride. Rows and columns are counted in 32 bits, which saves registers; places are not.
template <class T> struct Product {
  int M, N, K;
  RowsAt<const T> a, b;
  RowsAt<T> c;
  const T* bias = nullptr;  // [N], added, or null
  bool add = false;         // to what C holds
  int parts = 1, part_k = 0;
  Index part_stride = 0;
};

// What one block makes: rows x columns of C, each thread rows_each x columns_each of them, from slabs of `depth` k's.
template <int rows_, int columns_, int depth_, int rows_each_, int columns_each_> struct Tile {
  static constexpr int rows = rows_, columns = columns_, depth = depth_, rows_each = rows_each_,
                       columns_each = columns_each_, across = columns / columns_each,
                       threads = rows / rows_each * across;
};
// A slab's row takes 64 bytes. The large tile needs 256 threads' registers; the small one is for outputs that have too
// few large ones to occupy a device.
template <class T> using LargeTile = Tile<128, 64, 64 / sizeof(T), 8, 4>;
template <class T> using SmallTile = Tile<32, 32, 64 / sizeof(T), 4, 4>;

// n numbers from shared memory, 16 bytes at a time where they fill as many
template <int n, class T> __device__ __forceinline__ void read(const T* from, T (&to)[n]) {
  constexpr int wide = 16 / sizeof(T);
  struct alignas(16) Wide { T numbers[wide]; };
  if constexpr (n % wide == 0) {
#pragma unroll
    for (int i = 0; i < n; i += wide) {
      const Wide some = *reinterpret_cast<const Wide*>(from + i);
#pragma unroll
      for (int k = 0; k < wide; ++k) to[i + k] = some.numbers[k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
}

// One operand's way from memory to a slab [depth][width + pad]. `by_k`: its rows are k's, and lie as the slab does;
// else they are the tile's rows or columns, and are turned over.
template <class T, int width, int depth, int threads, bool by_k> struct Loader {
  static constexpr int pad = 16 / sizeof(T);  // rows stay aligned for wide reads, and columns spread over the banks
  static constexpr int pitch = width + pad, size = depth * pitch;
  static constexpr int count = (width * depth + threads - 1) / threads;  // numbers of a slab that one thread moves
  static constexpr int span = by_k ? width : depth;                      // of neighbours in memory
  static_assert(width * depth % threads == 0 && threads % span == 0, "all numbers of a thread lie in one column");

  RowsAt<const T> from;            // by_k: its numbers begin in the thread's column
  const T* row[by_k ? 1 : count];  // of each number, from the thread's column on, or null: outside
  bool inside;                     // by_k: whether that column is
  T next[count];

  // The thread's column, and the row of its n-th number
  static __device__ __forceinline__ int column() { return int(threadIdx.x % unsigned(span)); }
  static __device__ __forceinline__ int row_of(int n) {
    return int(threadIdx.x / unsigned(span)) + n * (threads / span);
  }

  // The tile's rows or columns begin at `first`, and the operand ends at `end`
  __device__ __forceinline__ Loader(const RowsAt<const T>& rows, int first, int end)
      : from(rows), inside(first + column() < end) {
    if constexpr (by_k) {
      from.numbers += first + column();
    } else {
#pragma unroll
      for (int n = 0; n < count; ++n) row[n] = first + row_of(n) < end ? from[first + row_of(n)] + column() : nullptr;
    }
  }
  // Asks for the slab of k's that begins at `begin`; what lies outside the operand reads as zero
  __device__ __forceinline__ void fetch(int begin, int end_k) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      if constexpr (by_k) {
        const int k = begin + row_of(n);
        next[n] = inside && k < end_k ? *from[k] : T(0);
      } else {
        next[n] = row[n] && begin + column() < end_k ? row[n][begin] : T(0);
      }
    }
  }
  __device__ __forceinline__ void store(T* slab) const {
#pragma unroll
    for (int n = 0; n < count; ++n) slab[by_k ? row_of(n) * pitch + column() : column() * pitch + row_of(n)] = next[n];
  }
};

// Grid: tiles of rows, tiles of columns, parts.
template <class T, class Tile, bool a_by_k, bool b_by_k> __global__ void __launch_bounds__(Tile::threads)
    multiply(Product<T> p) {
  constexpr int R = Tile::rows_each, C = Tile::columns_each;
  using A = Loader<T, Tile::rows, Tile::depth, Tile::threads, a_by_k>;
  using B = Loader<T, Tile::columns, Tile::depth, Tile::threads, b_by_k>;
  GATEWISE_SHARED_MEMORY(shared);
  SharedMemory memory{shared};
  T* const a_slabs = memory.take<T>(2 * A::size);
  T* const b_slabs = memory.take<T>(2 * B::size);

  const int first_row = int(blockIdx.x) * Tile::rows, first_column = int(blockIdx.y) * Tile::columns;
  const int begin = int(blockIdx.z) * p.part_k, end = begin + p.part_k < p.K ? begin + p.part_k : p.K;
  const int own_row = int(threadIdx.x) / Tile::across * R, own_column = int(threadIdx.x) % Tile::across * C;
  A a(p.a, first_row, p.M);
  B b(p.b, first_column, p.N);
  T sum[R][C] = {};

  // Two slabs take turns: one is filled while the other is multiplied, so that one barrier a slab is enough.
  a.fetch(begin, end), b.fetch(begin, end);
  int turn = 0;
  for (int k = begin; k < end; k += Tile::depth, turn = 1 - turn) {
    T *const a_slab = a_slabs + turn * A::size, *const b_slab = b_slabs + turn * B::size;
    a.store(a_slab), b.store(b_slab);
    __syncthreads();
    if (k + Tile::depth < end) a.fetch(k + Tile::depth, end), b.fetch(k + Tile::depth, end);
#pragma unroll
    for (int d = 0; d < Tile::depth; ++d) {
      T of_a[R], of_b[C];
      read(a_slab + d * A::pitch + own_row, of_a);
      read(b_slab + d * B::pitch + own_column, of_b);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c) sum[r][c] = fma(of_a[r], of_b[c], sum[r][c]);
    }
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = first_row + own_row + r;
    if (row >= p.M) continue;
    T* const to = p.c[row] + Index(blockIdx.z) * p.part_stride;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = first_column + own_column + c;
      if (column >= p.N) continue;
      T value = sum[r][c];
      if (p.bias) value = value + p.bias[column];
      to[column] = p.add ? to[column] + value : value;
    }
  }
}

// The element of a [rows, columns] array that is a thread's, of a grid made by pointwise(). No division finds it.
struct Element {
  Index row = Index(blockIdx.x) * blockDim.y + threadIdx.y, column = Index(blockIdx.y) * blockDim.x + threadIdx.x;
  __device__ __forceinline__ Element() {}
  __device__ __forceinline__ bool in(Index rows, Index columns) const { return row < rows && column < columns; }
};
inline LaunchShape pointwise(Index rows, Index columns) {
  constexpr unsigned threads = 128;
  const unsigned across = columns <= 32 ? 32 : columns <= 64 ? 64 : threads, along = threads / across;
  return {dim3(unsigned(ceil_div(rows, along)), unsigned(ceil_div(columns, across))), dim3(across, along), 0, false};
}

// Parts [count][M][N] of C, one after another, added to what it holds
template <class T> __global__ void add_parts(const T* parts, Index count, Index M, Index N, RowsAt<T> c) {
  const Element e;
  if (!e.in(M, N)) return;
  const T* const from = parts + e.row * N + e.column;
  T sum = *from;
  for (Index z = 1; z < count; ++z) sum = sum + from[z * M * N];
  T* const to = c[e.row] + e.column;
  *to = *to + sum;
}

// How many parts to cut K into, so that a device of some hundred multiprocessors has work where C is small. It never
// depends on the number of a step's rows: a row's bits would depend on its batch.
struct PartsOf {
  int count, k, wanted;  // count is wanted, or less, where ranges of k make up for it
  PartsOf(Index tiles, Index K, Index least_k) {
    constexpr Index enough = 128, most = 32;
    Index parts = ceil_div(enough, tiles < 1 ? 1 : tiles);
    if (parts > K / least_k) parts = K / least_k;
    if (parts > most) parts = most;
    if (parts < 1) parts = 1;
    wanted = int(parts);
    k = int(ceil_div(ceil_div(K, parts), 16) * 16);  // no range is cut within a slab
    count = K > 0 ? int(ceil_div(K, k)) : 1;
  }
};

template <class Tile, bool a_by_k, bool b_by_k, class T> void multiply_by(const Product<T>& p, cudaStream_t stream) {
  using A = Loader<T, Tile::rows, Tile::depth, Tile::threads, a_by_k>;
  using B = Loader<T, Tile::columns, Tile::depth, Tile::threads, b_by_k>;
  const dim3 grid(unsigned(ceil_div(p.M, Tile::rows)), unsigned(ceil_div(p.N, Tile::columns)), unsigned(p.parts));
  launch(multiply<T, Tile, a_by_k, b_by_k>, {grid, dim3(Tile::threads), 2 * (A::size + B::size) * sizeof(T), false},
         stream, p);
}

// a_by_k, b_by_k: whether the operand's rows are k's. The tile does not change a bit of the result.
template <bool a_by_k, bool b_by_k, class T> void multiply_rows(Product<T> p, cudaStream_t stream) {
  if (p.M <= 0 || p.N <= 0) return;
  if (p.parts == 1) p.part_k = p.K;
  constexpr Index enough = 96;  // blocks of the large tile
  const Index large = ceil_div(p.M, LargeTile<T>::rows) * ceil_div(p.N, LargeTile<T>::columns) * p.parts;
  if (p.M > SmallTile<T>::rows && large >= enough) multiply_by<LargeTile<T>, a_by_k, b_by_k>(p, stream);
  else multiply_by<SmallTile<T>, a_by_k, b_by_k>(p, stream);
}

}  // namespace gatewise::cuda
