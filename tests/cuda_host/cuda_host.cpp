// The runtime behind cuda_host.hpp. Every CUDA thread is a fibre: a stack, and a place to go on. A fibre runs until it
// must wait (at a barrier, for lanes of its warp) or yields; then the next one of its block runs, in the order of the
// schedule. Blocks run one after another, or, in a cooperative launch, in turns: each on an OS thread, for the sake of
// its own __shared__ variables, one of them at a time. So nothing here runs in parallel, and a run repeats exactly.
//
// What is found, as an error of the launch with a sentence, instead of a hang or a wrong number: threads of a block at
// different barriers, or exited before one; lanes of a mask in different warp operations, outside the mask or exited;
// deadlock (nobody can go on); livelock (everybody only yields); writes beyond a part of the shared memory; launches
// that no device would take; copies in the wrong direction, pointers that nobody allocated. With PTX also bounds and
// alignment of every access, and reads through the read-only cache of what the kernel writes.
//
// This file is compiled without sanitizers, its callers with them or not: it tells those that are there about fibres,
// and tells the race detector what orders memory (barriers do, shuffles do not). It must not allocate on a fibre, whose
// end the race detector would take for the end of the allocation's owner.
#include "cuda_host.hpp"

#include <cxxabi.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>

extern "C" {
#define WEAK __attribute__((weak))  // null where the sanitizer is not linked in
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __sanitizer_start_switch_fiber(void**, const void*, std::size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*);
WEAK void __asan_poison_memory_region(const volatile void*, std::size_t);
WEAK void __asan_unpoison_memory_region(const volatile void*, std::size_t);
WEAK extern const cuda_host::PtxEntry cuda_host_ptx_entries[];  // ends with a null name; null where there is no PTX
}

// --- Contexts: a stack and where it goes on --------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)
#define CUDA_HOST_ASSEMBLY
// What a call preserves goes on the old stack, its pointer to *from; the same comes back from the new stack
extern "C" void cuda_host_jump(void** from, void* to);
asm(R"(
.text
.type cuda_host_jump, @function
cuda_host_jump:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuda_host_jump, .-cuda_host_jump
)");
#else
#include <ucontext.h>
#endif

__thread uint3 blockIdx;
__thread dim3 blockDim, gridDim;

namespace cuda_host {

__thread Thread* current;

namespace {

struct Context {
#ifdef CUDA_HOST_ASSEMBLY
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  char* stack = nullptr;  // lowest address
  std::size_t stack_bytes = 0;
  void* tsan = nullptr;
  void* fake_stack = nullptr;  // ASan's
};

// `colour` moves the top of the stack: tops at equal places of their pages would all fight for the same cache sets
void prepare(Context& context, void (*entry)(), unsigned colour) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(context.stack, context.stack_bytes);
#ifdef CUDA_HOST_ASSEMBLY
  void** top = reinterpret_cast<void**>(context.stack + context.stack_bytes - colour % 64 * 64);
  *--top = nullptr;  // where entry would return to; keeps its stack aligned
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = context.stack;
  context.registers.uc_stack.ss_size = context.stack_bytes - colour % 64 * 64;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

void arrived_at(Context& context) {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(context.fake_stack, nullptr, nullptr);
}
void jump(Context& from, Context& to, bool for_good = false) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, 1);  // 1: orders nothing
#ifdef CUDA_HOST_ASSEMBLY
  cuda_host_jump(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrived_at(from);
}

// Stacks are kept for the next launch, and with each what the race detector knows its fibre by, which takes a
// millisecond to make. Below each lies a page that nobody may touch.
class Stacks {
 public:
  void take(Context& context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    context.stack_bytes = __tsan_create_fiber || __asan_poison_memory_region ? 256 << 10 : 64 << 10;
    if (free_.empty()) {
      const std::size_t page = 4096, bytes = context.stack_bytes + page;
      void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      mprotect(p, page, PROT_NONE);
      free_.push_back({static_cast<char*>(p) + page, nullptr});
    }
    context.stack = free_.back().stack;
    context.tsan = free_.back().tsan;
    free_.pop_back();
    if (__tsan_create_fiber && !context.tsan) context.tsan = __tsan_create_fiber(0);
  }
  // ended: it has left all its functions, and another can take its place
  void give_back(const Context& context, bool ended) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (context.tsan && !ended) __tsan_destroy_fiber(context.tsan);
    free_.push_back({context.stack, ended ? context.tsan : nullptr});
  }

 private:
  struct Stack {
    char* stack;
    void* tsan;
  };
  std::mutex mutex_;
  std::vector<Stack> free_;
};
Stacks stacks;

// --- What is set from outside ----------------------------------------------------------------------------------------

struct Schedule {
  enum Order { forward, reverse, random } order = forward;
  unsigned seed = 0;

  static Schedule parse(const char* text) {
    const std::string word(text, std::strcspn(text, ":"));
    const char* colon = std::strchr(text, ':');
    if (word == "forward" || word.empty()) return {forward, 0};
    if (word == "reverse") return {reverse, 0};
    if (word == "random") return {random, colon ? unsigned(std::strtoul(colon + 1, nullptr, 10)) : 0};
    std::fprintf(stderr, "CUDA_HOST_SCHEDULE: expected forward, reverse or random:SEED; got %s\n", text);
    std::abort();
  }
};
const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}
Schedule schedule = Schedule::parse(environment("CUDA_HOST_SCHEDULE"));
bool deferred = *environment("CUDA_HOST_DEFERRED") != 0;
int multiprocessors = 8;
std::size_t shared_limit = 227 << 10;  // of a block that asked for more than the default
constexpr std::size_t shared_default = 48 << 10, shared_reserved = 1 << 10;
constexpr int threads_per_multiprocessor = 2048, threads_per_block = 1024, blocks_limit = 32;
unsigned long long switches;
std::FILE* record;  // where launches are written down instead of run, or null

