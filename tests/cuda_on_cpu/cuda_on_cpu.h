// Runs the kernels of csrc/cuda on the CPU, for tests: g++ -x c++ -include cuda_on_cpu.h kernel.cu
//
// Every CUDA thread is a fiber; the blocks of a grid run one after another on the calling thread. What goes wrong is found by
//   the scheduler   a barrier that not all threads of the block (or the warp) reach
//   ASan            accesses out of bounds, in global and in shared memory
//   UBSan           accesses that are not aligned, indices beyond an array, overflow
//   TSan            accesses to shared memory that no barrier orders, and accesses of two blocks to global memory that no
//                   __threadfence() beside an atomicAdd() orders: every fiber is a thread to TSan, and all of a grid are made
//                   before the first runs, so that nothing but the kernel's own synchronisation orders them
// Not modelled: what threads of a warp do at the same time, inline PTX, textures, cooperative groups, clusters.
#pragma once
#define FASTRES_CUDA_ON_CPU 1

#include <cuda_runtime.h>
#undef __launch_bounds__
#define __launch_bounds__(...)

#include <math.h>
#include <ucontext.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define FIBER_TSAN(...) __VA_ARGS__
#else
#define FIBER_TSAN(...)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FIBER_ASAN(...) __VA_ARGS__
#else
#define FIBER_ASAN(...)
#endif

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;

enum State : int { kReady, kAtBlock, kAtWarp, kDone };

struct Block;

struct Fiber {
  ucontext_t context;
  std::atomic<int> state{kReady};  // relaxed: the scheduler's own, it must order nothing
  Block* block = nullptr;
  uint3 index{};
  bool fenced = false;          // since the last atomic of this thread
  void* last_atomic = nullptr;  // before the next fence
  unsigned exchanges = 0;       // of values between the lanes of its warp
  void *tsan = nullptr, *fake_stack = nullptr;
};

struct Warp {
  unsigned slots[2][kWarp];
  char sync;
};

struct Grid {
  dim3 size;
  unsigned threads;
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
  std::map<const void*, std::shared_ptr<void>> shared;
  char sync;
};

inline std::atomic<Fiber*> current{nullptr};
inline Fiber& self() { return *current.load(std::memory_order_relaxed); }

inline void switch_to_scheduler(Fiber& me, bool for_good) {
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
  FIBER_TSAN(__tsan_release(&grid.sync);)
  me.state.store(kDone, std::memory_order_relaxed);
  switch_to_scheduler(me, true);
  std::abort();
}

// Waits until all threads of the block, or of the warp, do. What they did before is then done for all of them.
inline void wait(State state, void* sync) {
  Fiber& me = self();
  (void)sync;
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

inline void run(Block& block) {
  std::vector<Fiber>& fibers = block.fibers;
  const auto all = [&](size_t begin, size_t end, int state) {
    for (size_t i = begin; i < end; ++i) {
      if (fibers[i].state.load(std::memory_order_relaxed) != state) return false;
    }
    return true;
  };
  const auto release = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) fibers[i].state.store(kReady, std::memory_order_relaxed);
  };
  const size_t count = fibers.size();
  for (bool forwards = true;; forwards = !forwards) {  // the order of threads must not matter
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = fibers[forwards ? i : count - 1 - i];
      if (fiber.state.load(std::memory_order_relaxed) == kReady) resume(fiber);
      if (!block.grid->error.empty()) throw std::runtime_error(block.grid->error);
    }
    bool progress = false;
    for (size_t begin = 0; begin < count; begin += kWarp) {
      const size_t end = begin + kWarp < count ? begin + kWarp : count;
      if (all(begin, end, kAtWarp)) release(begin, end), progress = true;
    }
    if (all(0, count, kDone)) return;
    if (all(0, count, kAtBlock)) release(0, count), progress = true;
    if (progress) continue;
    size_t waiting[4] = {};
    for (const Fiber& fiber : fibers) ++waiting[fiber.state.load(std::memory_order_relaxed)];
    throw std::runtime_error("a barrier is not reached by all threads: " + std::to_string(waiting[kAtBlock]) +
                             " wait for the block, " + std::to_string(waiting[kAtWarp]) + " for their warp, " +
                             std::to_string(waiting[kDone]) + " have left");
  }
}

