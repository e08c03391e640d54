// CUDA C++ for a host compiler: the part of the language and of its runtime library that gatewise's kernels use, so
// that a .cu file compiles with g++ -x c++ and runs without a GPU. Every CUDA thread is a fibre of its own; a block's
// fibres take turns, and one runs at a time in the whole grid, so a run repeats exactly. cuda_host.cpp has the
// machinery and says what it checks. Where a construct is missing here, kernels do not use it, on purpose:
// __threadfence() (the race detector knows no fences), volatile spins (nothing would ever be scheduled), static
// kernels, <<<>>>.
//
// Environment: CUDA_HOST_SCHEDULE=forward|reverse|random:SEED, the order of threads and blocks;
// CUDA_HOST_DEFERRED=1, streams run only where the host waits for them, so that a missing wait shows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // blocks that run together have an OS thread each, hence a copy each

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr int warpSize = 32;
using std::max;
using std::min;

namespace cuda_host {

// Where in the kernel's source a thread is. Threads that meet must be at the same place. It is a line, not an address:
// the compiler may merge two calls, or make two of one.
struct Place {
  const char* file;
  int line;
  int instruction;  // of PTX; 0 in compiled C++
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line, 0};
  }
};

struct Thread {
  uint3 index;
  int lane, warp;
};
extern __thread Thread* current;  // the CUDA thread that runs

enum class Vote { count, all, any };
void block_barrier(Place);
int block_vote(Vote, bool predicate, Place);
void warp_barrier(unsigned mask, Place);
void shuffle(unsigned mask, const void* in, void* out, unsigned bytes, int source, Place);  // out = in of lane `source`
unsigned ballot(unsigned mask, bool predicate, Place);
void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place = Place::here());
void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place = Place::here());
void yield();                                                         // lets the others run
void progress();                                                      // what others wait for may have changed
[[noreturn]] void fail(const char* sentence, Place = Place::here());  // ends the launch

struct DynamicShared {};  // stands for the dynamic shared memory, which is reached by its parts only
void* shared_part(std::size_t offset, std::size_t bytes, Place = Place::here());

// What translated PTX needs (ptx.py)
struct PtxEntry {
  const char* name;
  void (*run)(const char* parameters);
  unsigned static_shared;  // bytes; the dynamic shared memory lies behind them
};
enum class Access { load, store, read_only_load };
void* shared_window(std::uint64_t offset, unsigned bytes, Place);           // checks bounds and alignment
void* global_window(std::uint64_t address, unsigned bytes, Access, Place);  // the same, and stale read-only data
constexpr std::uint64_t shared_window_bit = std::uint64_t(1) << 56;         // generic addresses of shared memory

inline int lane_above(int lane, int target, int width) { return target < (lane & -width) + width ? target : lane; }
inline int lane_below(int lane, int target, int width) { return target >= (lane & -width) ? target : lane; }
template <class T> T shuffle(unsigned mask, T value, int source, Place place) {
  T result;
  shuffle(mask, &value, &result, sizeof(T), source, place);
  return result;
}

// CUDA's atomics are relaxed. Here they are inline, for the sanitizers to see.
template <class T, class F> T atomic_update(T* p, F f) {
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do next = f(old);
  while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  progress();
  return old;
}

}  // namespace cuda_host

#define threadIdx (cuda_host::current->index)
extern __thread uint3 blockIdx;  // of the block that this OS thread runs
extern __thread dim3 blockDim, gridDim;

// --- Barriers, votes and shuffles ------------------------------------------------------------------------------------