// --- The state of a launch -------------------------------------------------------------------------------------------

enum class State : std::uint8_t { ready, at_barrier, in_warp, exited };
struct Fibre : Context {
  Thread thread;
  State state = State::ready;
  Place place{};  // of the last operation
  // A warp operation's arguments, while its lanes gather
  const void* in;
  void* out;
  int source;
  int vote;  // result of a block's vote
};

// Memory that a barrier orders: what arrived before it, before what leaves after it. Two clocks in turns, for a fast
// thread may arrive at the next barrier before a slow one has left this one.
class Order {
 public:
  void* arrive() {
    char* clock = &clocks_[generation_ & 1];
    if (__tsan_release) __tsan_release(clock);
    return clock;
  }
  void complete() { ++generation_; }
  static void leave(void* clock) {
    if (__tsan_acquire) __tsan_acquire(clock);
  }

 private:
  char clocks_[2];
  unsigned generation_ = 0;
};

enum class Operation { barrier, shuffle, ballot, mma_tf32, mma_bf16 };
const char* const operation_names[] = {"__syncwarp", "a shuffle", "a vote", "mma (tf32)", "mma (bf16)"};
struct Meeting {  // lanes of one mask that wait for each other
  unsigned mask, arrived, votes;
  Operation operation;
  unsigned bytes;
  Place place;
  char* clock;  // what the race detector orders memory by
};
struct Warp {
  unsigned alive = 0;
  Meeting meetings[32];  // a lane has come to one at most; others may wait for it elsewhere, under other masks
  int meeting_count = 0;
  char clocks[64];  // of the meetings, in turns
  unsigned next_clock = 0;
};

struct Grid;
struct Block {
  Grid* grid = nullptr;
  unsigned index = 0;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  std::vector<int> order;    // of the fibres, as the schedule wants them
  std::size_t position = 0;  // in the order; its end is the end of a round
  Context scheduler;
  char start;  // clock of the race detector: what was done before the launch
  std::mt19937 random;
  int alive = 0;
  bool progressed = false;  // in this round
  bool finished = false;
  std::condition_variable turn;

  int arrived = 0;  // at the barrier
  Place place{};
  Order barrier;
  int votes_for = 0;

  // Dynamic shared memory: parts with guard bytes before, between and behind them. With PTX one window.
  static constexpr std::size_t guard = 64, part_limit = 32;
  struct Part { std::size_t offset, bytes; };
  Part parts[part_limit];
  std::size_t part_count = 0, arena_bytes = 0;
  unsigned char* arena = nullptr;
};

struct Grid {
  dim3 size, block_size;
  std::size_t shared_bytes;  // with the static ones of PTX
  bool cooperative, ptx;
  const std::function<void()>* body;
  unsigned count = 0;  // of blocks
  std::vector<std::unique_ptr<Block>> blocks;
  std::mutex mutex;
  unsigned started = 0, turn = 0;
  unsigned long idle = 0;  // turns in which nothing happened, in a row
  std::mt19937 random;
  bool failed = false;
  char message[512];
  char end;  // clock of the race detector: everything a kernel did, before what the host does next
};

__thread Block* block;  // that runs
__thread Fibre* fibre;

std::string at(Place place) {
  if (!place.file) return "the start";
  const char* slash = std::strrchr(place.file, '/');
  const std::string where = std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
  return place.instruction ? where + " (PTX line " + std::to_string(place.instruction) + ")" : where;
}
bool same(Place a, Place b) {
  return a.line == b.line && a.instruction == b.instruction && (a.file == b.file || !std::strcmp(a.file, b.file));
}
uint3 coordinates(unsigned i, dim3 size) { return {i % size.x, i / size.x % size.y, i / (size.x * size.y)}; }

// The first failure of a launch is the one that is told
void note_failure(Grid& grid, const std::string& sentence) {
  if (grid.failed) return;
  grid.failed = true;
  std::snprintf(grid.message, sizeof grid.message, "%s", sentence.c_str());
}

// --- Scheduling ------------------------------------------------------------------------------------------------------

Fibre* next_ready(Block& b) {
  while (b.position < b.order.size()) {
    Fibre& f = b.fibres[b.order[b.position++]];
    if (f.state == State::ready) return &f;
  }
  return nullptr;
}

void enter(Fibre& next) {
  ++switches;
  fibre = &next;
  current = &next.thread;
}

// The running fibre lets the next one run, or the scheduler where the round is over
void reschedule(bool for_good = false) {
  Fibre* self = fibre;
  Fibre* next = block->grid->failed ? nullptr : next_ready(*block);
  if (next == self) return;
  if (next) enter(*next);
  jump(*self, next ? *next : static_cast<Context&>(block->scheduler), for_good);
}

void leave_warp(Fibre& f) {
  Warp& warp = block->warps[f.thread.warp];
  const unsigned bit = 1u << f.thread.lane;
  warp.alive &= ~bit;
  for (int i = 0; i < warp.meeting_count; ++i)
    if (warp.meetings[i].mask & bit)
      fail("a lane exits while others of its mask wait for it in a warp operation", warp.meetings[i].place);
}

void fibre_main() {
  arrived_at(*fibre);
  if (__tsan_acquire) __tsan_acquire(&block->start);
  (*block->grid->body)();
  leave_warp(*fibre);
  if (block->arrived) fail("a thread exits while others of its block wait for it at a barrier", block->place);
  fibre->state = State::exited;
  --block->alive;
  progress();
  if (__tsan_release) __tsan_release(&block->grid->end);
  reschedule(true);
  std::abort();  // nobody resumes it
}

