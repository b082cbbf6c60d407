// The CUDA kernels.
//
// The host does not see the anchors, so the device makes their table itself: it ranks the anchors by counting, and
// fills each slot on its own. The elements are cut into chunks, by their number alone. A chunk is the work of one block
// and gives one partial sum (the gradient: one for each anchor); a last kernel adds these in their order. Nothing is
// added atomically. So the same input gives the same bits, on any device and with any number of resident blocks.
//
// Memory sets the pace where finding the anchor does not. For that:
//
//   - A search of halves would meet the same few banks of shared memory again and again. The thresholds are laid out
//     as a tree instead, level after level: up to the sixth level no two nodes are in one bank.
//   - A 16-bit x has 65,536 values, so the answers to all of them are computed first, where there are many elements.
//   - In the gradient, threads that share a sum take turns, and each sum has several columns, which are few turns.
//
// Compile with --fmad=false: a fused multiply-add would show in the results.

#include "nearest_anchor_kernel.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "nearest_anchor_cuda_emulation.h"
#endif

namespace aib_tf {
namespace {

// As constants, which device code can use where it cannot call std::numeric_limits.
template <typename A>
constexpr A kNan = std::numeric_limits<A>::quiet_NaN();
template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <typename A>
constexpr A kLargest = std::numeric_limits<A>::max();

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

#if defined(__CUDACC__)

// The dynamic shared memory of a block.
__device__ inline unsigned char* SharedMemory() {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return shared_memory;
}

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Lets the kernel have that much dynamic shared memory in a block; false where the device does not have it.
template <typename... Parameters>
bool AllowSharedMemory(void (*kernel)(Parameters...), size_t shared) {
  const auto size = static_cast<int>(shared);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, size) == cudaSuccess) return true;
  cudaGetLastError();  // which is no error for whoever asks next
  return false;
}

// How many blocks of the kernel the device holds at a time.
template <typename... Parameters>
cudaError_t ResidentBlocks(void (*kernel)(Parameters...), int threads, size_t shared, int* blocks) {
  int device, processors, blocks_on_each;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_on_each, kernel, threads, shared);
  }
  if (error == cudaSuccess) *blocks = std::max(1, processors * blocks_on_each);
  return error;
}

#endif  // defined(__CUDACC__)

// ------------------------------------------------------------------------------------------------------ small parts

// Cuts arrays out of the workspace, or, without one, adds up their sizes.
class Cutter {
 public:
  explicit Cutter(void* workspace) : workspace_(static_cast<unsigned char*>(workspace)) {}