// Throws std::runtime_error for a barrier that not all threads reach. Not for several threads at a time.
inline cudaError_t launch(dim3 size, unsigned threads, const std::function<void()>& body) {
  if (size.x == 0 || size.y == 0 || size.z != 1 || size.y > 65535 || threads == 0 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  Grid grid{};
  grid.size = size, grid.threads = threads, grid.body = &body;
  const size_t blocks = static_cast<size_t>(size.x) * size.y;
#if defined(__SANITIZE_THREAD__)
  const size_t at_once = blocks;
#else
  const size_t at_once = 1;
#endif
  FIBER_TSAN(grid.tsan = __tsan_get_current_fiber();)
  const std::unique_ptr<char[]> stacks(new char[at_once * threads * kStack]);
  std::vector<Block> made(at_once);
  for (size_t first = 0; first < blocks; first += at_once) {
    for (size_t i = 0; i < at_once; ++i) {
      const size_t block = first + i;
      made[i] = Block{};
      prepare(made[i], grid, uint3{static_cast<unsigned>(block % size.x), static_cast<unsigned>(block / size.x), 0},
              stacks.get() + i * threads * kStack);
    }
    for (Block& block : made) run(block);
  }
  FIBER_TSAN(__tsan_acquire(&grid.sync);)
  FIBER_TSAN(for (Block& block : made) for (Fiber& fiber : block.fibers) __tsan_destroy_fiber(fiber.tsan);)
  return cudaSuccess;
}

// A variable of the block. It lies on the heap, full of NaN bytes; `key` tells one from another.
template <class T>
T& shared(const void* key) {
  std::shared_ptr<void>& place = self().block->shared[key];
  if (!place) {
    place = std::shared_ptr<void>(std::malloc(sizeof(T)), std::free);
    __builtin_memset(place.get(), 0xff, sizeof(T));
  }
  return *static_cast<T*>(place.get());
}

// Values of all lanes of the warp.
inline const unsigned* exchange(unsigned value) {
  Fiber& me = self();
  Warp& warp = me.block->warps[me.index.x / kWarp];
  unsigned* slots = warp.slots[me.exchanges++ % 2];  // the next exchange may begin before all have read this one
  slots[me.index.x % kWarp] = value;
  wait(kAtWarp, &warp.sync);
  return slots;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::self().index)
#define blockIdx (cuda_on_cpu::self().block->index)
#define gridDim (cuda_on_cpu::self().block->grid->size)
#define FASTRES_SHARED(type, name) \
  static char name##_key;          \
  type& name = cuda_on_cpu::shared<type>(&name##_key)

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::kAtBlock, &cuda_on_cpu::self().block->sync); }

// All lanes must take part: the kernels use no other mask.
inline unsigned __ballot_sync(unsigned, int predicate) {
  const unsigned* values = cuda_on_cpu::exchange(predicate != 0);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < cuda_on_cpu::kWarp; ++lane) bits |= values[lane] << lane;
  return bits;
}

// An atomic orders nothing by itself; a fence before it publishes, one after it makes visible what others published.
inline void __threadfence() {
  cuda_on_cpu::Fiber& me = cuda_on_cpu::self();
  me.fenced = true;
  FIBER_TSAN(if (me.last_atomic) __tsan_acquire(me.last_atomic);)
}

template <class T>
T atomicAdd(T* p, T value) {
  cuda_on_cpu::Fiber& me = cuda_on_cpu::self();
  FIBER_TSAN(if (me.fenced) __tsan_release(p);)
  me.fenced = false;
  me.last_atomic = p;
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
