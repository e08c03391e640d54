// Runs a layer of the CUDA library on arrays of the host: copies them to the device, runs forward and perhaps backward,
// and copies results back. For tests, through ctypes; every device buffer is exactly as large as its array.
#include <cstring>

#ifndef GATEWISE_WEIGHT_REGISTERS
#define GATEWISE_WEIGHT_REGISTERS 16  // so few that the persistent kernels have weights in shared memory too
#endif
#define GATEWISE_CHUNK_BYTES 3000  // so few that inference takes several chunks
#include "cuda/graph.hpp"
#include "cuda/layer.cu"  // the library in one program with its driver, as build.py takes it
#include "device_memory.hpp"

namespace gatewise::cuda {

// Pointers are the host's; a null one: not given, or not wanted. tests/test_cuda_kernels.py has this struct too.
struct Call {
  const char* cell;
  Index is_double, T, N, I, H, R, G, U, rows;  // rows: of y in packed layout, else T * N
  const void *x, *w_ih, *w_hh, *b_ih, *b_hh, *w_unit, *w_hr, *h0, *c0, *h_mask, *dy, *dhn, *dcn;
  const Index* lengths;
  const unsigned char* reset;
  Index x_size, x_start, step_stride, sequence_stride;  // of x, in elements
  Index reverse, layout, reset_to_zero, drawn, save, trains;
  Index loop, operands;
  DeviceLimits device;
  double zoneout_h, zoneout_c, cell_clip;
  std::uint64_t seed;
  void *y, *hn, *cn, *dx, *dh0, *dc0, *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_unit, *dw_hr;
};

namespace {

bool replays = false;
const Cublas* cublas = nullptr;

// A stream that waits for no other
struct Stream {
  cudaStream_t stream;
  Stream() { GATEWISE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream); }
};

template <class T> void run(const Call& c, const CellKernels<T>& kernels) {
  Device device;
  const Stream own;
  const Index gates = c.G * c.H;
  Problem<T> p{};
  p.dims = {c.T, c.N, c.I, c.H, c.R};
  p.weights = {device.send<T>(c.w_ih, gates * c.I), device.send<T>(c.w_hh, gates * c.R),
               device.send<T>(c.b_ih, gates),       device.send<T>(c.b_hh, gates),
               device.send<T>(c.w_unit, c.U * c.H), device.send<T>(c.w_hr, c.R * c.H)};
  const T* const x = device.send<T>(c.x, c.x_size);
  p.sequence = {x + c.x_start,
                device.send<T>(c.h0, c.N * c.R),
                device.send<T>(c.c0, c.N * c.H),
                c.lengths,
                c.reverse != 0,
                Layout(c.layout),
                c.step_stride,
                c.sequence_stride,
                device.send<unsigned char>(c.reset, c.rows),
                c.reset_to_zero ? ResetTo::zero : ResetTo::initial};
  p.h_mask = device.send<T>(c.h_mask, c.N * c.R);
  p.zoneout = {c.zoneout_h, c.zoneout_c, c.drawn != 0, c.seed};
  p.cell_clip = T(c.cell_clip);
  p.save = Save(c.save), p.checkpoint = 2;
  const Execution execution{c.device, Loop(c.loop), Operands(c.operands), cublas};
  const Sizes sizes = kernels.sizes(p, execution);

  Forward<T> f{};
  f.problem = p;
  f.y = device.result<T>(c.y, c.rows * c.R), f.hn = device.result<T>(c.hn, c.N * c.R);
  f.cn = device.result<T>(c.cn, c.N * c.H);
  if (c.trains) {
    f.saved = static_cast<T*>(device.take(sizes.saved * sizeof(T)));
    if (c.cn) f.states = static_cast<T*>(device.take(sizes.states * sizeof(T)));
  }
  f.scratch = device.take(sizes.forward_scratch);

  Backward<T> b{};
  if (c.trains) {
    b.problem = p, b.y = f.y, b.saved = f.saved, b.states = f.states;
    b.dy = device.send<T>(c.dy, c.rows * c.R), b.dhn = device.send<T>(c.dhn, c.N * c.R);
    b.dcn = device.send<T>(c.dcn, c.N * c.H);
    b.dx = device.result<T>(c.dx, c.rows * c.I);
    b.dh0 = device.result<T>(c.dh0, c.N * c.R), b.dc0 = device.result<T>(c.dc0, c.N * c.H);
    b.dw_ih = device.result<T>(c.dw_ih, gates * c.I, true), b.dw_hh = device.result<T>(c.dw_hh, gates * c.R, true);
    b.db_ih = device.result<T>(c.db_ih, gates, true), b.db_hh = device.result<T>(c.db_hh, gates, true);
    b.dw_unit = device.result<T>(c.dw_unit, c.U * c.H, true), b.dw_hr = device.result<T>(c.dw_hr, c.R * c.H, true);
    b.scratch = device.take(sizes.backward_scratch);
  }
  const auto enqueue = [&](cudaStream_t stream) {
    kernels.forward(f, execution, stream);
    if (c.trains) kernels.backward(b, execution, stream);
  };
  Graph graph;
  if (replays) {
    graph.record(enqueue);
    device.spoil();
    graph.launch(own.stream);
    GATEWISE_CUDA_CHECK(cudaStreamSynchronize(own.stream));
    device.send_again();
    graph.launch(own.stream);
  } else {
    enqueue(own.stream);
  }
  GATEWISE_CUDA_CHECK(cudaStreamSynchronize(own.stream));
  device.fetch();
}

}  // namespace