// Rounds over the fibres, until one in which nothing happened. True if anything did.
bool run_turn(Block& b) {
  block = &b;
  bool any = false;
  do {
    b.progressed = false;
    b.position = 0;
    if (schedule.order == Schedule::random) std::shuffle(b.order.begin(), b.order.end(), b.random);
    if (Fibre* first = next_ready(b)) {
      enter(*first);
      jump(b.scheduler, *first);
    }
    any |= b.progressed;
  } while (b.progressed && b.alive && !b.grid->failed);
  return any;
}

// Of guards: NaN in every format too, but not the one that memory starts as, which arithmetic hands on
unsigned char guard_byte(std::size_t i) { return i % 2 ? 0x7f : 0xf7; }

void begin(Block& b, Grid& grid, unsigned index) {
  block = &b;  // also has the dynamic linker allocate this thread's variables now, not later on a fibre
  blockIdx = coordinates(index, grid.size);
  blockDim = grid.block_size;
  gridDim = grid.size;
  b.grid = &grid;
  b.index = index;
  b.random.seed(schedule.seed * 7919 + index);
  const unsigned threads = grid.block_size.x * grid.block_size.y * grid.block_size.z;
  b.alive = int(threads);
  b.arrived = 0;
  b.finished = false;

  b.part_count = 0;
  b.arena_bytes = (grid.shared_bytes + Block::guard * (Block::part_limit + 1) + 127) / 128 * 128;
  b.arena = static_cast<unsigned char*>(std::aligned_alloc(128, b.arena_bytes));
  if (!b.arena) throw std::bad_alloc();
  for (std::size_t i = 0; i < b.arena_bytes; ++i) b.arena[i] = grid.ptx ? 0xff : guard_byte(i);
  if (__asan_poison_memory_region) __asan_poison_memory_region(b.arena, b.arena_bytes);

  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &b.scheduler.stack_bytes);
  pthread_attr_destroy(&attributes);
  b.scheduler.stack = static_cast<char*>(stack);
  if (__tsan_get_current_fiber) b.scheduler.tsan = __tsan_get_current_fiber();

  b.fibres.assign(threads, {});
  b.warps.assign((threads + 31) / 32, {});
  b.order.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& f = b.fibres[i];
    b.order[i] = int(schedule.order == Schedule::reverse ? threads - 1 - i : i);
    f.thread = {coordinates(i, grid.block_size), int(i % 32), int(i / 32)};
    b.warps[i / 32].alive |= 1u << i % 32;
    stacks.take(f);
    prepare(f, fibre_main, i * 9);
  }
  if (__tsan_release) __tsan_release(&b.start);
}

void check_guards(Block& b) {
  std::size_t i = 0;
  for (std::size_t part = 0; part <= b.part_count; ++part) {
    const std::size_t start = part < b.part_count ? b.parts[part].offset + Block::guard * (part + 1) : b.arena_bytes;
    for (; i < start; ++i)
      if (b.arena[i] != guard_byte(i)) {
        const std::string which = part ? std::to_string(part - 1) : "0";
        return note_failure(*b.grid, (part ? "a write behind the end of part " : "a write before the start of part ") +
                                         which + " of the shared memory, in block " + std::to_string(b.index));
      }
    if (part < b.part_count) i += b.parts[part].bytes;
  }
}

void end(Block& b) {
  if (__tsan_release) {
    void* self = __tsan_get_current_fiber();
    for (Fibre& f : b.fibres)
      if (f.state != State::exited) {  // given up: on its behalf, for it will not say itself that it has ended
        __tsan_switch_to_fiber(f.tsan, 1);
        __tsan_release(&b.grid->end);
        __tsan_switch_to_fiber(self, 1);
      }
    __tsan_acquire(&b.grid->end);
  }
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(b.arena, b.arena_bytes);
  if (!b.grid->ptx && !b.grid->failed) check_guards(b);
  for (Fibre& f : b.fibres) stacks.give_back(f, f.state == State::exited);
  std::free(b.arena);
}

// Nothing happened for so many turns that nothing ever will?
void check_idle(Grid& grid, const std::vector<Block*>& blocks) {
  if (grid.idle < blocks.size()) return;
  int count[4] = {};
  Place place[4] = {};
  for (const Block* b : blocks)
    for (const Fibre& f : b->fibres) {
      ++count[int(f.state)];
      place[int(f.state)] = f.place;
    }
  const int ready = count[int(State::ready)];
  if (ready && grid.idle < 1000 * blocks.size()) return;
  std::string sentence = ready ? "livelock: " + std::to_string(ready) + " threads wait for memory that nobody changes" +
                                     (grid.cooperative ? "" : " (the launch is not cooperative)")
                               : std::string("deadlock: nobody can go on");
  for (const State state : {State::at_barrier, State::in_warp})
    if (count[int(state)])
      sentence += ", " + std::to_string(count[int(state)]) +
                  (state == State::at_barrier ? " are at a barrier" : " are in a warp operation") + " (one at " +
                  at(place[int(state)]) + ")";
  note_failure(grid, sentence + ", " + std::to_string(count[int(State::exited)]) + " have exited");
}

unsigned next_turn(Grid& grid, unsigned index) {
  const unsigned n = grid.count;
  unsigned step = schedule.order == Schedule::random ? grid.random() % n : 0;
  for (unsigned i = 0; i < n; ++i, ++step) {
    const unsigned next = schedule.order == Schedule::reverse ? (index + 2 * n - 1 - step) % n : (index + 1 + step) % n;
    if (!grid.blocks[next]->finished) return next;
  }
  return index;
}