  template <typename E>
  E* Take(int64_t count) {
    E* const array = workspace_ == nullptr ? nullptr : reinterpret_cast<E*>(workspace_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(E) + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 256;
  unsigned char* const workspace_;
  size_t bytes_ = 0;
};

// Chunk c has the elements from c * size to (c + 1) * size, as far as there are any. Positions in a chunk are int:
// 2^31 elements in each of the fewest chunks that there are would be 2^37 elements.
struct Chunks {
  int64_t count;
  int size;
};

__device__ inline int SizeOfChunk(const Chunks& chunks, int64_t chunk, int64_t n) {
  const int64_t left = n - chunk * chunks.size;
  return left < chunks.size ? static_cast<int>(left) : chunks.size;
}

// At most `most` chunks of at least `least` elements, all but the last of whole tiles.
Chunks Split(int64_t n, int64_t tile, int64_t least, int64_t most) {
  int64_t size = std::max(least, (n + most - 1) / most);
  size = (size + tile - 1) / tile * tile;
  return {(n + size - 1) / size, static_cast<int>(size)};
}

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A thread takes 16 bytes of x at a time.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// What `count` elements are loaded and stored by: 16 bytes at a time, or 8 where there are no more.
template <typename E, int count>
using Part = std::conditional_t<sizeof(E) * count % sizeof(uint4) == 0, uint4, uint2>;
template <typename E, int count>
constexpr int kParts = sizeof(E) * count / sizeof(Part<E, count>);

template <typename E, int count>
bool IsAligned(const E* array) {
  return reinterpret_cast<uintptr_t>(array) % sizeof(Part<E, count>) == 0;
}

// The first `valid` elements, and `other` in place of the others. What is read once does not stay in the caches.
template <typename E, int count>
__device__ inline void Load(const E* from, int valid, bool aligned, E other, E (&to)[count]) {
  if (aligned && valid == count) {
    const auto* from_parts = reinterpret_cast<const Part<E, count>*>(from);
    Part<E, count> parts[kParts<E, count>];
    for (int p = 0; p < kParts<E, count>; ++p) parts[p] = __ldcs(from_parts + p);
    memcpy(to, parts, sizeof(to));
  } else {
    for (int v = 0; v < count; ++v) to[v] = v < valid ? from[v] : other;
  }
}

template <typename E, int count>
__device__ inline void Store(const E (&from)[count], int valid, bool aligned, E* to) {
  if (aligned && valid == count) {
    auto* const to_parts = reinterpret_cast<Part<E, count>*>(to);
    Part<E, count> parts[kParts<E, count>];
    memcpy(parts, from, sizeof(from));
    for (int p = 0; p < kParts<E, count>; ++p) __stwb(to_parts + p, parts[p]);
  } else {
    for (int v = 0; v < count; ++v) {
      if (v < valid) to[v] = from[v];
    }
  }
}

// How many of the `count` elements from `begin` on are below `end`.
__device__ inline int Valid(int begin, int end, int count) {
  const int left = end - begin;
  return left >= count ? count : left > 0 ? left : 0;
}

// Combines one value of each thread, always in the same order; the first thread gets the result. The block has a power
// of two of threads, `shared` one place for each.
template <typename V, typename Combine>
__device__ inline V Reduce(V value, V* shared, Combine combine) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  // The others do not look: the first thread may already be at its next write.
  return threadIdx.x == 0 ? shared[0] : value;
}

template <typename A>
struct Larger {
  __device__ A operator()(A a, A b) const { return a < b ? b : a; }
};
template <typename A>
struct Smaller {
  __device__ A operator()(A a, A b) const { return b < a ? b : a; }
};
struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// -------------------------------------------------------------------------------------------------------- the table

// What becomes an AnchorTable, in device memory.
template <typename A>
struct DeviceTable {
  const A* anchors;
  int count;
  int levels;  // how often a search halves: 2^levels is the first power of two that is not below `count`
  // In ascending order, but each of several equal anchors still with its own k.
  A* sorted_value;
  int32_t* sorted_index;
  // As in AnchorTable, the thresholds up to 2^levels.
  A* value;
  int32_t* index;
  A* threshold;
  int32_t* lowest;
  // The range that the slots of each block leave, and that of all.
  A *block_low, *block_high;
  A *low, *high;
  bool* finite;  // whether all anchors are; if not, the range is empty
};

constexpr int kTableThreads = 256;
constexpr int kMostAnchorsInOneBlock = 256;  // up to here, another launch would take longer than one block takes
constexpr int kOneBlockThreads = 1024;

int FillBlocks(int count) { return static_cast<int>(DivideUp(2 * static_cast<int64_t>(count), kTableThreads)); }

template <typename A>
DeviceTable<A> CutTable(Cutter* cutter, const A* anchors, int count) {
  DeviceTable<A> table = {};
  table.anchors = anchors;
  table.count = count;
  while (1 << table.levels < count) ++table.levels;
  table.sorted_value = cutter->Take<A>(count);
  table.sorted_index = cutter->Take<int32_t>(count);
  table.value = cutter->Take<A>(count);
  table.index = cutter->Take<int32_t>(count);
  table.threshold = cutter->Take<A>(1 << table.levels);
  table.lowest = cutter->Take<int32_t>(2 * static_cast<int64_t>(count));
  table.block_low = cutter->Take<A>(FillBlocks(count));
  table.block_high = cutter->Take<A>(FillBlocks(count));
  table.low = cutter->Take<A>(1);
  table.high = cutter->Take<A>(1);
  table.finite = cutter->Take<bool>(1);
  return table;
}

template <typename A>
__device__ inline AnchorTable<A> View(const DeviceTable<A>& table) {
  AnchorTable<A> view = {};
  view.count = table.count;
  view.value = table.value;
  view.index = table.index;
  view.threshold = table.threshold;
  view.lowest = table.lowest;
  view.low = *table.low;
  view.high = *table.high;
  view.step = (1 << table.levels) / 2;
  return view;
}

// The place of an anchor in the ascending order is the number of anchors before it. A warp has 32 anchors and looks at
// its part of all anchors, `counts` has a place for each thread.
template <typename A>
__device__ inline void RankAnchors(const DeviceTable<A>& table, int* counts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int first = blockIdx.x * kWarp; first < table.count; first += gridDim.x * kWarp) {
    const int k = first + lane;
    const auto own = Ordinal(table.anchors[k < table.count ? k : 0]);
    int before = 0;
    for (int j = warp; j < table.count; j += warps) {
      // Of equal ones, those with a lower k. No ordinal is so low that 1 cannot be taken away.
      before += Ordinal(table.anchors[j]) - (j < k) < own;
    }
    counts[threadIdx.x] = before;
    __syncthreads();
    if (warp == 0 && k < table.count) {
      int rank = 0;
      for (int w = 0; w < warps; ++w) rank += counts[w * kWarp + lane];
      table.sorted_value[rank] = table.anchors[k];
      table.sorted_index[rank] = k;
    }
    __syncthreads();
  }
}

// `shared` has a place for each thread.
template <typename A>
__device__ inline void FillTable(const DeviceTable<A>& table, A* shared) {
  const A* sorted = table.sorted_value;
  const int count = table.count, padded = 1 << table.levels;
  A low = -kLargest<A>, high = kLargest<A>;
  for (int slot = blockIdx.x * blockDim.x + threadIdx.x; slot <= padded; slot += gridDim.x * blockDim.x) {
    if (slot < count) {
      const int32_t index = table.sorted_index[FirstSlotOf(sorted[slot], sorted, count)];
      table.value[slot] = table.anchors[index];
      table.index[slot] = index;
      table.lowest[count + slot] = index;
      if (slot == 0) {
        table.threshold[slot] = -kInfinity<A>;
      } else {
        const int32_t below_index = table.sorted_index[FirstSlotOf(sorted[slot - 1], sorted, count)];
        table.threshold[slot] = Threshold(sorted[slot - 1], sorted[slot], below_index, index);
      }
    } else if (slot < padded) {
      table.threshold[slot] = kInfinity<A>;
    }
    if (slot <= count) {
      A slot_low, slot_high;
      ReliableRange(sorted, count, slot, &slot_low, &slot_high);
      low = Larger<A>()(low, slot_low);
      high = Smaller<A>()(high, slot_high);
    }
  }
  low = Reduce(low, shared, Larger<A>());
  high = Reduce(high, shared, Smaller<A>());
  if (threadIdx.x == 0) {
    table.block_low[blockIdx.x] = low;
    table.block_high[blockIdx.x] = high;
  }
}

