// Small kernels with bugs to plant by name, to see that the host runtime catches each: a program
//   probes KERNEL [BUG]
// prints what the kernel computed, or the sentence of the error it ended with. test_cuda_host.py says what to expect.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/device.hpp"

namespace gatewise::cuda {

enum Bug {
  none,
  missing_syncthreads,    // shared memory is read before it is written
  divergent_barrier,      // one warp comes to __syncthreads, the other ends
  different_barriers,     // each warp comes to one of its own
  exited_thread,          // a thread ends before the barrier
  one_lane_shuffle,       // lane 0 alone shuffles
  outside_mask,           // a shuffle from a lane that its mask does not name
  not_in_own_mask,        // a lane shuffles under a mask without it
  static_out_of_bounds,   // beyond a __shared__ array
  global_out_of_bounds,   // beyond an allocation
  plain_addition,         // of blocks to one number
  relaxed_arrival,        // at the grid's barrier: orders nothing
  missing_block_barrier,  // behind the grid's barrier: only one thread waited
  part_overrun,           // beyond a part of the dynamic shared memory
  read_only_cache,        // for what other blocks write
  missing_syncwarp,
  wrong_fragment,     // registers of a matrix fragment swapped
  not_cooperative,    // though its blocks wait for each other
  too_little_shared,  // memory: the launch asks for less than the kernel takes
  exited_lane,        // before its warp shuffles
  misaligned,         // access to a pair of numbers
  exited_warp,        // long before the barrier
  bug_count
};
const char* const bug_names[] = {"none",
                                 "missing_syncthreads",
                                 "divergent_barrier",
                                 "different_barriers",
                                 "exited_thread",
                                 "one_lane_shuffle",
                                 "outside_mask",
                                 "not_in_own_mask",
                                 "static_out_of_bounds",
                                 "global_out_of_bounds",
                                 "plain_addition",
                                 "relaxed_arrival",
                                 "missing_block_barrier",
                                 "part_overrun",
                                 "read_only_cache",
                                 "missing_syncwarp",
                                 "wrong_fragment",
                                 "not_cooperative",
                                 "too_little_shared",
                                 "exited_lane",
                                 "misaligned",
                                 "exited_warp"};
static_assert(sizeof bug_names / sizeof *bug_names == bug_count);

constexpr unsigned all_lanes = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float v) {
  for (int distance = 16; distance; distance /= 2) v += __shfl_xor_sync(all_lanes, v, distance);
  return v;
}

// *out += the sum of x[n]
__global__ void sum(const float* x, float* out, int n, int bug) {
  constexpr int max_warps = 4;
  __shared__ float parts[max_warps];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  float v = 0;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) v += x[i];
  if (bug == exited_lane && threadIdx.x == 31) return;
  if (bug == exited_warp && warp == 1) return;
  if (bug == misaligned) {
    const float2 pair = *reinterpret_cast<const float2*>(x + 1);
    v += pair.x * pair.y;
  }
  v = warp_sum(v);
  if (bug == exited_thread && threadIdx.x == 63) return;
  if (lane == 0) parts[bug == static_out_of_bounds ? warp + max_warps : warp] = v;
  if (bug == divergent_barrier) {
    if (warp == 0) __syncthreads();
  } else if (bug == different_barriers) {
    if (warp == 0) {
      __syncthreads();
      v *= 2;
    } else {
      __syncthreads();
      v *= 3;
    }
  } else if (bug != missing_syncthreads) {
    __syncthreads();
  }
  if (warp == 0) {
    v = lane < int(blockDim.x) / 32 ? parts[lane] : 0.0f;
    if (bug == one_lane_shuffle && lane == 0) v += __shfl_down_sync(all_lanes, v, 16);
    if (bug == outside_mask && lane < 16) v += __shfl_xor_sync(0xffffu, v, 16);
    if (bug == not_in_own_mask && lane == 31) v += __shfl_xor_sync(0xffffu, v, 1);
    v = warp_sum(v);
    if (lane == 0) {
      if (bug == plain_addition) *out += v;
      else atomicAdd(out, v);
      if (bug == global_out_of_bounds) out[gridDim.x * 64] = v;
    }
  }
}