void run_block_in_turns(Grid& grid, unsigned index, const std::vector<Block*>& blocks) {
  std::unique_lock<std::mutex> lock(grid.mutex);
  Block& b = *grid.blocks[index];
  begin(b, grid, index);
  // All fibres of the grid exist before any runs, and until all have ended: the race detector could not tell two apart
  // that had the same number one after the other.
  if (++grid.started == grid.count) grid.blocks[grid.turn]->turn.notify_one();
  while (!b.finished) {
    b.turn.wait(lock, [&] { return grid.started == grid.count && grid.turn == index; });
    if (!grid.failed) {
      grid.idle = run_turn(b) ? 0 : grid.idle + 1;
      if (b.alive) check_idle(grid, blocks);
    }
    b.finished = grid.failed || b.alive == 0;
    grid.turn = next_turn(grid, index);
    grid.blocks[grid.turn]->turn.notify_one();
  }
}

void run(Grid& grid) {
  grid.count = grid.size.x * grid.size.y * grid.size.z;
  grid.random.seed(schedule.seed);
  if (!grid.cooperative && !__tsan_create_fiber) {
    Block b;
    std::vector<Block*> only{&b};
    for (unsigned i = 0; i < grid.count && !grid.failed; ++i) {
      const unsigned index = schedule.order == Schedule::reverse ? grid.count - 1 - i : i;
      begin(b, grid, index);
      while (b.alive && !grid.failed) {
        grid.idle = run_turn(b) ? 0 : grid.idle + 1;
        if (b.alive) check_idle(grid, only);
      }
      end(b);
    }
  } else {
    std::vector<Block*> blocks;
    for (unsigned i = 0; i < grid.count; ++i) {
      grid.blocks.push_back(std::make_unique<Block>());
      blocks.push_back(grid.blocks.back().get());
    }
    if (schedule.order == Schedule::reverse) grid.turn = grid.count - 1;
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < grid.count; ++i)
      threads.emplace_back([&grid, &blocks, i] { run_block_in_turns(grid, i, blocks); });
    for (std::thread& thread : threads) thread.join();
    for (Block* b : blocks) end(*b);
  }
}

// --- Warp operations -------------------------------------------------------------------------------------------------

struct Fragments { unsigned a[4], b[2]; };
float tf32(unsigned bits) { return cuda_host_bits<float>(bits & ~0x1fffu); }

// D += A B of all lanes at once, as the PTX ISA lays the fragments out (device.hpp has the same in words)
template <int K, class Load> void multiply(const Fibre* lanes, Load load) {
  float a[16][K], b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const Fragments*>(lanes[lane].in);
    const int g = lane / 4, t = lane % 4;
    constexpr int each = K / 8;  // elements a register
    for (int e = 0; e < each; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][each * t + K / 2 * (i / 2) + e] = load(in.a[i], e);
      for (int i = 0; i < 2; ++i) b[each * t + K / 2 * i + e][g] = load(in.b[i], e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* d = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < K; ++k) d[i] += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
  }
}

// Not a call of memcpy, which the race detector would see: of constant sizes it is none
void copy(void* to, const void* from, unsigned bytes) {
  if (bytes == 4) std::memcpy(to, from, 4);
  else if (bytes == 8) std::memcpy(to, from, 8);
  else
    for (unsigned i = 0; i < bytes; ++i)
      static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
}

void exchange(const Meeting& meeting, Fibre* lanes, Place place) {
  switch (meeting.operation) {
    case Operation::barrier:
      break;
    case Operation::shuffle:
      for (int lane = 0; lane < 32; ++lane) {
        if (!(meeting.mask >> lane & 1)) continue;
        const int source = lanes[lane].source;
        if (source < 0 || source > 31 || !(meeting.mask >> source & 1))
          fail("a shuffle reads from a lane outside its mask", place);
        copy(lanes[lane].out, lanes[source].in, meeting.bytes);
      }
      break;
    case Operation::ballot:
      for (int lane = 0; lane < 32; ++lane)
        if (meeting.mask >> lane & 1) *static_cast<unsigned*>(lanes[lane].out) = meeting.votes;
      break;
    case Operation::mma_tf32:
      multiply<8>(lanes, [](unsigned bits, int) { return tf32(bits); });
      break;
    case Operation::mma_bf16:
      multiply<16>(lanes, [](unsigned bits, int e) { return from_bf16(std::uint16_t(bits >> 16 * e)); });
      break;
  }
}

// The running lane meets the others of its mask; the last one to come does what the operation is
void meet(Operation operation, unsigned mask, const void* in, void* out, unsigned bytes, int source, bool vote,
          Place place) {
  Fibre& self = *fibre;
  Warp& warp = block->warps[self.thread.warp];
  const unsigned bit = 1u << self.thread.lane;
  self.place = place;
  if (!(mask & bit)) fail("a lane is outside the mask of its own warp operation", place);
  if (mask & ~warp.alive) fail("the mask of a warp operation names lanes that have exited or never were", place);
  Meeting* meeting = nullptr;
  for (int i = 0; i < warp.meeting_count; ++i) {
    if (warp.meetings[i].mask == mask) meeting = &warp.meetings[i];
  }
  if (!meeting) {
    meeting = &warp.meetings[warp.meeting_count++];
    *meeting = {mask, 0, 0, operation, bytes, place, &warp.clocks[warp.next_clock++ % sizeof warp.clocks]};
  }
  if (meeting->operation != operation || meeting->bytes != bytes || !same(meeting->place, place)) {
    const std::string sentence = std::string("lanes of one mask are in different warp operations: ") +
                                 operation_names[int(meeting->operation)] + " at " + at(meeting->place) + " and " +
                                 operation_names[int(operation)];
    fail(sentence.c_str(), place);
  }
  self.in = in;
  self.out = out;
  self.source = source;
  meeting->arrived |= bit;
  if (vote) meeting->votes |= bit;
  // Only __syncwarp orders memory; __shfl_sync and the votes are not documented to
  char* clock = operation == Operation::barrier && __tsan_release ? meeting->clock : nullptr;
  if (clock) __tsan_release(clock);
  if (meeting->arrived == mask) {
    Fibre* lanes = &block->fibres[self.thread.warp * 32];
    exchange(*meeting, lanes, place);
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) lanes[lane].state = State::ready;
    *meeting = warp.meetings[--warp.meeting_count];
    progress();
  } else {
    self.state = State::in_warp;
    reschedule();
  }
  if (clock) __tsan_acquire(clock);
}

}  // namespace

