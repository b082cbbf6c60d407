// The CPU kernels. An array is cut into chunks, which are what threads take, and these into tiles, which stay in the
// first-level cache while they are widened, searched, summed and narrowed. Where a chunk begins depends on the number
// of elements alone, and sums are taken in a fixed order, so that neither the number of threads nor the instruction
// set shows in a result. (Compile with -ffp-contract=off: a fused multiply-add would.)

#include "nearest_anchor_kernel.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "nearest_anchor_loops.h"
#include "nearest_anchor_table.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace aib_tf {
namespace {

// While one of these lives, subnormal numbers count and numbers are rounded to nearest, whatever the thread was set
// to. TensorFlow's threads take subnormal numbers for zero, the thread that calls an op eagerly does not.
class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kFlushAndRound); }
  ~IeeeArithmetic() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushAndRound = 0x8000 | 0x6000 | 0x0040;
  const unsigned saved_;
#elif defined(__aarch64__)
  IeeeArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ & ~kFlushAndRound));
  }
  ~IeeeArithmetic() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  static constexpr uint64_t kFlushAndRound = uint64_t{0x7} << 22;
  uint64_t saved_;
#else
  IeeeArithmetic() = default;  // what these processors start with is taken as it is
#endif

  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;
};

struct Chunks {
  int64_t count, size;
};

// At most `most` chunks of whole tiles, of at least `least` elements.
Chunks Split(int64_t n, int64_t least, int64_t most) {
  int64_t size = std::max(least, (n + most - 1) / most);
  size = (size + kTile - 1) / kTile * kTile;
  return {(n + size - 1) / size, size};
}

template <typename T, typename A>
double QuantizeChunk(const HostAnchorTable<A>& table, const T* x, int64_t n, T* quantized, int32_t* index) {
  const IeeeArithmetic arithmetic;
  A wide_buffer[kTile], quantized_buffer[kTile];
  double sums[kLanes] = {};
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int size = static_cast<int>(std::min<int64_t>(kTile, n - begin));
    const A* wide = WidenTile(x + begin, size, wide_buffer);
    A* nearest = TileToFill(quantized + begin, quantized_buffer);
    if (!FindTile(table, wide, size, nearest, index + begin)) {
      for (int i = 0; i < size; ++i) {
        if (wide[i] >= table.view().low && wide[i] <= table.view().high) continue;
        index[begin + i] = NearestIndex(table.view(), wide[i]);
        nearest[i] = wide[i] == wide[i] ? table.anchors()[index[begin + i]] : wide[i];
      }
    }
    AddSquares(wide, nearest, size, sums);
    NarrowTile(nearest, size, quantized + begin);
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// One chunk of the gradient: d_x is d_quantized, plus factor * difference if the commitment loss `moves_x`; the sum of
// -difference for each anchor is added to sums[0, Q), unless sums is null. Returns the position of an index out of
// range, or -1.
template <typename T, typename A>
int64_t GradientOfChunk(const T* x, int64_t n, const A* anchors, int num_anchors, const int32_t* index,
                        const T* d_quantized, bool moves_x, A factor, T* d_x, double* sums) {
  const IeeeArithmetic arithmetic;
  // Neighbouring elements often have the same anchor, and each addition would wait for the one before it. So they
  // take turns with several sums, while those fit the first-level cache.
  constexpr int kTurns = 4, kMostAnchorsInTurns = 1024;
  const int turns = num_anchors <= kMostAnchorsInTurns ? kTurns : 1;
  std::vector<double> in_turns(sums != nullptr && turns > 1 ? turns * num_anchors : 0);
  double* turn[kTurns];
  for (int t = 0; t < kTurns; ++t) turn[t] = turns > 1 ? in_turns.data() + t * num_anchors : sums;

  A wide_buffer[kTile], d_buffer[kTile], d_x_buffer[kTile], difference[kTile];
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int size = static_cast<int>(std::min<int64_t>(kTile, n - begin));
    const int32_t* tile_index = index + begin;
    if (!Loops().all_below(tile_index, size, num_anchors)) {
      const int32_t* bad = std::find_if(tile_index, tile_index + size,
                                        [=](int32_t k) { return k < 0 || k >= num_anchors; });
      return bad - index;
    }
    Difference(WidenTile(x + begin, size, wide_buffer), anchors, tile_index, size, difference);
    if (moves_x) {
      const A* d = WidenTile(d_quantized + begin, size, d_buffer);
      A* result = TileToFill(d_x + begin, d_x_buffer);
      AddScaled(d, factor, difference, size, result);
      NarrowTile(result, size, d_x + begin);
    } else if (d_x != d_quantized) {
      std::memcpy(d_x + begin, d_quantized + begin, size * sizeof(T));
    }
    if (sums != nullptr) {
      int i = 0;
      for (; i + kTurns <= size; i += kTurns) {
        for (int t = 0; t < kTurns; ++t) turn[t][tile_index[i + t]] -= static_cast<double>(difference[i + t]);
      }
      for (; i < size; ++i) turn[0][tile_index[i]] -= static_cast<double>(difference[i]);
    }
  }
  if (!in_turns.empty()) {
    for (int k = 0; k < num_anchors; ++k) {
      for (int t = 0; t < turns; ++t) sums[k] += turn[t][k];
    }
  }
  return -1;
}

}  // namespace