__device__ __forceinline__ void grid_barrier(unsigned* arrivals, unsigned target, int bug) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (bug == relaxed_arrival) atomicAdd(arrivals, 1u);
    else add_release(arrivals, 1);
    while (load_acquire(arrivals) < target) {}
  }
  if (bug != missing_block_barrier) __syncthreads();
}

// `steps` times: a[i] = a[i] / 2 + (a[i - 1] + a[i + 1]) / 4 on a ring; blocks of blockDim numbers, all resident
__global__ void diffuse(float* a, float* b, unsigned* arrivals, int steps, int bug) {
  GATEWISE_SHARED_MEMORY(bytes);
  SharedMemory memory{bytes};
  const int n = int(blockDim.x), total = n * int(gridDim.x), start = n * int(blockIdx.x), i = int(threadIdx.x);
  float* tile = memory.take<float>(n + 2);
  float* next = memory.take<float>(n);
  for (int step = 0; step < steps; ++step) {
    for (int k = i; k < n + 2; k += n) {
      const float* from = a + (start + k - 1 + total) % total;
      tile[bug == part_overrun ? k + 1 : k] = bug == read_only_cache ? __ldg(from) : *from;
    }
    __syncthreads();
    next[i] = tile[i + 1] / 2 + (tile[i] + tile[i + 2]) / 4;
    b[start + i] = next[i];
    grid_barrier(arrivals, (step + 1) * gridDim.x, bug);
    float* swapped = a;
    a = b;
    b = swapped;
  }
}

// One warp turns its numbers round
__global__ void reverse(float* x, int bug) {
  GATEWISE_SHARED_MEMORY(bytes);
  SharedMemory memory{bytes};
  float* line = memory.take<float>(32);
  line[threadIdx.x] = x[threadIdx.x];
  if (bug != missing_syncwarp) __syncwarp();
  x[threadIdx.x] = line[31 - threadIdx.x];
}

// d[16][8] = a[16][8] b[8][8] by one warp
__global__ void multiply_tf32(const float* a, const float* b, float* d, int bug) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  float sum[4] = {};
  unsigned left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = __float_as_uint(a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
  for (int i = 0; i < 2; ++i) right[i] = __float_as_uint(b[(t + 4 * i) * 8 + g]);
  if (bug == wrong_fragment) {
    const unsigned swapped = left[1];
    left[1] = left[2];
    left[2] = swapped;
  }
  mma_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// d[16][8] = a[16][16] b[16][8] by one warp; b is given with k contiguous, as [8][16]
__global__ void multiply_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int bug) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const auto* a2 = reinterpret_cast<const unsigned*>(a);  // pairs
  const auto* b2 = reinterpret_cast<const unsigned*>(b);
  float sum[4] = {};
  unsigned left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = a2[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)];
  for (int i = 0; i < 2; ++i) right[i] = b2[g * 8 + t + 4 * i];
  if (bug == wrong_fragment) {
    const unsigned swapped = right[0];
    right[0] = right[1];
    right[1] = swapped;
  }
  mma_bf16(sum, left, right);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// What each lane of a warp gets from each operation: out[operation][32]
__global__ void exchange(int* out) {
  const int lane = int(threadIdx.x);
  int k = 0;
  out[32 * k++ + lane] = __shfl_sync(all_lanes, lane, 5);
  out[32 * k++ + lane] = __shfl_sync(all_lanes, lane, 5, 8);
  out[32 * k++ + lane] = __shfl_xor_sync(all_lanes, lane, 3);
  out[32 * k++ + lane] = __shfl_up_sync(all_lanes, lane, 2, 16);
  out[32 * k++ + lane] = __shfl_down_sync(all_lanes, lane, 20);
  out[32 * k++ + lane] = int(__ballot_sync(all_lanes, lane % 3 == 0));
  out[32 * k++ + lane] = __any_sync(all_lanes, lane == 7);
  out[32 * k++ + lane] = __all_sync(all_lanes, lane != 7);
  // The halves of the warp, apart
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  out[32 * k++ + lane] = __shfl_xor_sync(half, lane, 8);
  // One half alone, while the other waits for it
  int v = lane;
  if (lane < 16) v = __shfl_xor_sync(half, lane, 4);
  out[32 * k++ + lane] = __shfl_xor_sync(all_lanes, v, 1);
}