// What has to see the whole table; one block. `blocks` is how many filled it.
template <typename A>
__device__ inline void FinishTable(const DeviceTable<A>& table, int blocks, A* shared) {
  const int count = table.count;
  A low = -kLargest<A>, high = kLargest<A>;
  for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
    low = Larger<A>()(low, table.block_low[b]);
    high = Smaller<A>()(high, table.block_high[b]);
  }
  low = Reduce(low, shared, Larger<A>());
  high = Reduce(high, shared, Smaller<A>());
  if (threadIdx.x == 0) {
    // The order of the ordinals has infinities and NaNs at the ends.
    const bool finite = IsFinite(table.sorted_value[0]) && IsFinite(table.sorted_value[count - 1]);
    *table.finite = finite;
    *table.low = finite ? low : kLargest<A>;
    *table.high = finite ? high : -kLargest<A>;
  }
  int first = 1;
  while (2 * first < count) first *= 2;
  for (; first > 0; first /= 2) {  // level after level, from the leaves to the root
    for (int node = first + threadIdx.x; node < 2 * first && node < count; node += blockDim.x) {
      table.lowest[node] = Smaller<int32_t>()(table.lowest[2 * node], table.lowest[2 * node + 1]);
    }
    __syncthreads();
  }
}

template <typename A>
__global__ void __launch_bounds__(kTableThreads) RankKernel(DeviceTable<A> table) {
  RankAnchors(table, reinterpret_cast<int*>(SharedMemory()));
}

template <typename A>
__global__ void __launch_bounds__(kTableThreads) FillKernel(DeviceTable<A> table) {
  FillTable(table, reinterpret_cast<A*>(SharedMemory()));
}

template <typename A>
__global__ void __launch_bounds__(kOneBlockThreads) FinishKernel(DeviceTable<A> table, int blocks) {
  FinishTable(table, blocks, reinterpret_cast<A*>(SharedMemory()));
}

template <typename A>
__global__ void __launch_bounds__(kOneBlockThreads) OneBlockTableKernel(DeviceTable<A> table) {
  RankAnchors(table, reinterpret_cast<int*>(SharedMemory()));
  FillTable(table, reinterpret_cast<A*>(SharedMemory()));
  __syncthreads();
  FinishTable(table, 1, reinterpret_cast<A*>(SharedMemory()));
}

template <typename A>
cudaError_t MakeTable(const DeviceTable<A>& table, cudaStream_t stream) {
  if (table.count <= kMostAnchorsInOneBlock) {
    return Launch(OneBlockTableKernel<A>, 1, kOneBlockThreads, kOneBlockThreads * sizeof(A), stream, table);
  }
  const int rank_blocks = static_cast<int>(DivideUp(table.count, kWarp)), fill_blocks = FillBlocks(table.count);
  cudaError_t error = Launch(RankKernel<A>, rank_blocks, kTableThreads, kTableThreads * sizeof(int), stream, table);
  if (error != cudaSuccess) return error;
  error = Launch(FillKernel<A>, fill_blocks, kTableThreads, kTableThreads * sizeof(A), stream, table);
  if (error != cudaSuccess) return error;
  return Launch(FinishKernel<A>, 1, kOneBlockThreads, kOneBlockThreads * sizeof(A), stream, table, fill_blocks);
}

// ------------------------------------------------------------------------------------------------- finding an anchor
//
// A finder is made by all threads of a block together, in shared memory. Find() gives the nearest anchors of
// kVector<T> elements and says whether it could; FindAny() takes one element and always can.

// By the thresholds. `whole`: everything is in shared memory. If not, that holds only for the top of the tree, and the
// search goes on in device memory.
template <typename T, typename A, bool whole>
class TreeFinder {
 public:
  static constexpr int kMostLevels = 10;  // in shared memory, where 2^10 nodes leave room for four blocks

  static bool Fits(const DeviceTable<A>& table) { return (table.levels <= kMostLevels) == whole; }
  static size_t SharedBytes(const DeviceTable<A>& table) {
    const size_t nodes = size_t{1} << std::min(table.levels, kMostLevels);
    return whole ? nodes * (2 * sizeof(A) + sizeof(uint16_t)) : nodes * sizeof(A);
  }

