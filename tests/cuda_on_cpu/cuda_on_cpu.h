// Runs the kernels of csrc/cuda on the CPU, for tests: g++ -x c++ -include cuda_on_cpu.h kernel.cu
//
// Every CUDA thread is a fiber; the blocks of a grid run one after another on the calling thread. Those of a cooperative launch
// take turns: one whose threads all wait, for each other or asleep until another block has done something, lets the next one
// run. What goes wrong is found by
//   the scheduler   a barrier that not all threads of the block (or the warp) reach, blocks that wait for what none will do
//   ASan            accesses out of bounds, in global and in shared memory
//   UBSan           accesses that are not aligned, indices beyond an array, overflow
//   TSan            accesses to shared memory that no barrier orders, and accesses of two blocks to global memory that no
//                   __threadfence() beside an atomic orders: every fiber is a thread to TSan, and all of a grid
//                   (of 24 blocks of it) are made before the first runs, so that nothing but the kernel orders them
// Not modelled: what threads of a warp do at the same time, inline PTX, textures, cooperative groups, clusters; the order of
// memory beyond what TSan sees of fences.
#pragma once
#define FASTRES_CUDA_ON_CPU 1

#include <cuda_runtime.h>
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#include <math.h>
#include <ucontext.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define FIBER_TSAN(...) __VA_ARGS__
#define FIBER_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define FIBER_TSAN(...)
#define FIBER_UNSEEN
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FIBER_ASAN(...) __VA_ARGS__
#else
#define FIBER_ASAN(...)
#endif

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr size_t kShared = 48 * 1024, kGap = 64;  // bytes of a block; between its variables
constexpr int kVariables = 8;
constexpr size_t kTogether = 24;  // blocks at once at most: TSan knows 8128 threads

enum State : int { kReady, kAtBlock, kAtWarp, kAsleep, kDone, kStates };

struct Block;

struct Fiber {
  ucontext_t context;
  std::atomic<int> state{kReady};  // relaxed: the scheduler's own, it must order nothing
  Block* block = nullptr;
  uint3 index{};
  bool fenced = false;                   // since the last atomic of this thread
  void* last_atomic = nullptr;           // before the next fence
  unsigned barriers = 0, exchanges = 0;  // of values between the lanes of its warp
  void *tsan = nullptr, *fake_stack = nullptr;
};

struct Warp {
  unsigned slots[2][kWarp];
  char sync[2];
};

struct Grid {
  dim3 size;
  unsigned threads;
  size_t shared;  // bytes that the launch gives each block
  const std::function<void()>* body;
  ucontext_t scheduler;
  void *tsan = nullptr, *fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  std::string error;
  char sync;
};

struct Block {
  Grid* grid;
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  // Shared memory. All of it is there before the first fiber runs, full of NaN bytes.
  char* memory = nullptr;
  size_t used = 0, offsets[kVariables];
  const void* keys[kVariables];
  int variables = 0;
  std::unique_ptr<char, decltype(&std::free)> bytes{nullptr, std::free};  // those of the launch, also full of NaN
  bool done = false;
  char sync[2];  // of barriers in turn: a thread may be at the next one before all have left this one
  Block() = default;
  Block(const Block&) = delete;
  ~Block() {
    FIBER_ASAN(if (memory) __asan_unpoison_memory_region(memory, kShared);)
    std::free(memory);
  }
};

inline long launches = 0;  // so far

inline std::atomic<Fiber*> current{nullptr};
inline Fiber& self() { return *current.load(std::memory_order_relaxed); }

// What it reads may be freed before TSan sees what orders it.
FIBER_UNSEEN inline void switch_to_scheduler(Fiber& me, bool for_good) {
  Grid& grid = *me.block->grid;
  (void)for_good;
  FIBER_TSAN(__tsan_switch_to_fiber(grid.tsan, __tsan_switch_to_fiber_no_sync);)
  FIBER_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &me.fake_stack, grid.stack, grid.stack_size);)
  swapcontext(&me.context, &grid.scheduler);
  FIBER_ASAN(__sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);)
}

inline void enter() {
  Fiber& me = self();
  Grid& grid = *me.block->grid;
  FIBER_ASAN(__sanitizer_finish_switch_fiber(nullptr, &grid.stack, &grid.stack_size);)
  try {
    (*grid.body)();
  } catch (const std::exception& e) {
    grid.error = e.what();
  }
  me.state.store(kDone, std::memory_order_relaxed);
  FIBER_TSAN(__tsan_release(&grid.sync);)
  switch_to_scheduler(me, true);
  std::abort();
}

// Waits until all threads of the block, or of the warp, do. What they did before is then done for all of them.
inline void wait(State state, void* sync) {
  Fiber& me = self();
  (void)sync;
  me.fenced = false;
  FIBER_TSAN(__tsan_release(sync);)
  me.state.store(state, std::memory_order_relaxed);
  switch_to_scheduler(me, false);
  FIBER_TSAN(__tsan_acquire(sync);)
}