const char* CpuInstructionSet() { return Loops().name; }

template <typename T, typename A>
void NearestAnchorCpu(const T* x, int64_t n, const A* anchors, int num_anchors, T* quantized, int32_t* index, A* loss,
                      const ParallelFor& parallel_for) {
  *loss = 0;
  if (n == 0) return;
  const IeeeArithmetic arithmetic;
  const int most_without_grid = std::is_same<A, float>::value ? Loops().most_without_grid : 4;
  const HostAnchorTable<A> table(anchors, num_anchors, most_without_grid);
  const Chunks chunks = Split(n, /*least=*/16 * kTile, /*most=*/1024);
  std::vector<double> sums(chunks.count);
  parallel_for(chunks.count, /*nanoseconds=*/chunks.size / 2, [&](int64_t chunk) {
    const int64_t begin = chunk * chunks.size;
    sums[chunk] =
        QuantizeChunk(table, x + begin, std::min(chunks.size, n - begin), quantized + begin, index + begin);
  });
  double sum = 0;
  for (double part : sums) sum += part;
  *loss = static_cast<A>(sum / static_cast<double>(n));
}

template <typename T, typename A>
int64_t NearestAnchorGradCpu(const T* x, int64_t n, const A* anchors, int num_anchors, const int32_t* index,
                             const T* d_quantized, A d_codebook, A d_commitment, T* d_x, A* d_anchors,
                             const ParallelFor& parallel_for) {
  std::fill(d_anchors, d_anchors + num_anchors, A{0});
  if (n == 0) return -1;
  if (d_codebook == 0 && d_commitment == 0) {
    if (d_x != d_quantized) std::memcpy(d_x, d_quantized, n * sizeof(T));
    return -1;
  }
  const IeeeArithmetic arithmetic;
  const A twice_mean = A{2} * (A{1} / static_cast<A>(n));
  // Each chunk has Q sums of its own. There are so few chunks that the sums are small beside the elements, and at most
  // as many as today's processors have use for.
  const Chunks chunks = Split(n, std::max<int64_t>(16 * kTile, 16 * static_cast<int64_t>(num_anchors)), /*most=*/64);
  std::vector<double> sums(d_codebook != 0 ? chunks.count * num_anchors : 0);
  std::vector<int64_t> bad(chunks.count);
  parallel_for(chunks.count, /*nanoseconds=*/chunks.size, [&](int64_t chunk) {
    const int64_t begin = chunk * chunks.size;
    bad[chunk] = GradientOfChunk(x + begin, std::min(chunks.size, n - begin), anchors, num_anchors, index + begin,
                                 d_quantized + begin, d_commitment != 0, d_commitment * twice_mean, d_x + begin,
                                 sums.empty() ? nullptr : sums.data() + chunk * num_anchors);
  });
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    if (bad[chunk] >= 0) return chunk * chunks.size + bad[chunk];
  }
  if (d_codebook != 0) {
    for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
      for (int k = 0; k < num_anchors; ++k) sums[k] += sums[chunk * num_anchors + k];
    }
    // In double: a sum can be too large for a float where its mean is not.
    const double factor = d_codebook * (2.0 / static_cast<double>(n));
    for (int k = 0; k < num_anchors; ++k) d_anchors[k] = static_cast<A>(factor * sums[k]);
  }
  return -1;
}

#define AIB_TF_INSTANTIATE(T, A)                                                                                   \
  template void NearestAnchorCpu<T, A>(const T*, int64_t, const A*, int, T*, int32_t*, A*, const ParallelFor&);    \
  template int64_t NearestAnchorGradCpu<T, A>(const T*, int64_t, const A*, int, const int32_t*, const T*, A, A, T*, \
                                              A*, const ParallelFor&);
AIB_TF_INSTANTIATE(Half, float)
AIB_TF_INSTANTIATE(BFloat16, float)
AIB_TF_INSTANTIATE(float, float)
AIB_TF_INSTANTIATE(double, double)
#undef AIB_TF_INSTANTIATE

}  // namespace aib_tf