  __device__ TreeFinder(const DeviceTable<A>& table, const uint8_t*, unsigned char* shared) : table_(table) {
    levels_ = whole || table.levels < kMostLevels ? table.levels : kMostLevels;
    low_ = *table.low;
    high_ = *table.high;
    const int nodes = 1 << levels_;
    tree_ = shared;
    for (int node = threadIdx.x; node < nodes; node += blockDim.x) {
      int level = 0;
      while (node >> level > 1) ++level;
      // The children of node i are 2 i and 2 i + 1; node 1 is the middle threshold.
      const int place = 2 * (node - (1 << level)) + 1;
      reinterpret_cast<A*>(shared)[node] = node == 0 ? A{0} : table.threshold[place << (table.levels - 1 - level)];
    }
    if (whole) {
      value_ = reinterpret_cast<A*>(shared) + nodes;
      index_ = reinterpret_cast<uint16_t*>(value_ + nodes);
      for (int slot = threadIdx.x; slot < table.count; slot += blockDim.x) {
        value_[slot] = table.value[slot];
        index_[slot] = static_cast<uint16_t>(table.index[slot]);
      }
    }
    __syncthreads();
  }

  __device__ bool Find(const A (&x)[kVector<T>], const T (&)[kVector<T>], A (&nearest)[kVector<T>],
                       int32_t (&index)[kVector<T>]) const {
    bool reliable = true;
    for (int v = 0; v < kVector<T>; ++v) reliable = reliable & (x[v] >= low_) & (x[v] <= high_);
    if (!reliable) return false;
    // Offsets in bytes: from a node to its child in four instructions.
    unsigned offset[kVector<T>];
    for (unsigned& node : offset) node = sizeof(A);
    for (int level = 0; level < levels_; ++level) {
      for (int v = 0; v < kVector<T>; ++v) {
        const A threshold = *reinterpret_cast<const A*>(tree_ + offset[v]);
        offset[v] = 2 * offset[v] + (x[v] >= threshold ? sizeof(A) : 0);
      }
    }
    int slot[kVector<T>];
    for (int v = 0; v < kVector<T>; ++v) slot[v] = static_cast<int>(offset[v] / sizeof(A)) - (1 << levels_);
    if (!whole) {
      const int rest = table_.levels - levels_;
      for (int v = 0; v < kVector<T>; ++v) slot[v] <<= rest;
      for (int step = (1 << rest) / 2; step > 0; step /= 2) {
        for (int v = 0; v < kVector<T>; ++v) slot[v] += x[v] >= table_.threshold[slot[v] + step] ? step : 0;
      }
    }
    for (int v = 0; v < kVector<T>; ++v) {
      nearest[v] = whole ? value_[slot[v]] : table_.value[slot[v]];
      index[v] = whole ? index_[slot[v]] : table_.index[slot[v]];
    }
    return true;
  }

  __device__ void FindAny(A x, T, A* nearest, int32_t* index) const {
    const bool finite = *table_.finite;
    *index = finite ? NearestIndex(View(table_), x) : 0;
    *nearest = x != x ? x : finite ? table_.anchors[*index] : kNan<A>;
  }

 private:
  const DeviceTable<A>& table_;
  int levels_;
  A low_, high_;
  const unsigned char* tree_;
  A* value_;
  uint16_t* index_;
};

// By the answers to all values that a 16-bit T has.
constexpr int kMostAnchorsToLookUp = 256;
constexpr int kValues = 65536;

template <typename T, typename A>
class LookupFinder {
 public:
  static size_t SharedBytes(const DeviceTable<A>& table) { return kValues + table.count * sizeof(A); }

  __device__ LookupFinder(const DeviceTable<A>& table, const uint8_t* answers, unsigned char* shared) {
    const uint4* from = reinterpret_cast<const uint4*>(answers);
    uint4* to = reinterpret_cast<uint4*>(shared);
    for (unsigned i = threadIdx.x; i < kValues / sizeof(uint4); i += blockDim.x) to[i] = from[i];
    answers_ = shared;
    anchors_ = reinterpret_cast<A*>(shared + kValues);
    const bool finite = *table.finite;
    for (int k = threadIdx.x; k < table.count; k += blockDim.x) anchors_[k] = finite ? table.anchors[k] : kNan<A>;
    __syncthreads();
  }

  __device__ bool Find(const A (&x)[kVector<T>], const T (&narrow)[kVector<T>], A (&nearest)[kVector<T>],
                       int32_t (&index)[kVector<T>]) const {
    for (int v = 0; v < kVector<T>; ++v) FindAny(x[v], narrow[v], &nearest[v], &index[v]);
    return true;
  }

  __device__ void FindAny(A x, T narrow, A* nearest, int32_t* index) const {
    *index = answers_[narrow.bits];
    *nearest = x == x ? anchors_[*index] : x;
  }

 private:
  const uint8_t* answers_;
  A* anchors_;
};

constexpr int kAnswerThreads = 256;

template <typename T, typename A>
__global__ void __launch_bounds__(kAnswerThreads) AnswerKernel(DeviceTable<A> table, uint8_t* answers) {
  const auto bits = static_cast<uint16_t>(blockIdx.x * kAnswerThreads + threadIdx.x);
  answers[bits] = *table.finite ? static_cast<uint8_t>(NearestIndex(View(table), Widen(T{bits}))) : 0;
}

// ---------------------------------------------------------------------------------------------------------- forward