inline void prepare(Block& block, Grid& grid, uint3 index, char* stacks) {
  block.grid = &grid;
  block.index = index;
  block.fibers = std::vector<Fiber>(grid.threads);
  block.warps = std::vector<Warp>((grid.threads + kWarp - 1) / kWarp);
  block.memory = static_cast<char*>(std::aligned_alloc(kGap, kShared));
  std::memset(block.memory, 0xff, kShared);
  FIBER_ASAN(__asan_poison_memory_region(block.memory, kShared);)
  if (grid.shared) {
    void* bytes = nullptr;
    if (posix_memalign(&bytes, kGap, grid.shared) != 0) throw std::bad_alloc();
    block.bytes.reset(static_cast<char*>(std::memset(bytes, 0xff, grid.shared)));
  }
  for (unsigned i = 0; i < grid.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block;
    fiber.index = uint3{i, 0, 0};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    FIBER_TSAN(fiber.tsan = __tsan_create_fiber(0);)
  }
}

inline void resume(Fiber& fiber) {
  Grid& grid = *fiber.block->grid;
  current.store(&fiber, std::memory_order_relaxed);
  FIBER_TSAN(__tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);)
  FIBER_ASAN(__sanitizer_start_switch_fiber(&grid.fake_stack, fiber.context.uc_stack.ss_sp, kStack);)
  swapcontext(&grid.scheduler, &fiber.context);
  FIBER_ASAN(__sanitizer_finish_switch_fiber(grid.fake_stack, nullptr, nullptr);)
  current.store(nullptr, std::memory_order_relaxed);
}

// Lets the threads of a block run until all have left, or the others can only sleep or wait. Returns whether any got further
// than to go on sleeping.
inline bool run(Block& block) {
  std::vector<Fiber>& fibers = block.fibers;
  const auto state = [&](size_t i) { return fibers[i].state.load(std::memory_order_relaxed); };
  const auto all = [&](size_t begin, size_t end, int wanted) {
    for (size_t i = begin; i < end; ++i) {
      if (state(i) != wanted) return false;
    }
    return true;
  };
  const auto release = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) fibers[i].state.store(kReady, std::memory_order_relaxed);
  };
  const size_t count = fibers.size();
  std::vector<char> slept(count);
  for (size_t i = 0; i < count; ++i) {
    slept[i] = state(i) == kAsleep;
    if (slept[i]) release(i, i + 1);
  }
  bool moved = false;
  for (bool forwards = true;; forwards = !forwards) {  // the order of threads must not matter
    for (size_t turn = 0; turn < count; ++turn) {
      const size_t i = forwards ? turn : count - 1 - turn;
      if (state(i) != kReady) continue;
      resume(fibers[i]);
      moved |= !slept[i] || state(i) != kAsleep;
      if (!block.grid->error.empty()) throw std::runtime_error(block.grid->error);
    }
    bool progress = false;
    for (size_t begin = 0; begin < count; begin += kWarp) {
      const size_t end = begin + kWarp < count ? begin + kWarp : count;
      if (all(begin, end, kAtWarp)) release(begin, end), progress = true;
    }
    block.done = all(0, count, kDone);
    if (block.done) return true;
    if (all(0, count, kAtBlock)) release(0, count), progress = true;
    if (progress) continue;
    size_t waiting[kStates] = {};
    for (size_t i = 0; i < count; ++i) ++waiting[state(i)];
    if (waiting[kAsleep]) return moved;
    throw std::runtime_error("a barrier is not reached by all threads: " + std::to_string(waiting[kAtBlock]) +
                             " wait for the block, " + std::to_string(waiting[kAtWarp]) + " for their warp, " +
                             std::to_string(waiting[kDone]) + " have left");
  }
}

// Lets blocks that are there at the same time take turns until all have left.
inline void run(std::deque<Block>& blocks, size_t of) {
  for (size_t left = blocks.size(); left > 0;) {
    bool moved = false;
    for (Block& block : blocks) {
      if (block.done) continue;
      moved |= run(block);
      left -= block.done;
    }
    if (moved) continue;  // else all that is left looked once more for what another should do, and went on sleeping
    throw std::runtime_error(std::to_string(left) + " blocks wait for what none of these does; " +
                             std::to_string(blocks.size() - left) + " of " + std::to_string(of) + " have left");
  }
}