inline void __syncthreads(cuda_host::Place place = cuda_host::Place::here()) { cuda_host::block_barrier(place); }
inline int __syncthreads_count(int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::block_vote(cuda_host::Vote::count, predicate, place);
}
inline int __syncthreads_and(int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::block_vote(cuda_host::Vote::all, predicate, place);
}
inline int __syncthreads_or(int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::block_vote(cuda_host::Vote::any, predicate, place);
}
inline void __syncwarp(unsigned mask = ~0u, cuda_host::Place place = cuda_host::Place::here()) {
  cuda_host::warp_barrier(mask, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::ballot(mask, predicate, place);
}
inline int __any_sync(unsigned mask, int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::ballot(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_host::Place place = cuda_host::Place::here()) {
  return cuda_host::ballot(mask, predicate, place) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, cuda_host::Place place = cuda_host::Place::here()) {
  const int lane = cuda_host::current->lane;
  return cuda_host::shuffle(mask, value, (lane & -width) | (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, cuda_host::Place place = cuda_host::Place::here()) {
  const int lane = cuda_host::current->lane;
  return cuda_host::shuffle(mask, value, cuda_host::lane_above(lane, lane ^ bits, width), place);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                                      cuda_host::Place place = cuda_host::Place::here()) {
  const int lane = cuda_host::current->lane;
  return cuda_host::shuffle(mask, value, cuda_host::lane_above(lane, lane + int(by), width), place);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                                    cuda_host::Place place = cuda_host::Place::here()) {
  const int lane = cuda_host::current->lane;
  return cuda_host::shuffle(mask, value, cuda_host::lane_below(lane, lane - int(by), width), place);
}

// --- Atomics, loads, arithmetic --------------------------------------------------------------------------------------

template <class T> T atomicAdd(T* p, T v) {
  return cuda_host::atomic_update(p, [v](T old) { return T(old + v); });
}
template <class T> T atomicMax(T* p, T v) {
  return cuda_host::atomic_update(p, [v](T old) { return old > v ? old : v; });
}
template <class T> T atomicMin(T* p, T v) {
  return cuda_host::atomic_update(p, [v](T old) { return old < v ? old : v; });
}
template <class T> T atomicOr(T* p, T v) {
  return cuda_host::atomic_update(p, [v](T old) { return old | v; });
}
template <class T> T atomicExch(T* p, T v) {
  return cuda_host::atomic_update(p, [v](T) { return v; });
}
template <class T> T atomicCAS(T* p, T expected, T v) {
  cuda_host::yield();  // it may stand in a loop that waits
  __atomic_compare_exchange(p, &expected, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
inline void __nanosleep(unsigned) { cuda_host::yield(); }
inline void __trap() { cuda_host::fail("__trap()"); }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcg(T* p, T v) { *p = v; }
template <class T> void __stcs(T* p, T v) { *p = v; }

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class To, class From> To cuda_host_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

// --- cuda_bf16.h, cuda_fp16.h ----------------------------------------------------------------------------------------

namespace cuda_host {
float from_bf16(std::uint16_t);
float from_half(std::uint16_t);
std::uint16_t to_bf16(float);  // both round to nearest, ties to even
std::uint16_t to_half(float);
}  // namespace cuda_host

struct __nv_bfloat16 {
  std::uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(cuda_host::to_bf16(x)) {}
  operator float() const { return cuda_host::from_bf16(bits); }
};
struct __half {
  std::uint16_t bits;
  __half() = default;
  __half(float x) : bits(cuda_host::to_half(x)) {}
  operator float() const { return cuda_host::from_half(bits); }
};
using nv_bfloat16 = __nv_bfloat16;
using half = __half;
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

// --- The runtime library ---------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  void *devicePointer, *hostPointer;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum : unsigned { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106
};
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeCooperative = 2 };

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphExec_st* cudaGraphExec_t;
union cudaLaunchAttributeValue { int cooperative; };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  std::size_t reservedSharedMemPerBlock;
  int major, minor, multiProcessorCount, warpSize, regsPerBlock, regsPerMultiprocessor, maxThreadsPerBlock;
  int maxThreadsPerMultiProcessor, maxBlocksPerMultiProcessor, l2CacheSize, cooperativeLaunch;
};

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);  // for the last error, the sentence of what was found

cudaError_t cudaDriverGetVersion(int*);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int device);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int device);
cudaError_t cudaDeviceSynchronize();

cudaError_t cudaMalloc(void**, std::size_t);  // filled with 0xff: NaN in every floating-point type
cudaError_t cudaFree(void*);
template <class T> cudaError_t cudaMalloc(T** p, std::size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes*, const void*);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t, cudaMemcpyKind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t, cudaMemcpyKind, cudaStream_t = nullptr);
cudaError_t cudaMemset(void*, int value, std::size_t);
cudaError_t cudaMemsetAsync(void*, int value, std::size_t, cudaStream_t = nullptr);

cudaError_t cudaStreamCreate(cudaStream_t*);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t*);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t);  // there is no time here: 0

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);

namespace cuda_host {
cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes);
cudaError_t blocks_per_multiprocessor(int* blocks, int threads, std::size_t shared_bytes);
// Runs `body` as every thread, or, where nvcc's PTX of the kernel is linked in, that with these parameters
cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel, std::function<void()> body,
                   std::vector<char> parameters);

template <class T> void append_parameter(std::vector<char>& parameters, const T& value) {
  const std::size_t offset = (parameters.size() + alignof(T) - 1) / alignof(T) * alignof(T);
  parameters.resize(offset + sizeof(T));
  std::memcpy(parameters.data() + offset, &value, sizeof(T));
}
}  // namespace cuda_host

template <class F> cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
  return cuda_host::set_dynamic_shared_limit(reinterpret_cast<const void*>(kernel), bytes);
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int threads, std::size_t shared_bytes) {
  return cuda_host::blocks_per_multiprocessor(blocks, threads, shared_bytes);
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  const std::tuple<P...> values(std::forward<A>(args)...);  // copied now, as a launch does
  std::vector<char> parameters;
  std::apply([&](const P&... value) { (cuda_host::append_parameter<P>(parameters, value), ...); }, values);
  return cuda_host::launch(
      *config, reinterpret_cast<const void*>(kernel), [kernel, values] { std::apply(kernel, values); },
      std::move(parameters));
}

// For tests. The device is one that the environment or they describe: by default 8 multiprocessors, 227 KiB.
extern "C" {
void cuda_host_schedule(const char* schedule);
void cuda_host_device(int multiprocessors, int shared_bytes_per_block);
void cuda_host_deferred(int deferred);
// The driver's version as CUDA writes it, 0 for none; and how many devices there are. All memory is device 0's, but
// what is said to be another's: no kernel can tell.
void cuda_host_driver(int version, int devices);
void cuda_host_place(const void* allocation, int device);
// The runtime library for callers without C++: device memory (null: none left), a copy to it, a stream, which does not
// wait for the default stream, and a wait for its work, or for that of all, if it is null. 0: no error
void* cuda_host_allocate(std::size_t bytes);
int cuda_host_free(void*);
int cuda_host_copy(void* to, const void* from_host, std::size_t bytes, void* stream);
void* cuda_host_stream();
int cuda_host_synchronize(void* stream);
// Launches are not run but written to this file, a line each: the kernel's mangled name, the grid's three sizes,
// threads of a block, bytes of dynamic shared memory, whether it is cooperative. Null: they are run again.
void cuda_host_record(const char* path);
unsigned long long cuda_host_switches();  // between fibres, so far
}