constexpr int kForwardThreads = 512;
constexpr int64_t kMostForwardChunks = 8192;
// Below, making the answers and reading them into each block takes longer than they save.
constexpr int64_t kLeastToLookUp = int64_t{1} << 24;

template <typename T>
struct Elements {
  const T* x;
  int64_t n;
  Chunks chunks;
  bool aligned;
  T* quantized;
  int32_t* index;
  double* sums;  // of the squares, one for each chunk
};

template <typename A, typename Finder, typename T>
__device__ inline void QuantizeEach(const Finder& finder, const T* x, int begin, int end, T* quantized, int32_t* index,
                                    double* sum) {
  for (int i = begin; i < end; ++i) {
    const T narrow = x[i];
    const A wide = Widen(narrow);
    A nearest;
    finder.FindAny(wide, narrow, &nearest, &index[i]);
    const A difference = wide - nearest;
    *sum += static_cast<double>(difference * difference);
    Narrow(nearest, &quantized[i]);
  }
}

template <typename Finder, typename T, typename A>
__global__ void __launch_bounds__(kForwardThreads)
    QuantizeKernel(Elements<T> elements, DeviceTable<A> table, const uint8_t* answers) {
  constexpr int kStride = kVector<T> * kForwardThreads;
  double* sums = reinterpret_cast<double*>(SharedMemory());
  const Finder finder(table, answers, reinterpret_cast<unsigned char*>(sums + kForwardThreads));
  for (int64_t chunk = blockIdx.x; chunk < elements.chunks.count; chunk += gridDim.x) {
    const int size = SizeOfChunk(elements.chunks, chunk, elements.n);
    const T* x = elements.x + chunk * elements.chunks.size;
    T* quantized = elements.quantized + chunk * elements.chunks.size;
    int32_t* index = elements.index + chunk * elements.chunks.size;
    double sum = 0;
    int i = kVector<T> * static_cast<int>(threadIdx.x);
    T next[kVector<T>];
    Load(x + i, Valid(i, size, kVector<T>), elements.aligned, T{}, next);
    for (; i + kVector<T> <= size; i += kStride) {
      T narrow[kVector<T>];
      A wide[kVector<T>], nearest[kVector<T>];
      int32_t k[kVector<T>];
      for (int v = 0; v < kVector<T>; ++v) {
        narrow[v] = next[v];
        wide[v] = Widen(next[v]);
      }
      Load(x + i + kStride, Valid(i + kStride, size, kVector<T>), elements.aligned, T{}, next);
      if (!finder.Find(wide, narrow, nearest, k)) {
        QuantizeEach<A>(finder, x, i, i + kVector<T>, quantized, index, &sum);
        continue;
      }
      for (int v = 0; v < kVector<T>; ++v) {
        const A difference = wide[v] - nearest[v];
        sum += static_cast<double>(difference * difference);
        Narrow(nearest[v], &narrow[v]);
      }
      Store(narrow, kVector<T>, elements.aligned, quantized + i);
      Store(k, kVector<T>, elements.aligned, index + i);
    }
    if (i < size) QuantizeEach<A>(finder, x, i, size, quantized, index, &sum);
    sum = Reduce(sum, sums, Sum());
    if (threadIdx.x == 0) elements.sums[chunk] = sum;
  }
}

constexpr int kLossThreads = 1024;

// One block.
template <typename A>
__global__ void __launch_bounds__(kLossThreads)
    LossKernel(const double* sums, int64_t chunks, int64_t n, const bool* finite, A* codebook_loss,
               A* commitment_loss) {
  double sum = 0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kLossThreads) sum += sums[chunk];
  sum = Reduce(sum, reinterpret_cast<double*>(SharedMemory()), Sum());
  if (threadIdx.x == 0) {
    const A loss = !*finite ? kNan<A> : n == 0 ? A{0} : static_cast<A>(sum / static_cast<double>(n));
    *codebook_loss = loss;
    *commitment_loss = loss;
  }
}

template <typename A>
struct ForwardMemory {
  DeviceTable<A> table;
  double* sums;
  uint8_t* answers;
};

template <typename T>
Chunks SplitForward(int64_t n) {
  constexpr int64_t kTile = kVector<T> * kForwardThreads;
  return Split(n, kTile, kTile, kMostForwardChunks);
}

template <typename T, typename A>
ForwardMemory<A> CutForward(Cutter* cutter, int64_t n, const A* anchors, int num_anchors) {
  ForwardMemory<A> memory;
  memory.table = CutTable(cutter, anchors, num_anchors);
  memory.sums = cutter->Take<double>(SplitForward<T>(n).count);
  memory.answers = sizeof(T) == 2 && num_anchors <= kMostAnchorsToLookUp ? cutter->Take<uint8_t>(kValues) : nullptr;
  return memory;
}

template <typename Finder, typename T, typename A>
cudaError_t Quantize(const Elements<T>& elements, const ForwardMemory<A>& memory, cudaStream_t stream) {
  const auto kernel = QuantizeKernel<Finder, T, A>;
  const size_t shared = kForwardThreads * sizeof(double) + Finder::SharedBytes(memory.table);
  int resident;
  const cudaError_t error = ResidentBlocks(kernel, kForwardThreads, shared, &resident);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(elements.chunks.count, resident));
  return Launch(kernel, blocks, kForwardThreads, shared, stream, elements, memory.table, memory.answers);
}