inline cudaError_t launch(dim3 size, unsigned threads, size_t shared, bool together,
                          const std::function<void()>& body) {
  if (size.x == 0 || size.y == 0 || size.z != 1 || size.y > 65535 || threads == 0 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const size_t blocks = static_cast<size_t>(size.x) * size.y;
  if (together && blocks > kTogether) return cudaErrorCooperativeLaunchTooLarge;
  ++launches;
  Grid grid{};
  grid.size = size, grid.threads = threads, grid.shared = shared, grid.body = &body;
#if defined(__SANITIZE_THREAD__)
  const size_t at_once = blocks < kTogether ? blocks : kTogether;
#else
  const size_t at_once = together ? blocks : 1;
#endif
  FIBER_TSAN(grid.tsan = __tsan_get_current_fiber();)
  const std::unique_ptr<char[]> stacks(new char[at_once * threads * kStack]);
  std::deque<Block> made;
  for (size_t first = 0; first < blocks; first += at_once) {
    const size_t here = blocks - first < at_once ? blocks - first : at_once;
    made.clear();
    made.resize(here);
    for (size_t i = 0; i < here; ++i) {
      const size_t block = first + i;
      prepare(made[i], grid, uint3{static_cast<unsigned>(block % size.x), static_cast<unsigned>(block / size.x), 0},
              stacks.get() + i * threads * kStack);
    }
    run(made, blocks);
    FIBER_TSAN(for (Block& block : made) for (Fiber& fiber : block.fibers) __tsan_destroy_fiber(fiber.tsan);)
    FIBER_TSAN(__tsan_acquire(&grid.sync);)
  }
  return cudaSuccess;
}

// Throws std::runtime_error for a barrier that not all threads reach, and for blocks that wait for others than those beside
// them. Not for several threads at a time.
inline cudaError_t launch(dim3 size, unsigned threads, const std::function<void()>& body) {
  return launch(size, threads, 0, false, body);
}
// All blocks at once, with `shared` bytes of memory for each.
inline cudaError_t launch_together(dim3 size, unsigned threads, size_t shared, const std::function<void()>& body) {
  return launch(size, threads, shared, true, body);
}

// A variable of the block, behind a gap that ASan watches; `key` tells one from another.
template <class T>
FIBER_UNSEEN T& shared(const void* key) {
  Block& block = *self().block;
  int found = 0;
  while (found < block.variables && block.keys[found] != key) ++found;
  if (found == block.variables) {
    if (found == kVariables || block.used + sizeof(T) + kGap > kShared)
      throw std::runtime_error("too much shared memory");
    block.keys[found] = key;
    block.offsets[found] = block.used;
    FIBER_ASAN(__asan_unpoison_memory_region(block.memory + block.used, sizeof(T));)
    block.used += (sizeof(T) + 2 * kGap - 1) / kGap * kGap;
    ++block.variables;
  }
  return *reinterpret_cast<T*>(block.memory + block.offsets[found]);
}

// Values of all lanes of the warp.
inline const unsigned* exchange(unsigned value) {
  Fiber& me = self();
  Warp& warp = me.block->warps[me.index.x / kWarp];
  const unsigned turn = me.exchanges++ % 2;  // as with barriers
  unsigned* slots = warp.slots[turn];
  slots[me.index.x % kWarp] = value;
  wait(kAtWarp, &warp.sync[turn]);
  return slots;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::self().index)
#define blockIdx (cuda_on_cpu::self().block->index)
#define gridDim (cuda_on_cpu::self().block->grid->size)
#define FASTRES_SHARED(type, name) \
  static char name##_key;          \
  type& name = cuda_on_cpu::shared<type>(&name##_key)

#define FASTRES_SHARED_BYTES(name) uint4* name = reinterpret_cast<uint4*>(cuda_on_cpu::self().block->bytes.get())

inline void __syncthreads() {
  cuda_on_cpu::Fiber& me = cuda_on_cpu::self();
  cuda_on_cpu::wait(cuda_on_cpu::kAtBlock, &me.block->sync[me.barriers++ % 2]);
}

template <class T>
void __stwb(T* p, T value) {
  *p = value;
}

// All lanes must take part: the kernels use no other mask.
inline unsigned __ballot_sync(unsigned, int predicate) {
  const unsigned* values = cuda_on_cpu::exchange(predicate != 0);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < cuda_on_cpu::kWarp; ++lane) bits |= values[lane] << lane;
  return bits;
}

// An atomic orders nothing by itself; a fence before it publishes, with no barrier in between, for what that brings the fence has
// not seen; a fence after it makes visible what others published.
inline void __threadfence() {
  cuda_on_cpu::Fiber& me = cuda_on_cpu::self();
  me.fenced = true;
  FIBER_TSAN(if (me.last_atomic) __tsan_acquire(me.last_atomic);)
}

// *p counts from 0 to `last` and is then 0 again.
inline unsigned atomicInc(unsigned* p, unsigned last) {
  cuda_on_cpu::Fiber& me = cuda_on_cpu::self();
  FIBER_TSAN(if (me.fenced) __tsan_release(p);)
  me.fenced = false;
  me.last_atomic = p;
  unsigned before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &before, before >= last ? 0 : before + 1, true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return before;
}

// A value that another block changes.
inline unsigned peek(const unsigned* p) {
  cuda_on_cpu::self().last_atomic = const_cast<unsigned*>(p);
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

// Lets other blocks run; it orders nothing.
inline void __nanosleep(unsigned) {
  cuda_on_cpu::Fiber& me = cuda_on_cpu::self();
  me.state.store(cuda_on_cpu::kAsleep, std::memory_order_relaxed);
  cuda_on_cpu::switch_to_scheduler(me, false);
}