void warp_barrier(unsigned mask, Place place) { meet(Operation::barrier, mask, nullptr, nullptr, 0, 0, false, place); }
void shuffle(unsigned mask, const void* in, void* out, unsigned bytes, int source, Place place) {
  meet(Operation::shuffle, mask, in, out, bytes, source, false, place);
}
unsigned ballot(unsigned mask, bool predicate, Place place) {
  unsigned votes = 0;
  meet(Operation::ballot, mask, nullptr, &votes, 0, 0, predicate, place);
  return votes;
}
void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place place) {
  const Fragments in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  meet(Operation::mma_tf32, ~0u, &in, d, 0, 0, false, place);
}
void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place place) {
  const Fragments in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  meet(Operation::mma_bf16, ~0u, &in, d, 0, 0, false, place);
}

// --- Block operations ------------------------------------------------------------------------------------------------

void block_barrier(Place place) { block_vote(Vote::count, false, place); }

int block_vote(Vote kind, bool predicate, Place place) {
  Block& b = *block;
  Fibre& self = *fibre;
  self.place = place;
  if (b.alive != int(b.fibres.size())) fail("a barrier after threads of the block have exited", place);
  if (!b.arrived) {
    b.place = place;
    b.votes_for = 0;
  } else if (!same(b.place, place)) {
    fail(("threads of one block are at different barriers, the first at " + at(b.place)).c_str(), place);
  }
  b.votes_for += predicate;
  void* clock = b.barrier.arrive();
  if (++b.arrived == b.alive) {
    const int votes = b.votes_for;
    const int result = kind == Vote::count ? votes : kind == Vote::all ? votes == b.alive : votes > 0;
    for (Fibre& f : b.fibres) {
      f.state = State::ready;
      f.vote = result;
    }
    b.arrived = 0;
    b.barrier.complete();
    progress();
  } else {
    self.state = State::at_barrier;
    reschedule();
  }
  Order::leave(clock);
  return self.vote;
}

void yield() { reschedule(); }
void progress() { block->progressed = true; }