template <typename T, typename A>
cudaError_t QuantizeByTree(const Elements<T>& elements, const ForwardMemory<A>& memory, cudaStream_t stream) {
  if (TreeFinder<T, A, true>::Fits(memory.table)) {
    return Quantize<TreeFinder<T, A, true>>(elements, memory, stream);
  }
  return Quantize<TreeFinder<T, A, false>>(elements, memory, stream);
}

// The answers are looked up where that pays and where a block can have so much shared memory.
template <typename T, typename A>
cudaError_t QuantizeFast(const Elements<T>& elements, const ForwardMemory<A>& memory, int64_t least_to_look_up,
                         cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    using Finder = LookupFinder<T, A>;
    const size_t shared = kForwardThreads * sizeof(double) + Finder::SharedBytes(memory.table);
    if (memory.answers != nullptr && elements.n >= least_to_look_up &&
        AllowSharedMemory(QuantizeKernel<Finder, T, A>, shared)) {
      const cudaError_t error = Launch(AnswerKernel<T, A>, kValues / kAnswerThreads, kAnswerThreads, 0, stream,
                                       memory.table, memory.answers);
      return error == cudaSuccess ? Quantize<Finder>(elements, memory, stream) : error;
    }
  }
  return QuantizeByTree(elements, memory, stream);
}

template <typename T, typename A>
cudaError_t Forward(const T* x, int64_t n, const A* anchors, int num_anchors, T* quantized, int32_t* index,
                    A* codebook_loss, A* commitment_loss, int64_t least_to_look_up, void* workspace,
                    cudaStream_t stream) {
  Cutter cutter(workspace);
  const ForwardMemory<A> memory = CutForward<T>(&cutter, n, anchors, num_anchors);
  cudaError_t error = MakeTable(memory.table, stream);
  if (error != cudaSuccess) return error;
  const Chunks chunks = SplitForward<T>(n);
  if (n > 0) {
    const bool aligned = IsAligned<T, kVector<T>>(x) && IsAligned<T, kVector<T>>(quantized) &&
                         IsAligned<int32_t, kVector<T>>(index);
    const Elements<T> elements = {x, n, chunks, aligned, quantized, index, memory.sums};
    error = QuantizeFast(elements, memory, least_to_look_up, stream);
    if (error != cudaSuccess) return error;
  }
  return Launch(LossKernel<A>, 1, kLossThreads, kLossThreads * sizeof(double), stream, memory.sums, chunks.count, n,
                memory.table.finite, codebook_loss, commitment_loss);
}

// --------------------------------------------------------------------------------------------------------- gradient
//
// Each warp has sums of its own, in shared memory: a row for each anchor, and in it several columns, each for some of
// the lanes. Lanes that share a column add one after the other, in an order that depends on the indices alone:
//
//   - 32 columns for up to 64 anchors: each lane has its own;
//   - 8 columns for up to 256 anchors: lanes 0 to 7 add, then 8 to 15, and so on, whatever their anchors are;
//   - 1 column for more: of the lanes with the same anchor, the lowest adds first.
//
// The rows of a block are a range of at most 2,048 anchors; with more anchors, further blocks go over the same
// elements for the further ranges.

constexpr int kGradientThreads = 64;  // 32 KB of sums, so that the smallest devices can run a block, Hopper six
constexpr int kGradientWarps = kGradientThreads / kWarp;
constexpr int kMostAnchorsInRange = 2048;
constexpr int64_t kMostGradientChunks = 4096;
constexpr int64_t kMostGradientSums = int64_t{1} << 22;

template <typename T, typename A>
struct Gradient {
  const T* x;
  int64_t n;
  const A* anchors;
  int count;
  const int32_t* index;
  const T* d_quantized;
  const A *d_codebook, *d_commitment;
  A twice_mean;  // 2 / n
  T* d_x;
  bool aligned;
  Chunks chunks;
  int range;     // how many anchors a block has rows for
  double* sums;  // [chunks][count]
};

// Adds value[v] to row[v] of the sums of this warp. The last row is for values that count for no anchor of the range.
template <int columns, int count>
__device__ inline void AddToRows(const int (&row)[count], const double (&value)[count], int last_row, double* sums) {
  const int lane = threadIdx.x % kWarp;
  if (columns > 1) {
    double* const column = sums + lane % columns;
#if defined(__CUDACC__)
#pragma unroll 1  // or the places of the sums would be computed again in each turn
#endif
    for (int turn = 0; turn < kWarp / columns; ++turn) {
      if (lane / columns == turn) {
        // Two at a time, both loaded before one is stored: that halves the wait for the memory.
        for (int v = 0; v < count; v += 2) {
          double* const first = column + row[v] * columns;
          double* const second = column + row[v + 1] * columns;
          const double second_before = *second;
          const double first_sum = *first + value[v];
          *first = first_sum;
          *second = (row[v] == row[v + 1] ? first_sum : second_before) + value[v + 1];
        }
      }
      __syncwarp();
    }
  } else {
    for (int v = 0; v < count; ++v) {
      const unsigned with_same_row = __match_any_sync(kAllLanes, row[v]);
      const int own_turn = row[v] == last_row ? -1 : __popc(with_same_row & ((1u << lane) - 1));
      for (int turn = 0; __any_sync(kAllLanes, own_turn >= turn); ++turn) {
        if (own_turn == turn) sums[row[v]] += value[v];
        __syncwarp();
      }
    }
  }
}