// A product alone, by a tile of the tests' choice. Rows of A and C are those that a_at and c_at name, B's are rotated.
struct ProductCall {
  Index is_double, tile, a_by_k, b_by_k, M, N, K, parts, add, turn;
  Index a_size, b_size, c_size;
  const void *a, *b, *bias;
  const Index *a_at, *c_at;  // as many as there are rows, or null
  void* c;                   // added to, or overwritten where it has no more than one part
};

namespace {

template <class Tile, class T> void multiply_by_any(const Product<T>& p, bool a_by_k, bool b_by_k) {
  if (a_by_k && b_by_k) multiply_by<Tile, true, true>(p, nullptr);
  else if (b_by_k) multiply_by<Tile, false, true>(p, nullptr);
  else multiply_by<Tile, false, false>(p, nullptr);
}
template <class T> using TinyTile = Tile<8, 4, 4, 2, 2>;

template <class T> void run_product(const ProductCall& c) {
  Device device;
  const Index a_rows = c.a_by_k ? c.K : c.M;
  Product<T> p{int(c.M), int(c.N), int(c.K), {}, {}, {}};
  p.a = {device.send<T>(c.a, c.a_size), c.a_by_k ? c.M : c.K, device.send<Index>(c.a_at, a_rows)};
  p.b = {device.send<T>(c.b, c.b_size), c.b_by_k ? c.N : c.K, nullptr, c.turn, c.b_by_k ? c.K : c.N};
  const RowsAt<T> to{device.result<T>(c.c, c.c_size, true), c.N, device.send<Index>(c.c_at, c.M)};
  p.c = to, p.bias = device.send<T>(c.bias, c.N), p.add = c.add != 0;
  p.parts = 1, p.part_k = p.K;
  if (c.parts > 1) {
    p.part_k = int(ceil_div(c.K, c.parts)), p.parts = int(ceil_div(c.K, p.part_k)), p.part_stride = c.M * c.N;
    p.c = {static_cast<T*>(device.take(std::size_t(p.parts * c.M * c.N) * sizeof(T))), c.N}, p.add = false;
  }
  if (c.tile == 0) multiply_by_any<LargeTile<T>>(p, c.a_by_k, c.b_by_k);
  else if (c.tile == 1) multiply_by_any<SmallTile<T>>(p, c.a_by_k, c.b_by_k);
  else multiply_by_any<TinyTile<T>>(p, c.a_by_k, c.b_by_k);
  if (c.parts > 1) launch(add_parts<T>, pointwise(c.M, c.N), nullptr, p.c.numbers, Index(p.parts), c.M, c.N, to);
  GATEWISE_CUDA_CHECK(cudaStreamSynchronize(nullptr));
  device.fetch();
}

}  // namespace

extern "C" int gatewise_run_product(const ProductCall* call, char* message, std::size_t size) try {
  call->is_double ? run_product<double>(*call) : run_product<float>(*call);
  return 0;
} catch (const std::exception& error) {
  std::strncpy(message, error.what(), size - 1);
  return 1;
}

// Whether layers run from now on as the second replay of a graph, the first being on other numbers
extern "C" void gatewise_replay(int on) { replays = on != 0; }

// n numbers of 16 bits to floats, or back
extern "C" int gatewise_convert(bool is_bfloat16, bool to_floats, const void* from, Index n, void* to) try {
  Device device;
  const Storage storage = is_bfloat16 ? Storage::bfloat16 : Storage::float16;
  if (to_floats) widen(storage, device.send<short>(from, n), n, device.result<float>(to, n), nullptr);
  else narrow(storage, device.send<float>(from, n), n, device.result<short>(to, n), nullptr);
  device.fetch();
  return 0;
} catch (const std::exception&) { return 1; }

// Layers run from now on with the cuBLAS that the environment names
extern "C" int gatewise_find_cublas(char* message, std::size_t size) try {
  cublas = find_cublas();
  return 0;
} catch (const std::exception& error) {
  std::strncpy(message, error.what(), size - 1);
  return 1;
}

// 0, or 1 with a sentence in message [size]
extern "C" int gatewise_run_layer(const Call* call, char* message, std::size_t size) try {
  for (const Kernels* k = kernels().begin; k != kernels().end; ++k)
    if (!std::strcmp(k->info.name, call->cell)) {
      call->is_double ? run(*call, k->f64) : run(*call, k->f32);
      return 0;
    }
  throw std::runtime_error(std::string("cell: there is no ") + call->cell);
} catch (const std::exception& error) {
  std::strncpy(message, error.what(), size - 1);
  return 1;
}

}  // namespace gatewise::cuda