void fail(const char* sentence, Place place) {
  const uint3 b = blockIdx, t = threadIdx;
  char who[120];
  std::snprintf(who, sizeof who, ", block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
  note_failure(*block->grid, std::string(sentence) + " [" + at(place) + who + "]");
  jump(*fibre, block->scheduler, true);
  std::abort();  // nobody resumes it
}

void* shared_part(std::size_t offset, std::size_t bytes, Place place) {
  Block& b = *block;
  if (offset + bytes > b.grid->shared_bytes) fail("parts of more shared memory than the launch asked for", place);
  std::size_t i = 0;
  while (i < b.part_count && b.parts[i].offset != offset) ++i;
  unsigned char* part = b.arena + Block::guard * (i + 1) + offset;
  if (i < b.part_count) {
    if (b.parts[i].bytes != bytes) fail("threads of one block divide the shared memory differently", place);
    return part;
  }
  if (i == Block::part_limit) fail("more parts of shared memory than the runtime has room for", place);
  if (i && offset < b.parts[i - 1].offset + b.parts[i - 1].bytes)
    fail("threads of one block divide the shared memory differently", place);
  b.parts[b.part_count++] = {offset, bytes};
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(part, bytes);
  for (std::size_t k = 0; k < bytes; ++k) static_cast<volatile unsigned char*>(part)[k] = 0xff;
  return part;
}

// --- Memory ----------------------------------------------------------------------------------------------------------

namespace {

struct Allocation {
  std::size_t bytes;
  std::vector<std::uint8_t> uses;  // with PTX, of each 4 bytes in this launch: 1 stored to, 2 read as read-only data
  bool used;
  int device;
};
std::map<const char*, Allocation> allocations;
struct Recent {  // the one that the last access was to: the next one often is too
  std::uint64_t start = 0, bytes = 0;
  Allocation* allocation = nullptr;
};
Recent recent;

// The allocation that holds all these bytes, or the end
std::map<const char*, Allocation>::iterator find(const void* p, std::size_t bytes) {
  const char* address = static_cast<const char*>(p);
  auto i = allocations.upper_bound(address);
  if (i == allocations.begin()) return allocations.end();
  --i;
  return address + bytes <= i->first + i->second.bytes ? i : allocations.end();
}

void forget_uses() {
  for (auto& [address, allocation] : allocations)
    if (allocation.used) {
      std::fill(allocation.uses.begin(), allocation.uses.end(), std::uint8_t(0));
      allocation.used = false;
    }
}

}  // namespace

void* shared_window(std::uint64_t offset, unsigned bytes, Place place) {
  if (offset + bytes > block->grid->shared_bytes || offset + bytes < offset)
    fail("an access beyond the shared memory", place);
  if (offset & (bytes - 1)) fail("a misaligned access to shared memory", place);
  return block->arena + offset;
}

void* global_window(std::uint64_t address, unsigned bytes, Access access, Place place) {
  if (address & (bytes - 1)) fail("a misaligned access to global memory", place);
  if (address - recent.start >= recent.bytes || address - recent.start + bytes > recent.bytes) {
    const auto i = find(reinterpret_cast<const void*>(address), bytes);
    if (i == allocations.end()) fail("an access to global memory outside of every allocation", place);
    recent = {reinterpret_cast<std::uint64_t>(i->first), i->second.bytes, &i->second};
  }
  if (access != Access::load) {
    recent.allocation->used = true;
    const std::uint64_t start = address - recent.start;
    for (std::uint64_t word = start / 4; word <= (start + bytes - 1) / 4; ++word) {
      std::uint8_t& uses = recent.allocation->uses[word];
      uses |= access == Access::store ? 1 : 2;
      if (uses == 3) fail("the kernel writes what it also reads through the read-only cache (ld.global.nc)", place);
    }
  }
  return reinterpret_cast<void*>(address);
}

// --- Numbers ---------------------------------------------------------------------------------------------------------

float from_bf16(std::uint16_t bits) { return cuda_host_bits<float>(unsigned(bits) << 16); }
std::uint16_t to_bf16(float x) {
  const unsigned bits = cuda_host_bits<unsigned>(x);
  return std::isnan(x) ? 0x7fff : std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_half(std::uint16_t bits) {
  const unsigned exponent = bits >> 10 & 31, mantissa = bits & 0x3ff, sign = unsigned(bits >> 15) << 31;
  const float magnitude = exponent == 0    ? std::ldexp(float(mantissa), -24)
                          : exponent == 31 ? cuda_host_bits<float>(0x7f800000 | mantissa << 13)
                                           : cuda_host_bits<float>((exponent + 112) << 23 | mantissa << 13);
  return cuda_host_bits<float>(cuda_host_bits<unsigned>(magnitude) | sign);
}
std::uint16_t to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const auto sign = std::uint16_t(std::signbit(x) << 15);
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | std::uint16_t(std::nearbyint(magnitude * 0x1p24f));  // subnormal
  const unsigned bits = cuda_host_bits<unsigned>(magnitude);
  return sign | std::uint16_t((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

// --- The runtime library: errors -------------------------------------------------------------------------------------

namespace {

cudaError_t last_error = cudaSuccess;
cudaError_t told_error = cudaSuccess;  // that the sentence is about
std::string told;

cudaError_t report(cudaError_t error, const std::string& sentence) {
  last_error = told_error = error;
  told = sentence;
  return error;
}

}  // namespace
}  // namespace cuda_host
using namespace cuda_host;

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == told_error ? told.c_str() : "an error not of the last call";
}
const char* cudaGetErrorName(cudaError_t error) {
#define NAME(name) \
  case name:       \
    return #name
  switch (error) {
    NAME(cudaSuccess);
    NAME(cudaErrorInvalidValue);
    NAME(cudaErrorMemoryAllocation);
    NAME(cudaErrorInvalidConfiguration);
    NAME(cudaErrorInvalidMemcpyDirection);
    NAME(cudaErrorInsufficientDriver);
    NAME(cudaErrorInvalidDeviceFunction);
    NAME(cudaErrorNoDevice);
    NAME(cudaErrorInvalidDevice);
    NAME(cudaErrorInvalidResourceHandle);
    NAME(cudaErrorNotReady);
    NAME(cudaErrorLaunchFailure);
    NAME(cudaErrorCooperativeLaunchTooLarge);
    NAME(cudaErrorStreamCaptureUnsupported);
  }
#undef NAME
  return "unrecognized error code";
}

// --- The runtime library: streams, events, graphs --------------------------------------------------------------------

using Work = std::function<cudaError_t()>;
struct CUgraph_st { std::vector<Work> work; };
struct CUgraphExec_st { std::vector<Work> work; };
struct CUstream_st {
  bool blocking;  // ordered with the default stream
  std::deque<Work> queue;
  unsigned long submitted = 0, done = 0;
  std::unique_ptr<CUgraph_st> capture;
};
struct CUevent_st {
  cudaStream_t stream = nullptr;
  unsigned long position = 0;  // number of pieces of the stream's work that come before
};

namespace cuda_host { namespace {

std::vector<std::unique_ptr<CUstream_st>> streams;

cudaError_t drain(CUstream_st& stream, unsigned long position = ~0ul) {
  cudaError_t result = cudaSuccess;
  while (stream.done < position && !stream.queue.empty()) {
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    ++stream.done;
    const cudaError_t error = work();
    if (error != cudaSuccess) result = error;
  }
  return result;
}
cudaError_t drain_all(bool blocking_only) {
  cudaError_t result = cudaSuccess;
  for (const auto& stream : streams)
    if (stream->blocking || !blocking_only) {
      const cudaError_t error = drain(*stream);
      if (error != cudaSuccess) result = error;
    }
  return result;
}

// Work of the default stream, which waits for the blocking ones, is done at once
cudaError_t submit(cudaStream_t stream, Work work) {
  if (!stream) {
    const cudaError_t error = drain_all(true);
    return error == cudaSuccess ? work() : error;
  }
  if (stream->capture) {
    stream->capture->work.push_back(std::move(work));
    return cudaSuccess;
  }
  stream->queue.push_back(std::move(work));
  ++stream->submitted;
  return deferred ? cudaSuccess : drain(*stream);
}

bool capturing() {
  for (const auto& stream : streams)
    if (stream->capture) return true;
  return false;
}
cudaError_t not_while_capturing(const char* what) {
  return report(cudaErrorStreamCaptureUnsupported, std::string(what) + " while a stream is captured");
}

}  // namespace
}  // namespace cuda_host

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  streams.push_back(std::make_unique<CUstream_st>());
  streams.back()->blocking = !(flags & cudaStreamNonBlocking);
  *stream = streams.back().get();
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  for (auto i = streams.begin(); i != streams.end(); ++i)
    if (i->get() == stream) {
      const cudaError_t error = drain(*stream);
      streams.erase(i);
      return error;
    }
  return report(cudaErrorInvalidResourceHandle, "cudaStreamDestroy of what is no stream");
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream && stream->capture) return not_while_capturing("cudaStreamSynchronize");
  return stream ? drain(*stream) : drain_all(true);
}
cudaError_t cudaDeviceSynchronize() {
  return capturing() ? not_while_capturing("cudaDeviceSynchronize") : drain_all(false);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (stream && stream->capture) return not_while_capturing("cudaEventRecord");
  *event = {stream, stream ? stream->submitted : 0};
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return event->stream ? drain(*event->stream, event->position) : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (stream && stream->capture) return not_while_capturing("cudaStreamWaitEvent");
  const CUevent_st recorded = *event;
  if (!recorded.stream) return cudaSuccess;
  return submit(stream, [recorded] { return drain(*recorded.stream, recorded.position); });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 0, cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream) return not_while_capturing("the default stream cannot be captured; it is asked for");
  if (stream->capture) return not_while_capturing("cudaStreamBeginCapture");
  stream->capture = std::make_unique<CUgraph_st>();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!stream || !stream->capture) return report(cudaErrorInvalidValue, "cudaStreamEndCapture without a begin");
  *graph = stream->capture.release();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return *executable = new CUgraphExec_st{graph->work}, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const Work& work : executable->work) {
    const cudaError_t error = submit(stream, work);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }

// --- The runtime library: memory -------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  if (capturing()) return not_while_capturing("cudaMalloc");
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(p, 256, bytes)) return report(cudaErrorMemoryAllocation, "out of memory");
  std::memset(*p, 0xff, bytes);
  const bool ptx = cuda_host_ptx_entries != nullptr;
  allocations[static_cast<char*>(*p)] = {bytes, std::vector<std::uint8_t>(ptx ? bytes / 4 + 1 : 0), false, 0};
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  const auto i = allocations.find(static_cast<char*>(p));
  if (i == allocations.end()) return report(cudaErrorInvalidValue, "cudaFree of what cudaMalloc did not return");
  const cudaError_t error = drain_all(false);  // it waits for the device
  allocations.erase(i);
  recent = {};
  std::free(p);
  return error;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  const auto i = find(p, 1);
  const bool found = i != allocations.end();
  *attributes = {found ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, found ? i->second.device : -2,
                 const_cast<void*>(p), nullptr};
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind != cudaMemcpyDefault &&
      (to_device != (find(to, bytes) != allocations.end()) || from_device != (find(from, bytes) != allocations.end())))
    return report(cudaErrorInvalidValue, "a copy whose direction its pointers contradict, or beyond an allocation");
  if (kind == cudaMemcpyHostToDevice && !(stream && stream->capture)) {  // pageable memory has been read on return
    const char* bytes_now = static_cast<const char*>(from);
    return submit(stream, [to, now = std::vector<char>(bytes_now, bytes_now + bytes)] {
      return std::memcpy(to, now.data(), now.size()), cudaSuccess;
    });
  }
  return submit(stream, [=] { return std::memmove(to, from, bytes), cudaSuccess; });
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (find(p, bytes) == allocations.end())
    return report(cudaErrorInvalidValue, "cudaMemset of what is no device memory, or beyond an allocation");
  return submit(stream, [=] { return std::memset(p, value, bytes), cudaSuccess; });
}
cudaError_t cudaMemset(void* p, int value, std::size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

void cuda_host_place(const void* allocation, int device) {
  const auto i = find(allocation, 1);
  if (i != allocations.end()) i->second.device = device;
}
void* cuda_host_allocate(std::size_t bytes) {
  void* p = nullptr;
  return cudaMalloc(&p, bytes) == cudaSuccess ? p : nullptr;
}
int cuda_host_free(void* p) { return cudaFree(p); }
int cuda_host_copy(void* to, const void* from_host, std::size_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from_host, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream));
}
void* cuda_host_stream() {
  cudaStream_t stream;
  return cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess ? stream : nullptr;
}
int cuda_host_synchronize(void* stream) {
  return stream ? cudaStreamSynchronize(static_cast<cudaStream_t>(stream)) : cudaDeviceSynchronize();
}

// --- The runtime library: the device and launches --------------------------------------------------------------------

static int driver_version = 13000, device_count = 1;
void cuda_host_driver(int version, int devices) { driver_version = version, device_count = devices; }

cudaError_t cudaDriverGetVersion(int* version) { return *version = driver_version, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  if (driver_version < 13000) return report(cudaErrorInsufficientDriver, "the driver is older than the runtime");
  if (device_count == 0) return report(cudaErrorNoDevice, "there is no device");
  return *count = device_count, cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  return device ? report(cudaErrorInvalidDevice, "there is only device 0") : cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device) return cudaSetDevice(device);
  *p = {};
  std::strcpy(p->name, "host");
  p->totalGlobalMem = std::size_t(16) << 30;
  p->sharedMemPerBlock = shared_default;
  p->sharedMemPerBlockOptin = shared_limit;
  p->sharedMemPerMultiprocessor = shared_limit + shared_reserved;
  p->reservedSharedMemPerBlock = shared_reserved;
  p->major = 9;
  p->multiProcessorCount = multiprocessors;
  p->warpSize = warpSize;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = threads_per_block;
  p->maxThreadsPerMultiProcessor = threads_per_multiprocessor;
  p->maxBlocksPerMultiProcessor = blocks_limit;
  p->l2CacheSize = 32 << 20;
  p->cooperativeLaunch = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device); error != cudaSuccess) return error;
  const auto read = [&] {
    switch (attribute) {
      case cudaDevAttrMaxThreadsPerBlock:
        return p.maxThreadsPerBlock;
      case cudaDevAttrWarpSize:
        return p.warpSize;
      case cudaDevAttrMultiProcessorCount:
        return p.multiProcessorCount;
      case cudaDevAttrL2CacheSize:
        return p.l2CacheSize;
      case cudaDevAttrMaxThreadsPerMultiProcessor:
        return p.maxThreadsPerMultiProcessor;
      case cudaDevAttrComputeCapabilityMajor:
        return p.major;
      case cudaDevAttrComputeCapabilityMinor:
        return p.minor;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return int(p.sharedMemPerMultiprocessor);
      case cudaDevAttrMaxRegistersPerMultiprocessor:
        return p.regsPerMultiprocessor;
      case cudaDevAttrCooperativeLaunch:
        return p.cooperativeLaunch;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return int(p.sharedMemPerBlockOptin);
      case cudaDevAttrMaxBlocksPerMultiprocessor:
        return p.maxBlocksPerMultiProcessor;
    }
    return 0;
  };
  *value = read();
  return cudaSuccess;
}