template <int columns, typename T, typename A>
__global__ void __launch_bounds__(kGradientThreads) GradientKernel(Gradient<T, A> gradient) {
  constexpr int kTile = kVector<T> * kGradientThreads;
  const A d_commitment = *gradient.d_commitment, factor = d_commitment * gradient.twice_mean;
  const bool moves_x = d_commitment != 0;
  const bool with_sums = *gradient.d_codebook != 0;
  const bool with_index = moves_x || with_sums;
  const bool with_d_x = blockIdx.y == 0;
  if (!with_sums && !with_d_x) return;

  const int first = blockIdx.y * gradient.range;
  const int rows = gradient.count - first < gradient.range ? gradient.count - first : gradient.range;
  double* const all_sums = reinterpret_cast<double*>(SharedMemory());
  const int sums_of_warp = (gradient.range + 1) * columns;
  double* const sums = all_sums + threadIdx.x / kWarp * sums_of_warp;
  if (with_sums) {
    for (int i = threadIdx.x; i < kGradientWarps * sums_of_warp; i += kGradientThreads) all_sums[i] = 0;
    __syncthreads();
  }

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * gradient.chunks.size;
  const int size = SizeOfChunk(gradient.chunks, blockIdx.x, gradient.n);
  // The elements of the next tile are loaded before those of the last are added up.
  T next_x[kVector<T>], next_d[kVector<T>];
  int32_t next_index[kVector<T>];
  const auto load = [&](int i) {
    const int valid = Valid(i, size, kVector<T>);
    if (with_index) {
      Load(gradient.x + begin + i, valid, gradient.aligned, T{}, next_x);
      Load(gradient.index + begin + i, valid, gradient.aligned, -1, next_index);
    }
    if (with_d_x) Load(gradient.d_quantized + begin + i, valid, gradient.aligned, T{}, next_d);
  };
  const int own = kVector<T> * static_cast<int>(threadIdx.x);
  load(own);
  for (int tile = 0; tile < size; tile += kTile) {
    const int i = tile + own;
    const int valid = Valid(i, size, kVector<T>);
    T d[kVector<T>];
    int row[kVector<T>];
    double value[kVector<T>];
    for (int v = 0; v < kVector<T>; ++v) d[v] = next_d[v];
    if (with_index) {
      A difference[kVector<T>];
      for (int v = 0; v < kVector<T>; ++v) {
        const int32_t k = next_index[v];
        const bool is_anchor = static_cast<unsigned>(k) < static_cast<unsigned>(gradient.count);
        const A anchor = gradient.anchors[is_anchor ? k : 0];
        difference[v] = is_anchor ? Widen(next_x[v]) - anchor : kNan<A>;
        const unsigned r = static_cast<unsigned>(k) - static_cast<unsigned>(first);
        row[v] = static_cast<int>(r < static_cast<unsigned>(rows) ? r : gradient.range);
        value[v] = static_cast<double>(-difference[v]);
        if (!is_anchor && !moves_x) Narrow(kNan<A>, &d[v]);
      }
      if (moves_x) {
        for (int v = 0; v < kVector<T>; ++v) Narrow(Widen(d[v]) + factor * difference[v], &d[v]);
      }
    }
    load(i + kTile);
    if (with_d_x) Store(d, valid, gradient.aligned, gradient.d_x + begin + i);
    if (with_sums) AddToRows<columns>(row, value, gradient.range, sums);
  }
  if (!with_sums) return;

  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += kGradientThreads) {
    double sum = 0;
    for (int warp = 0; warp < kGradientWarps; ++warp) {
      for (int c = 0; c < columns; ++c) {
        // Neighbouring rows begin at different columns, which are in different banks.
        sum += all_sums[warp * sums_of_warp + r * columns + (r + c) % columns];
      }
    }
    gradient.sums[blockIdx.x * static_cast<int64_t>(gradient.count) + first + r] = sum;
  }
}

constexpr int kSumThreads = 512;
constexpr int kAnchorsOfBlock = 8;

// Adds the sums of all chunks, for eight anchors.
template <typename A>
__global__ void __launch_bounds__(kSumThreads)
    SumKernel(const double* sums, int64_t chunks, int count, const A* d_codebook, double twice_mean,
              A* d_anchors) {
  constexpr int kShares = kSumThreads / kAnchorsOfBlock;
  const int share = threadIdx.x / kAnchorsOfBlock;
  const int k = blockIdx.x * kAnchorsOfBlock + threadIdx.x % kAnchorsOfBlock;
  const A upstream = *d_codebook;
  double sum = 0;
  if (k < count && upstream != 0) {
    for (int64_t chunk = share; chunk < chunks; chunk += kShares) sum += sums[chunk * count + k];
  }
  double* const shared = reinterpret_cast<double*>(SharedMemory());
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kShares / 2; half > 0; half /= 2) {
    if (share < half) shared[threadIdx.x] += shared[threadIdx.x + half * kAnchorsOfBlock];
    __syncthreads();
  }
  if (share == 0 && k < count) {
    // In double: a sum can be too large for a float where its mean is not.
    const double factor = upstream * twice_mean;
    d_anchors[k] = upstream == 0 || chunks == 0 ? A{0} : static_cast<A>(factor * shared[threadIdx.x]);
  }
}

