// Just enough of CUDA to run the kernels of nearest_anchor_kernel.cu.cc on the host, for tests where there is no device.
//
// The threads of a block are fibers. Each runs until it waits for others, and the next one takes over; a barrier opens
// when all have come. Nothing runs at the same time, so a race cannot show by chance. It shows by design instead: the
// fibers take turns upwards or downwards (Emulator::downwards), and a read or write on the wrong side of a barrier that
// is missing gives one result in the one order and another in the other. Also an error, and the end of the program:
//
//   - a barrier that some of its threads do not reach, and lanes of a warp that wait in different functions;
//   - writing behind the shared memory that was asked for (AddressSanitizer sees reading, too);
//   - vectors of 8 or 16 bytes at places that are no multiple of that.
//
// ThreadSanitizer (g++ -fsanitize=thread) takes each fiber for a thread and knows what orders them: the barriers, the
// start and the end of a kernel, and nothing else. It reports every read and write that another thread could overtake,
// also where both orders happen to give one result.
//
// Shared memory is full of noise when a block starts. Not emulated: caches, the order in which other threads see writes,
// and time.
#ifndef AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_CUDA_EMULATION_H_
#define AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_CUDA_EMULATION_H_

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 does not see that arrays are filled by loops of a fixed length before they are read.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define __global__
#define __device__
#define __launch_bounds__(threads)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
  unsigned x, y;
};

#define AIB_TF_JUMPS __attribute__((noinline, no_sanitize_address, no_sanitize_thread))

namespace aib_tf {

class Emulator {
 public:
  static Emulator& Get() {
    static Emulator emulator;
    return emulator;
  }

  // Settings for tests.
  bool downwards = false;        // the order in which blocks, and the threads of a block, take turns
  int resident_blocks = 5;       // how many blocks the device holds at a time
  size_t most_shared = 1 << 20;  // how much shared memory a block can have
  // What the kernels see.
  dim3 thread_index{0}, block_index{0}, block_size{0}, blocks{0};
  unsigned char* shared() { return shared_.data(); }

  void Run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    const Unseen unseen(&launch_, &end_);
    if (shared_bytes > most_shared) Fail("a block needs more shared memory than the device has");
    kernel_ = &kernel;
    blocks = grid;
    block_size = dim3(threads);
    while (fibers_.size() < static_cast<size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
    const unsigned total = grid.x * grid.y;
    for (unsigned b = 0; b < total; ++b) {
      const unsigned block = downwards ? total - 1 - b : b;
      block_index = dim3(block % grid.x, block / grid.x);
      // A vector of its own for each block, so that AddressSanitizer knows where it ends.
      std::vector<unsigned char>(shared_bytes + kCanary, kNoise).swap(shared_);
      RunBlock(threads);
      for (size_t i = shared_bytes; i < shared_.size(); ++i) {
        if (shared_[i] != kNoise) Fail("a write behind the shared memory");
      }
    }
  }

  static void CheckAlignment(const void* address, size_t size) {
    if (reinterpret_cast<uintptr_t>(address) % size != 0) Fail("a vector that is not aligned");
  }

  // All threads of the block.
  void BlockBarrier() {
    char* const place = &block_barriers_[fibers_[current_]->block_turn ^= 1];
    ComesBefore(place);
    Wait(kBlock);
    ComesAfter(place);
  }

  // All lanes of the warp, in the same function; gives what each of them brought.
  enum Meeting { kRunning, kDone, kBlock, kWarpSync, kMatch, kAny };
  AIB_TF_JUMPS const uint64_t* WarpBarrier(Meeting meeting, uint64_t value) {
    Fiber& fiber = *fibers_[current_];
    fiber.turn ^= 1;  // two places, since a lane can bring the next value while another has not read this one yet
    const size_t warp = current_ / kWarpSize;
    values_[fiber.turn][current_] = value;
    char* const place = &warp_barriers_[fiber.turn][warp];
    // Of these, only __syncwarp() orders memory.
    if (meeting == kWarpSync) ComesBefore(place);
    Wait(meeting);
    if (meeting == kWarpSync) ComesAfter(place);
    return &values_[fiber.turn][warp * kWarpSize];
  }

 private:
  static constexpr size_t kWarpSize = 32, kMostThreads = 1024, kStack = 64 * 1024, kCanary = 64;
  static constexpr unsigned char kNoise = 0xa5;

  struct Fiber {
    std::vector<char> stack = std::vector<char>(kStack);
    void* place[5];  // where it goes on
    bool started = false;
    Meeting state = kDone;
    unsigned turn = 0, block_turn = 0;
    void* sanitizer = nullptr;
#if defined(__SANITIZE_THREAD__)
    void* const thread = __tsan_create_fiber(0);
#endif
  };

  // ThreadSanitizer is told what orders the threads, and nothing else does: not that they take turns, and not that the
  // scheduler wrote what they read.
#if defined(__SANITIZE_THREAD__)
  struct Unseen {
    Unseen(void* before, void* after) : after(after) {
      __tsan_release(before);
      AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
      AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unseen() {
      AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
      AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
      __tsan_acquire(after);
    }
    void* const after;
  };
  static void ComesBefore(char* place) { __tsan_release(place); }
  static void ComesAfter(char* place) { __tsan_acquire(place); }
#else
  struct Unseen {
    Unseen(void*, void*) {}
    ~Unseen() {}
  };
  static void ComesBefore(char*) {}
  static void ComesAfter(char*) {}
#endif

  [[noreturn]] static void Fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what);
    std::abort();
  }

  // A fiber: one thread of each block, one block after the other.
  static void Enter() {
    Emulator& emulator = Get();
    emulator.Arrived();
    for (;;) {
      ComesAfter(&emulator.launch_);
      (*emulator.kernel_)();
      emulator.Wait(kDone);
    }
  }