// What a block votes, and what its threads do to a number together: 8 numbers, by 64 threads
__global__ void agree(int* out) {
  const int thread = int(threadIdx.x);
  const int count = __syncthreads_count(thread % 3 == 0);
  const int all = __syncthreads_and(thread != 40) + 2 * __syncthreads_and(thread < 1024);
  const int any = __syncthreads_or(thread == 40) + 2 * __syncthreads_or(thread < 0);
  if (thread == 0) {
    out[0] = count;
    out[1] = all;
    out[2] = any;
  }
  atomicMax(out + 3, thread);
  atomicMin(out + 4, thread - 5);
  atomicOr(out + 5, 1 << thread % 8);
  int seen = 0, before;
  while ((before = atomicCAS(out + 6, seen, seen + 1)) != seen) seen = before;
  atomicExch(out + 7, 9);
}

// The numbers in every format: rounded, and back
__global__ void round_numbers(const float* x, __half* half, __nv_bfloat16* bf16, float* back, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  half[i] = __float2half(x[i]);
  bf16[i] = __float2bfloat16(x[i]);
  back[2 * i] = __half2float(half[i]);
  back[2 * i + 1] = __bfloat162float(bf16[i]);
}

// Arithmetic for the translator: every line is another instruction of PTX, or several. One thread a value.
struct Values {
  const int* i;
  const float* x;
  const double* y;
};
constexpr int int_results = 16, float_results = 16, double_results = 8;
__global__ void calculate(Values in, int* ints, float* floats, double* doubles, int n) {
  const int k = int(threadIdx.x);
  const int a = in.i[k], b = in.i[(k + 1) % n];
  const unsigned u = unsigned(a), v = unsigned(b);
  const float x = in.x[k], z = in.x[(k + 1) % n];
  const double y = in.y[k], w = in.y[(k + 1) % n];
  int* const io = ints + int_results * k;
  float* const xo = floats + float_results * k;
  double* const yo = doubles + double_results * k;

  io[0] = int(u * v + 7);
  io[1] = b != 0 && b != -1 ? a / b + a % b : 0;
  io[2] = v ? int(u / v ^ u % v) : 0;
  io[3] = int((static_cast<unsigned long long>(u) * v) >> 32);
  io[4] = int((static_cast<long long>(a) * b) >> 32);
  io[5] = a >> (b & 31) ^ int(u >> (v & 31)) ^ int(u << (v & 31));
  io[6] = max(a, b) - min(a, b) / 2;
  io[7] = __popc(u) + 64 * __clz(a) + 4096 * __ffs(a);
  io[8] = int(x);
  io[9] = int(floorf(z)) + int(y);
  // Comparisons and their opposites, of numbers that are equal, are not, or NaN
  const float p = k % 4 == 3 ? __uint_as_float(0x7fc00000u) : x, q = k % 2 ? p : z;
  io[10] = (p < z) + 2 * !(p < q) + 4 * (p >= q) + 8 * !(p >= z) + 16 * (p > z) + 32 * !(p > q) + 64 * (p <= q) +
           128 * !(p <= z) + 256 * (p == q) + 512 * (p != q) + 1024 * (y < w) + 2048 * (y == w) + 4096 * !(y > w);
  io[11] = static_cast<signed char>(a) + static_cast<unsigned short>(b);
  io[12] = int(static_cast<long long>(a) * 3 / (static_cast<long long>(b) * b + 1));
  io[13] = (a & b) | (a ^ (b & 0xff)) | ~a;
  switch (k % 6) {
    case 0:
      io[14] = a;
      break;
    case 1:
      io[14] = b * 3;
      break;
    case 2:
      io[14] = a - b;
      break;
    case 3:
      io[14] = k;
      break;
    case 4:
      io[14] = -a;
      break;
    default:
      io[14] = 1;
  }
  int history[8];
  for (int j = 0; j < 8; ++j) history[j] = a * j;
  for (int j = 0; j < 8; ++j) history[(v + j) % 8] += history[(u + 2 * j) % 8];
  io[15] = history[v % 8] - history[u % 8];

  xo[0] = x * z + x;
  xo[1] = z != 0 ? x / z : 0;
  xo[2] = sqrtf(fabsf(x));
  xo[3] = expf(x);
  xo[4] = tanhf(x);
  xo[5] = fmaf(x, z, -x);
  xo[6] = fmaxf(x, z) - fminf(x, z);
  xo[7] = float(a) + float(u);
  xo[8] = float(y);
  xo[9] = rsqrtf(fabsf(x) + 1);
  xo[10] = copysignf(z, x);
  xo[11] = truncf(x) + ceilf(z) + rintf(x);
  xo[12] = logf(fabsf(x) + 0.5f);
  xo[13] = 1 / (1 + expf(-x));
  xo[14] = __uint_as_float(__float_as_uint(x) & 0xffffe000u);
  xo[15] = x < 0 ? 0.0f : x;

  yo[0] = y * w + double(x);
  yo[1] = w != 0 ? y / w : 0;
  yo[2] = exp(y / 8);
  yo[3] = tanh(y);
  yo[4] = fma(y, w, -y);
  yo[5] = sqrt(fabs(w)) + double(a);
  yo[6] = fmax(y, w);
  yo[7] = log(fabs(y) + 0.5);
}