// There are so few chunks that their sums are small beside the elements.
template <typename T>
Chunks SplitGradient(int64_t n, int num_anchors) {
  constexpr int64_t kTile = kVector<T> * kGradientThreads;
  const int64_t least = std::max<int64_t>(4 * kTile, 8 * static_cast<int64_t>(num_anchors));
  return Split(n, kTile, least, std::min(kMostGradientChunks, kMostGradientSums / num_anchors));
}

template <typename T>
double* CutGradient(Cutter* cutter, int64_t n, int num_anchors) {
  return cutter->Take<double>(SplitGradient<T>(n, num_anchors).count * num_anchors);
}

template <int columns, typename T, typename A>
cudaError_t AddGradients(const Gradient<T, A>& gradient, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(gradient.chunks.count),
                    static_cast<unsigned>(DivideUp(gradient.count, gradient.range)));
  const size_t shared = sizeof(double) * kGradientWarps * (gradient.range + 1) * columns;
  return Launch(GradientKernel<columns, T, A>, blocks, kGradientThreads, shared, stream, gradient);
}

}  // namespace

template <typename T, typename A>
size_t NearestAnchorCudaWorkspace(int64_t n, int num_anchors) {
  Cutter cutter(nullptr);
  CutForward<T, A>(&cutter, n, nullptr, num_anchors);
  return cutter.bytes();
}

template <typename T, typename A>
int NearestAnchorCuda(const T* x, int64_t n, const A* anchors, int num_anchors, T* quantized, int32_t* index,
                      A* codebook_loss, A* commitment_loss, void* workspace, void* stream) {
  return Forward(x, n, anchors, num_anchors, quantized, index, codebook_loss, commitment_loss, kLeastToLookUp,
                 workspace, static_cast<cudaStream_t>(stream));
}

template <typename T, typename A>
size_t NearestAnchorGradCudaWorkspace(int64_t n, int num_anchors) {
  Cutter cutter(nullptr);
  CutGradient<T>(&cutter, n, num_anchors);
  return cutter.bytes();
}

template <typename T, typename A>
int NearestAnchorGradCuda(const T* x, int64_t n, const A* anchors, int num_anchors, const int32_t* index,
                          const T* d_quantized, const A* d_codebook, const A* d_commitment, T* d_x, A* d_anchors,
                          void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Cutter cutter(workspace);
  Gradient<T, A> gradient;
  gradient.x = x;
  gradient.n = n;
  gradient.anchors = anchors;
  gradient.count = num_anchors;
  gradient.index = index;
  gradient.d_quantized = d_quantized;
  gradient.d_codebook = d_codebook;
  gradient.d_commitment = d_commitment;
  gradient.twice_mean = A{2} * (A{1} / static_cast<A>(n));
  gradient.d_x = d_x;
  gradient.aligned = IsAligned<T, kVector<T>>(x) && IsAligned<int32_t, kVector<T>>(index) &&
                     IsAligned<T, kVector<T>>(d_quantized) && IsAligned<T, kVector<T>>(d_x);
  gradient.chunks = SplitGradient<T>(n, num_anchors);
  gradient.range = std::min(num_anchors, kMostAnchorsInRange);
  gradient.sums = CutGradient<T>(&cutter, n, num_anchors);
  if (n > 0) {
    const cudaError_t error = num_anchors <= 64    ? AddGradients<32>(gradient, cuda_stream)
                              : num_anchors <= 256 ? AddGradients<8>(gradient, cuda_stream)
                                                   : AddGradients<1>(gradient, cuda_stream);
    if (error != cudaSuccess) return error;
  }
  const auto blocks = static_cast<unsigned>(DivideUp(num_anchors, kAnchorsOfBlock));
  return Launch(SumKernel<A>, blocks, kSumThreads, kSumThreads * sizeof(double), cuda_stream, gradient.sums,
                gradient.chunks.count, num_anchors, d_codebook, 2.0 / static_cast<double>(n), d_anchors);
}

#define AIB_TF_INSTANTIATE(T, A)                                                                                       \
  template size_t NearestAnchorCudaWorkspace<T, A>(int64_t, int);                                                      \
  template int NearestAnchorCuda<T, A>(const T*, int64_t, const A*, int, T*, int32_t*, A*, A*, void*, void*);          \
  template size_t NearestAnchorGradCudaWorkspace<T, A>(int64_t, int);                                                  \
  template int NearestAnchorGradCuda<T, A>(const T*, int64_t, const A*, int, const int32_t*, const T*, const A*,       \
                                           const A*, T*, A*, void*, void*);
AIB_TF_INSTANTIATE(Half, float)
AIB_TF_INSTANTIATE(BFloat16, float)
AIB_TF_INSTANTIATE(float, float)
AIB_TF_INSTANTIATE(double, double)
#undef AIB_TF_INSTANTIATE

}  // namespace aib_tf