namespace cuda_host {

static std::map<const void*, std::size_t> dynamic_shared_limits;  // that kernels asked for

cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || std::size_t(bytes) > shared_limit)
    return report(cudaErrorInvalidValue, "more dynamic shared memory than a block of this device can have");
  dynamic_shared_limits[kernel] = std::size_t(bytes);
  return cudaSuccess;
}
// By threads and shared memory; registers are not known here
cudaError_t blocks_per_multiprocessor(int* blocks, int threads, std::size_t shared_bytes) {
  const int by_threads = threads_per_multiprocessor / ((threads + 31) / 32 * 32);
  const auto by_memory = int((shared_limit + shared_reserved) / (shared_bytes + shared_reserved));
  *blocks = std::min({by_threads, by_memory, blocks_limit});
  return cudaSuccess;
}

static std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel without a name";
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  return name.substr(0, name.find('('));
}

static const PtxEntry* find_ptx(const void* kernel) {
  Dl_info info;  // the compilers mangle a kernel's name alike
  if (dladdr(kernel, &info) && info.dli_sname)
    for (const PtxEntry* entry = cuda_host_ptx_entries; entry->name; ++entry)
      if (!std::strcmp(entry->name, info.dli_sname)) return entry;
  return nullptr;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body,
                   std::vector<char> parameters) {
  const dim3 g = config.gridDim, b = config.blockDim;
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    cooperative |= config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative;
  const std::uint64_t blocks = std::uint64_t(g.x) * g.y * g.z, threads = std::uint64_t(b.x) * b.y * b.z;
  if (!blocks || !threads || threads > threads_per_block || g.y > 65535 || g.z > 65535 || b.z > 64)
    return report(cudaErrorInvalidConfiguration, "a grid or a block without threads, or larger than a device takes");

  std::size_t static_shared = 0;
  const bool ptx = cuda_host_ptx_entries != nullptr;
  if (ptx) {
    const PtxEntry* entry = find_ptx(kernel);
    if (!entry) return report(cudaErrorInvalidDeviceFunction, "no PTX of this kernel: is it static, or not exported?");
    static_shared = entry->static_shared;
    body = [entry, parameters = std::move(parameters)] { entry->run(parameters.data()); };
  }
  const auto asked = dynamic_shared_limits.find(kernel);
  const std::size_t limit = asked == dynamic_shared_limits.end() ? shared_default : asked->second;
  if (config.dynamicSmemBytes > limit || config.dynamicSmemBytes + static_shared > shared_limit)
    return report(cudaErrorInvalidValue,
                  "more shared memory than the kernel may have: " + std::to_string(config.dynamicSmemBytes) +
                      " bytes of " + std::to_string(limit) + " (cudaFuncSetAttribute)");
  int resident;
  blocks_per_multiprocessor(&resident, int(threads), config.dynamicSmemBytes + static_shared);
  if (cooperative && blocks > std::uint64_t(resident) * multiprocessors)
    return report(cudaErrorCooperativeLaunchTooLarge, "a cooperative launch of " + std::to_string(blocks) +
                                                          " blocks where " +
                                                          std::to_string(resident * multiprocessors) + " are resident");

  if (record) {
    Dl_info info;
    if (!dladdr(kernel, &info) || !info.dli_sname)
      return report(cudaErrorInvalidDeviceFunction, "a kernel without a name");
    std::fprintf(record, "%s,%u,%u,%u,%llu,%zu,%d\n", info.dli_sname, g.x, g.y, g.z, (unsigned long long)threads,
                 config.dynamicSmemBytes, int(cooperative));
    return cudaSuccess;
  }
  const std::size_t shared_bytes = config.dynamicSmemBytes + static_shared;
  return submit(config.stream, [=]() -> cudaError_t {
    Grid grid;
    grid.size = g;
    grid.block_size = b;
    grid.shared_bytes = shared_bytes;
    grid.cooperative = cooperative;
    grid.ptx = ptx;
    grid.body = &body;
    forget_uses();
    run(grid);
    return grid.failed ? report(cudaErrorLaunchFailure, name_of(kernel) + ": " + grid.message) : cudaSuccess;
  });
}

}  // namespace cuda_host

void cuda_host_schedule(const char* text) { schedule = Schedule::parse(text); }
void cuda_host_device(int count, int shared_bytes_per_block) {
  multiprocessors = count;
  shared_limit = std::size_t(shared_bytes_per_block);
}
void cuda_host_record(const char* path) {
  if (record) std::fclose(record);
  record = path ? std::fopen(path, "w") : nullptr;
}
void cuda_host_deferred(int on) { deferred = on != 0; }
unsigned long long cuda_host_switches() { return switches; }