// out[k] = number of the thread that came k-th
__global__ void come(int* out, int* count) {
  const int thread = int(blockIdx.x * blockDim.x + threadIdx.x);
  out[atomicAdd(count, 1)] = thread;
}

__global__ void wait_for_nothing(const unsigned* flag) {
  while (load_acquire(flag) == 0) {}
}

// Lane 0 waits for its block, the others of its warp for lane 0
__global__ void wait_for_each_other() {
  if (threadIdx.x == 0) __syncthreads();
  __syncwarp();
  if (threadIdx.x != 0) __syncthreads();
}

__global__ void copy_numbers(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x]; }

}  // namespace gatewise::cuda

// --- The host's side -------------------------------------------------------------------------------------------------

namespace gatewise::cuda {

// Numbers on the device, for as long as it lives
template <class T> struct Array {
  T* data = nullptr;
  std::size_t n;
  explicit Array(std::size_t n) : n(n) { GATEWISE_CUDA_CHECK(cudaMalloc(&data, n * sizeof(T))); }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    GATEWISE_CUDA_CHECK(cudaMemcpy(data, values.data(), n * sizeof(T), cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> values(n);
    GATEWISE_CUDA_CHECK(cudaMemcpy(values.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
};

inline std::vector<float> numbers(int n) {  // sevenths and so on: exact in no format, the same each time
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = float((i * 37 + 11) % 101) / 101 - 0.5f;
  return x;
}
template <class T> void print(const std::vector<T>& values) {
  for (const T v : values) std::printf("%.17g ", double(v));
  std::printf("\n");
}

inline void run_sum(int bug) {
  const Array<float> x(numbers(300)), out(std::vector<float>{0});
  launch(sum, {2, 64, 0, false}, nullptr, x.data, out.data, 300, bug);
  print(out.host());
}

inline void run_diffuse(int bug, int blocks = 3) {
  const int n = 32, steps = 4;
  const Array<float> a(numbers(blocks * n)), b(blocks * n);
  const Array<unsigned> arrivals(std::vector<unsigned>{0});
  const std::size_t bytes = (std::size_t(n) + 2 + 2) * 4 + std::size_t(n) * 4;  // the second part is aligned to 16
  const std::size_t asked = bug == too_little_shared ? bytes - 4 : bytes;
  launch(diffuse, {unsigned(blocks), unsigned(n), asked, bug != not_cooperative}, nullptr, a.data, b.data,
         arrivals.data, steps, bug);
  print(a.host());
}

inline void run_reverse(int bug) {
  const Array<float> x(numbers(32));
  launch(reverse, {1, 32, 128, false}, nullptr, x.data, bug);
  print(x.host());
}

inline void run_multiply(bool bf16, int bug) {
  const Array<float> d(128);
  if (bf16) {
    std::vector<__nv_bfloat16> a(256), b(128);
    for (int i = 0; i < 256; ++i) a[i] = __float2bfloat16(numbers(256)[i]);
    for (int i = 0; i < 128; ++i) b[i] = __float2bfloat16(numbers(128)[i]);
    const Array<__nv_bfloat16> left(a), right(b);
    launch(multiply_bf16, {1, 32, 0, false}, nullptr, left.data, right.data, d.data, bug);
  } else {
    const Array<float> left(numbers(128)), right(numbers(64));
    launch(multiply_tf32, {1, 32, 0, false}, nullptr, left.data, right.data, d.data, bug);
  }
  print(d.host());
}

inline void run_exchange() {
  const Array<int> out(10 * 32);
  launch(exchange, {1, 32, 0, false}, nullptr, out.data);
  print(out.host());
}

inline void run_agree() {
  const Array<int> out(std::vector<int>(8, 0));
  launch(agree, {1, 64, 0, false}, nullptr, out.data);
  print(out.host());
}

inline void run_calculate() {
  const std::vector<int> i{0, 1, -1, 7, -13, 100003, -99999, 2147483647, -2147483647, 255, -256, 65537};
  const std::vector<float> x{0, -0.0f, 0.5f, -1.5f, 3.25f, -7.75f, 1e-3f, 20, -20, 1e9f, 1e-30f, -100};
  std::vector<double> y(x.begin(), x.end());
  y[3] = 1.0 / 3;
  const int n = int(i.size());
  const Array<int> in_i(i), ints(int_results * n);
  const Array<float> in_x(x), floats(float_results * n);
  const Array<double> in_y(y), doubles(double_results * n);
  launch(calculate, {1, unsigned(n), 0, false}, nullptr, Values{in_i.data, in_x.data, in_y.data}, ints.data,
         floats.data, doubles.data, n);
  print(ints.host());
  print(floats.host());
  print(doubles.host());
}

inline void run_come() {
  const Array<int> out(3 * 40), count(std::vector<int>{0});
  launch(come, {3, 40, 0, false}, nullptr, out.data, count.data);
  print(out.host());
}

inline void run_wait(bool each_other) {
  const Array<unsigned> flag(std::vector<unsigned>{0});
  if (each_other) launch(wait_for_each_other, {1, 32, 0, false}, nullptr);
  else launch(wait_for_nothing, {2, 32, 0, true}, nullptr, flag.data);
}

// What the runtime library must refuse, each a line: what was asked, and its answer
inline void run_refusals() {
  float host[4] = {};
  const Array<float> device(4);
  const auto answer = [](const char* what, auto call) {
    try {
      call();
      std::printf("%s: accepted\n", what);
    } catch (const Error& error) { std::printf("%s: %s\n", what, cudaGetErrorName(error.code)); }
  };
  answer("direction", [&] { GATEWISE_CUDA_CHECK(cudaMemcpy(host, device.data, 16, cudaMemcpyHostToDevice)); });
  answer("beyond", [&] { GATEWISE_CUDA_CHECK(cudaMemset(device.data, 0, 17)); });
  answer("foreign", [&] { GATEWISE_CUDA_CHECK(cudaFree(host)); });
  answer("shared", [&] { launch(copy_numbers, {1, 4, 49 << 10, false}, nullptr, device.data, device.data); });
  answer("threads", [&] { launch(copy_numbers, {1, 1025, 0, false}, nullptr, device.data, device.data); });
  answer("attribute", [&] {
    GATEWISE_CUDA_CHECK(cudaFuncSetAttribute(copy_numbers, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20));
  });
  answer("resident", [&] { run_diffuse(none, 8 * 32 + 1); });
  answer("copy", [&] { launch(copy_numbers, {1, 4, 0, false}, nullptr, device.data, device.data); });
}

// Blocks a multiprocessor, of these threads and KiB
inline void run_occupancy() {
  std::vector<int> blocks;
  for (const auto& [threads, kib] : {std::pair{32, 0}, {256, 0}, {1000, 0}, {256, 100}, {256, 227}}) {
    blocks.emplace_back();
    GATEWISE_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks.back(), sum, threads, kib << 10));
  }
  print(blocks);
}

// Prints 4 numbers that the device never wrote
inline void run_uninitialised() { print(Array<float>(4).host()); }

// A graph of a copy and a kernel, replayed with other numbers, then streams ordered by an event
inline void run_streams(bool wait) {
  cudaStream_t stream, other;
  GATEWISE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  GATEWISE_CUDA_CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  const Array<float> in(std::vector<float>{1, 2, 3, 4}), middle(std::vector<float>(4, 0)),
      out(std::vector<float>(4, 0));
  const std::size_t bytes = 4 * sizeof(float);

  cudaGraph_t graph;
  cudaGraphExec_t executable;
  GATEWISE_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  GATEWISE_CUDA_CHECK(cudaMemcpyAsync(middle.data, in.data, bytes, cudaMemcpyDeviceToDevice, stream));
  launch(copy_numbers, {1, 4, 0, false}, stream, middle.data, out.data);
  GATEWISE_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  print(out.host());  // captured, not run
  GATEWISE_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  GATEWISE_CUDA_CHECK(cudaGraphDestroy(graph));
  for (const float first : {5.0f, 6.0f}) {
    const std::vector<float> values{first, 2, 3, 4};
    GATEWISE_CUDA_CHECK(cudaMemcpy(in.data, values.data(), bytes, cudaMemcpyHostToDevice));
    GATEWISE_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    GATEWISE_CUDA_CHECK(cudaStreamSynchronize(stream));
    print(out.host());
  }
  GATEWISE_CUDA_CHECK(cudaGraphExecDestroy(executable));

  cudaEvent_t written;
  GATEWISE_CUDA_CHECK(cudaEventCreateWithFlags(&written, cudaEventDisableTiming));
  GATEWISE_CUDA_CHECK(cudaMemsetAsync(middle.data, 0, bytes, stream));
  GATEWISE_CUDA_CHECK(cudaEventRecord(written, stream));
  if (wait) GATEWISE_CUDA_CHECK(cudaStreamWaitEvent(other, written, 0));
  launch(copy_numbers, {1, 4, 0, false}, other, middle.data, out.data);
  GATEWISE_CUDA_CHECK(cudaStreamSynchronize(other));
  print(out.host());
  GATEWISE_CUDA_CHECK(cudaEventDestroy(written));
  GATEWISE_CUDA_CHECK(cudaStreamDestroy(stream));
  GATEWISE_CUDA_CHECK(cudaStreamDestroy(other));
}

inline int run(const char* kernel, const char* bug_name) {
  int bug = 0;
  while (bug < bug_count && std::strcmp(bug_names[bug], bug_name) != 0) ++bug;
  const auto is = [kernel](const char* name) { return std::strcmp(kernel, name) == 0; };
  if (bug == bug_count) return std::fprintf(stderr, "no such bug: %s\n", bug_name), 2;
  if (is("sum")) run_sum(bug);
  else if (is("diffuse")) run_diffuse(bug);
  else if (is("reverse")) run_reverse(bug);
  else if (is("multiply_tf32")) run_multiply(false, bug);
  else if (is("multiply_bf16")) run_multiply(true, bug);
  else if (is("exchange")) run_exchange();
  else if (is("agree")) run_agree();
  else if (is("calculate")) run_calculate();
  else if (is("come")) run_come();
  else if (is("livelock")) run_wait(false);
  else if (is("deadlock")) run_wait(true);
  else if (is("occupancy")) run_occupancy();
  else if (is("refusals")) run_refusals();
  else if (is("uninitialised")) run_uninitialised();
  else if (is("streams")) run_streams(true);
  else if (is("streams_unordered")) run_streams(false);
  else return std::fprintf(stderr, "no such kernel: %s\n", kernel), 2;
  return 0;
}

}  // namespace gatewise::cuda

// For ctypes: rounds x[n] to both formats, and back[n][2] from them
extern "C" int probe_rounding(const float* x, unsigned short* half, unsigned short* bf16, float* back, int n) {
  using namespace gatewise::cuda;
  try {
    const Array<float> in(std::vector<float>(x, x + n)), out(2 * n);
    const Array<__half> halves(n);
    const Array<__nv_bfloat16> bf16s(n);
    launch(round_numbers, {unsigned(n + 63) / 64, 64, 0, false}, nullptr, in.data, halves.data, bf16s.data, out.data,
           n);
    std::memcpy(half, halves.host().data(), n * sizeof(short));
    std::memcpy(bf16, bf16s.host().data(), n * sizeof(short));
    std::memcpy(back, out.host().data(), 2 * n * sizeof(float));
    return 0;
  } catch (const Error& error) { return int(error.code); }
}

int main(int argc, char** argv) {
  try {
    if (argc > 1) return gatewise::cuda::run(argv[1], argc > 2 ? argv[2] : "none");
    std::fprintf(stderr, "usage: probes KERNEL [BUG]\n");
    return 2;
  } catch (const gatewise::cuda::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