  void RunBlock(int threads) {
    for (int t = 0; t < threads; ++t) {
      fibers_[t]->state = kRunning;
      fibers_[t]->turn = fibers_[t]->block_turn = 0;
    }
    for (;;) {
      int done = 0;
      for (int t = 0; t < threads; ++t) {
        current_ = downwards ? threads - 1 - t : t;
        if (fibers_[current_]->state == kRunning) Resume();
        done += fibers_[current_]->state == kDone;
      }
      if (done == threads) return;
      if (!OpenBarriers(threads)) Fail("threads wait for others that do not come");
    }
  }

  // Every thread waits or is done. Lets those go whose meeting is complete; false where there are none.
  bool OpenBarriers(int threads) {
    bool open = Open(0, threads, kBlock);
    for (int first = 0; first < threads; first += kWarpSize) {
      for (Meeting meeting : {kWarpSync, kMatch, kAny}) open |= Open(first, first + kWarpSize, meeting);
    }
    return open;
  }
  bool Open(int first, int end, Meeting meeting) {
    for (int t = first; t < end; ++t) {
      if (fibers_[t]->state != meeting) return false;
    }
    for (int t = first; t < end; ++t) fibers_[t]->state = kRunning;
    return true;
  }

  // Between the scheduler's stack and that of the current fiber. The built-in jumps are what is fast: swapcontext asks
  // the system for the signal mask each time. AddressSanitizer has to be told of each change of stacks, and must not
  // take the jumps for the end of a stack.
  AIB_TF_JUMPS void Resume() {
    Fiber& fiber = *fibers_[current_];
    thread_index = dim3(static_cast<unsigned>(current_));
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_sanitizer_, fiber.stack.data(), fiber.stack.size());
#endif
#if defined(__SANITIZE_THREAD__)
    scheduler_thread_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber.thread, __tsan_switch_to_fiber_no_sync);
#endif
    if (__builtin_setjmp(scheduler_) == 0) Jump(&fiber);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_sanitizer_, nullptr, nullptr);
#endif
  }
  AIB_TF_JUMPS static void Jump(Fiber* fiber) {
    if (fiber->started) __builtin_longjmp(fiber->place, 1);
    fiber->started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber->stack.data();
    context.uc_stack.ss_size = fiber->stack.size();
    context.uc_link = nullptr;
    makecontext(&context, Enter, 0);
    setcontext(&context);
  }

  AIB_TF_JUMPS void Wait(Meeting meeting) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = meeting;
    if (meeting == kDone) ComesBefore(&end_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber.sanitizer, scheduler_stack_, scheduler_stack_size_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_thread_, __tsan_switch_to_fiber_no_sync);
#endif
    if (__builtin_setjmp(fiber.place) == 0) JumpBack();
    Arrived();
  }
  AIB_TF_JUMPS void JumpBack() { __builtin_longjmp(scheduler_, 1); }
  void Arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fibers_[current_]->sanitizer, &scheduler_stack_, &scheduler_stack_size_);
#endif
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned char> shared_;
  uint64_t values_[2][kMostThreads];
  char launch_ = 0, end_ = 0, block_barriers_[2] = {}, warp_barriers_[2][kMostThreads / kWarpSize] = {};
  void* scheduler_[5];
  void* scheduler_thread_ = nullptr;
  void* scheduler_sanitizer_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  size_t current_ = 0;
};

}  // namespace aib_tf

#define threadIdx (::aib_tf::Emulator::Get().thread_index)
#define blockIdx (::aib_tf::Emulator::Get().block_index)
#define blockDim (::aib_tf::Emulator::Get().block_size)
#define gridDim (::aib_tf::Emulator::Get().blocks)

inline void __syncthreads() { ::aib_tf::Emulator::Get().BlockBarrier(); }
inline void __syncwarp() { ::aib_tf::Emulator::Get().WarpBarrier(::aib_tf::Emulator::kWarpSync, 0); }
AIB_TF_JUMPS inline unsigned __match_any_sync(unsigned, int value) {
  const uint64_t* values = ::aib_tf::Emulator::Get().WarpBarrier(::aib_tf::Emulator::kMatch, static_cast<unsigned>(value));
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= static_cast<unsigned>(values[lane] == static_cast<unsigned>(value)) << lane;
  return same;
}
AIB_TF_JUMPS inline bool __any_sync(unsigned, bool value) {
  const uint64_t* values = ::aib_tf::Emulator::Get().WarpBarrier(::aib_tf::Emulator::kAny, value);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any |= values[lane] != 0;
  return any;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename E>
E __ldcs(const E* from) {
  ::aib_tf::Emulator::CheckAlignment(from, sizeof(E));
  E value;
  std::memcpy(&value, from, sizeof(E));
  return value;
}
template <typename E>
void __stwb(E* to, E value) {
  ::aib_tf::Emulator::CheckAlignment(to, sizeof(E));
  std::memcpy(to, &value, sizeof(E));
}

namespace aib_tf {

inline unsigned char* SharedMemory() { return Emulator::Get().shared(); }

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared, cudaStream_t,
                   Arguments... arguments) {
  Emulator::Get().Run(blocks, threads, shared, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <typename... Parameters>
bool AllowSharedMemory(void (*)(Parameters...), size_t shared) {
  return shared <= Emulator::Get().most_shared;
}

template <typename... Parameters>
cudaError_t ResidentBlocks(void (*)(Parameters...), int, size_t, int* blocks) {
  *blocks = Emulator::Get().resident_blocks;
  return cudaSuccess;
}

}  // namespace aib_tf

#endif  // AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_CUDA_EMULATION_H_
