// The inner loops over a tile, for each instruction set, and the choice among them when the program runs.
//
// There are three: baseline, which is what every processor of its kind has, AVX2 and AVX-512. Loops that the compiler
// makes fast by itself are written once and inlined into functions that are compiled for each; the search among the
// anchors is written for each. All give the same bits.
#ifndef AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_LOOPS_H_
#define AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_LOOPS_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>

#include "nearest_anchor.h"
#include "nearest_anchor_table.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace aib_tf {
namespace {

constexpr int kTile = 1024;  // elements, which stay in the first-level cache from one loop to the next
constexpr int kLanes = 16;   // how many partial sums run beside each other

#define AIB_TF_INLINE inline __attribute__((always_inline))

template <typename T, typename A>
AIB_TF_INLINE void WidenLoop(const T* from, int n, A* to) {
  for (int i = 0; i < n; ++i) to[i] = Widen(from[i]);
}

template <typename T, typename A>
AIB_TF_INLINE void NarrowLoop(const A* from, int n, T* to) {
  for (int i = 0; i < n; ++i) Narrow(from[i], &to[i]);
}

// Adds (x - quantized)^2 to the partial sums, element i to sum i % kLanes.
template <typename A>
AIB_TF_INLINE void AddSquaresLoop(const A* x, const A* quantized, int n, double* sums) {
  double lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
  const int whole = n - n % kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const A difference = x[i + lane] - quantized[i + lane];
      lanes[lane] += static_cast<double>(difference * difference);
    }
  }
  for (int i = whole; i < n; ++i) {
    const A difference = x[i] - quantized[i];
    lanes[i - whole] += static_cast<double>(difference * difference);
  }
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
}

AIB_TF_INLINE bool AllBelowLoop(const int32_t* index, int n, uint32_t count) {
  uint32_t highest = 0;
  for (int i = 0; i < n; ++i) highest = std::max(highest, static_cast<uint32_t>(index[i]));
  return n == 0 || highest < count;
}

template <typename A>
AIB_TF_INLINE void DifferenceLoop(const A* x, const A* anchors, const int32_t* index, int n, A* difference) {
  for (int i = 0; i < n; ++i) difference[i] = x[i] - anchors[index[i]];
}

// d_x = d_quantized + factor * difference; d_x may be d_quantized.
template <typename A>
AIB_TF_INLINE void AddScaledLoop(const A* d_quantized, A factor, const A* difference, int n, A* d_x) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) d_x[i] = d_quantized[i] + factor * difference[i];
}

#define AIB_TF_LOOPS(TARGET)                                                                                     \
  TARGET void WidenTile(const BFloat16* from, int n, float* to) { WidenLoop(from, n, to); }                      \
  TARGET void NarrowTile(const float* from, int n, BFloat16* to) { NarrowLoop(from, n, to); }                    \
  TARGET void AddSquares(const float* x, const float* quantized, int n, double* sums) {                          \
    AddSquaresLoop(x, quantized, n, sums);                                                                       \
  }                                                                                                              \
  TARGET bool AllBelow(const int32_t* index, int n, uint32_t count) { return AllBelowLoop(index, n, count); }    \
  TARGET void Difference(const float* x, const float* anchors, const int32_t* index, int n, float* difference) { \
    DifferenceLoop(x, anchors, index, n, difference);                                                            \
  }                                                                                                              \
  TARGET void AddScaled(const float* d_quantized, float factor, const float* difference, int n, float* d_x) {    \
    AddScaledLoop(d_quantized, factor, difference, n, d_x);                                                      \
  }

// What a tile needs, for float arithmetic. `find` answers those of x[0, n) that the thresholds alone decide, and says
// whether these were all; the outputs of the others are not defined. n can be anything up to kTile, and nothing past it
// is read or written.
struct FloatLoops {
  const char* name;
  int most_without_grid;
  bool (*find)(const AnchorTable<float>& table, bool in_order, const float* x, int n, float* quantized,
               int32_t* index);
  void (*widen_half)(const Half* from, int n, float* to);
  void (*narrow_half)(const float* from, int n, Half* to);
  void (*widen_bfloat16)(const BFloat16* from, int n, float* to);
  void (*narrow_bfloat16)(const float* from, int n, BFloat16* to);
  void (*add_squares)(const float* x, const float* quantized, int n, double* sums);
  bool (*all_below)(const int32_t* index, int n, uint32_t count);
  void (*difference)(const float* x, const float* anchors, const int32_t* index, int n, float* difference);
  void (*add_scaled)(const float* d_quantized, float factor, const float* difference, int n, float* d_x);
};

namespace baseline {

AIB_TF_LOOPS()

template <typename A>
bool FindTile(const AnchorTable<A>& table, const A* x, int n, A* quantized, int32_t* index) {
  bool reliable = true;
  for (int i = 0; i < n; ++i) {
    if (!(x[i] >= table.low && x[i] <= table.high)) {
      reliable = false;
      continue;
    }
    const int slot = FindSlot(table, x[i]);
    quantized[i] = table.value[slot];
    index[i] = table.index[slot];
  }
  return reliable;
}

constexpr FloatLoops kLoops = {
    "baseline",
    /*most_without_grid=*/4,
    [](const AnchorTable<float>& table, bool, const float* x, int n, float* quantized, int32_t* index) {
      return FindTile(table, x, n, quantized, index);
    },
    [](const Half* from, int n, float* to) { WidenLoop(from, n, to); },
    [](const float* from, int n, Half* to) { NarrowLoop(from, n, to); },
    WidenTile,
    NarrowTile,
    AddSquares,
    AllBelow,
    Difference,
    AddScaled,
};

}  // namespace baseline

#if defined(__x86_64__)

#define AIB_TF_AVX2 __attribute__((target("avx2,f16c")))
#define AIB_TF_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,f16c")))

namespace avx2 {

AIB_TF_LOOPS(AIB_TF_AVX2)

AIB_TF_AVX2 void WidenHalf(const Half* from, int n, float* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  WidenLoop(from + i, n - i, to + i);
}

AIB_TF_AVX2 void NarrowHalf(const float* from, int n, Half* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  NarrowLoop(from + i, n - i, to + i);
}

// The entry `slot` of a table of 8, 16 or 32 entries in as many registers as needed.
template <int registers>
AIB_TF_AVX2 AIB_TF_INLINE __m256 Look(const __m256* table, __m256i slot) {
  __m256 entry[registers];
  for (int r = 0; r < registers; ++r) entry[r] = _mm256_permutevar8x32_ps(table[r], slot);
  if (registers == 4) {
    const __m256 third_bit = _mm256_castsi256_ps(_mm256_slli_epi32(slot, 28));
    const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(slot, 27));
    return _mm256_blendv_ps(_mm256_blendv_ps(entry[0], entry[1 % registers], third_bit),
                            _mm256_blendv_ps(entry[2 % registers], entry[3 % registers], third_bit), fourth_bit);
  }
  if (registers == 2) {
    const __m256 third_bit = _mm256_castsi256_ps(_mm256_slli_epi32(slot, 28));
    return _mm256_blendv_ps(entry[0], entry[1 % registers], third_bit);
  }
  return entry[0];
}

AIB_TF_AVX2 AIB_TF_INLINE __m256 IsInside(__m256 x, __m256 low, __m256 high) {
  return _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ));
}

// Whole vectors only; returns how many elements that were.
template <int registers>
AIB_TF_AVX2 int FindInRegisters(const AnchorTable<float>& table, const float* x, int n, float* quantized,
                                int32_t* index, bool* reliable) {
  __m256 threshold[registers], value[registers], number[registers];
  for (int r = 0; r < registers; ++r) {
    threshold[r] = _mm256_loadu_ps(table.threshold + 8 * r);
    value[r] = _mm256_loadu_ps(table.value + 8 * r);
    number[r] = _mm256_loadu_ps(reinterpret_cast<const float*>(table.index) + 8 * r);
  }
  const __m256 low = _mm256_set1_ps(table.low), high = _mm256_set1_ps(table.high);
  __m256 inside = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    inside = _mm256_and_ps(inside, IsInside(v, low, high));
    __m256i slot = _mm256_setzero_si256();
    for (int step = 4 * registers; step > 0; step /= 2) {
      const __m256i candidate = _mm256_add_epi32(slot, _mm256_set1_epi32(step));
      const __m256 above = _mm256_cmp_ps(v, Look<registers>(threshold, candidate), _CMP_GE_OQ);
      slot = _mm256_blendv_epi8(slot, candidate, _mm256_castps_si256(above));
    }
    _mm256_storeu_ps(quantized + i, Look<registers>(value, slot));
    _mm256_storeu_ps(reinterpret_cast<float*>(index) + i, Look<registers>(number, slot));
  }
  *reliable = _mm256_movemask_ps(inside) == 0xff;
  return i;
}

AIB_TF_AVX2 int FindInGrid(const AnchorTable<float>& table, const float* x, int n, float* quantized, int32_t* index,
                           bool* reliable) {
  const __m256 low = _mm256_set1_ps(table.low), high = _mm256_set1_ps(table.high);
  const __m256 origin = _mm256_set1_ps(table.origin), scale = _mm256_set1_ps(table.scale);
  const __m256 last = _mm256_set1_ps(static_cast<float>(table.buckets - 1));
  const __m256 most = _mm256_set1_ps(std::numeric_limits<float>::max());
  __m256 inside = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 v = _mm256_loadu_ps(x + i);
    inside = _mm256_and_ps(inside, IsInside(v, low, high));
    v = _mm256_min_ps(v, most);  // infinity and NaN would go past the last slot
    __m256i slot = _mm256_setzero_si256();
    if (table.bucket != nullptr) {
      const __m256 place = _mm256_mul_ps(_mm256_sub_ps(v, origin), scale);
      const __m256 bucket = _mm256_min_ps(_mm256_max_ps(place, _mm256_setzero_ps()), last);
      slot = _mm256_i32gather_epi32(table.bucket, _mm256_cvttps_epi32(bucket), 4);
    }
    for (int step = table.step; step > 0; step >>= 1) {
      const __m256i candidate = _mm256_add_epi32(slot, _mm256_set1_epi32(step));
      const __m256 above = _mm256_cmp_ps(v, _mm256_i32gather_ps(table.threshold, candidate, 4), _CMP_GE_OQ);
      slot = _mm256_blendv_epi8(slot, candidate, _mm256_castps_si256(above));
    }
    _mm256_storeu_ps(quantized + i, _mm256_i32gather_ps(table.value, slot, 4));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + i), _mm256_i32gather_epi32(table.index, slot, 4));
  }
  *reliable = _mm256_movemask_ps(inside) == 0xff;
  return i;
}

bool FindTile(const AnchorTable<float>& table, bool, const float* x, int n, float* quantized, int32_t* index) {
  bool reliable;
  const int done = table.count <= 8    ? FindInRegisters<1>(table, x, n, quantized, index, &reliable)
                   : table.count <= 16 ? FindInRegisters<2>(table, x, n, quantized, index, &reliable)
                   : table.count <= 32 ? FindInRegisters<4>(table, x, n, quantized, index, &reliable)
                                       : FindInGrid(table, x, n, quantized, index, &reliable);
  return baseline::FindTile(table, x + done, n - done, quantized + done, index + done) && reliable;
}

constexpr FloatLoops kLoops = {
    "avx2",     /*most_without_grid=*/32, FindTile, WidenHalf,  NarrowHalf, WidenTile,
    NarrowTile, AddSquares,               AllBelow, Difference, AddScaled,
};

}  // namespace avx2

namespace avx512 {

AIB_TF_LOOPS(AIB_TF_AVX512)

// The entry `slot` of a table of 16, 32 or 64 entries in as many registers as needed.
template <int registers>
AIB_TF_AVX512 AIB_TF_INLINE __m512 Look(const __m512* table, __m512i slot) {
  if (registers == 1) return _mm512_permutexvar_ps(slot, table[0]);
  const __m512 low = _mm512_permutex2var_ps(table[0], slot, table[1 % registers]);
  if (registers == 2) return low;
  const __m512 high = _mm512_permutex2var_ps(table[2 % registers], slot, table[3 % registers]);
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(slot, _mm512_set1_epi32(32)), low, high);
}

AIB_TF_AVX512 AIB_TF_INLINE __mmask16 Outside(__m512 x, __m512 low, __m512 high) {
  const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LE_OQ);
  return static_cast<__mmask16>(~inside);
}

AIB_TF_AVX512 AIB_TF_INLINE __mmask16 First(int n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1);
}

template <int registers>
AIB_TF_AVX512 bool FindInRegisters(const AnchorTable<float>& table, const float* x, int n, float* quantized,
                                   int32_t* index) {
  __m512 threshold[registers], value[registers], number[registers];
  for (int r = 0; r < registers; ++r) {
    threshold[r] = _mm512_loadu_ps(table.threshold + 16 * r);
    value[r] = _mm512_loadu_ps(table.value + 16 * r);
    number[r] = _mm512_loadu_ps(table.index + 16 * r);
  }
  const __m512 low = _mm512_set1_ps(table.low), high = _mm512_set1_ps(table.high);
  __mmask16 outside = 0;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 some = First(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(some, x + i);
    outside |= some & Outside(v, low, high);
    __m512i slot = _mm512_setzero_si512();
    for (int step = 8 * registers; step > 0; step /= 2) {
      const __m512i candidate = _mm512_add_epi32(slot, _mm512_set1_epi32(step));
      const __mmask16 above = _mm512_cmp_ps_mask(v, Look<registers>(threshold, candidate), _CMP_GE_OQ);
      slot = _mm512_mask_mov_epi32(slot, above, candidate);
    }
    _mm512_mask_storeu_ps(quantized + i, some, Look<registers>(value, slot));
    _mm512_mask_storeu_ps(index + i, some, Look<registers>(number, slot));
  }
  return outside == 0;
}

AIB_TF_AVX512 bool FindInGrid(const AnchorTable<float>& table, bool in_order, const float* x, int n, float* quantized,
                              int32_t* index) {
  const __m512 low = _mm512_set1_ps(table.low), high = _mm512_set1_ps(table.high);
  const __m512 origin = _mm512_set1_ps(table.origin), scale = _mm512_set1_ps(table.scale);
  const __m512 last = _mm512_set1_ps(static_cast<float>(table.buckets - 1));
  const __m512 most = _mm512_set1_ps(std::numeric_limits<float>::max());
  __mmask16 outside = 0;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 some = First(n - i);
    __m512 v = _mm512_maskz_loadu_ps(some, x + i);
    outside |= some & Outside(v, low, high);
    v = _mm512_min_ps(v, most);  // infinity and NaN would go past the last slot
    __m512i slot = _mm512_setzero_si512();
    if (table.bucket != nullptr) {
      const __m512 place = _mm512_mul_ps(_mm512_sub_ps(v, origin), scale);
      const __m512 bucket = _mm512_min_ps(_mm512_max_ps(place, _mm512_setzero_ps()), last);
      slot = _mm512_i32gather_epi32(_mm512_cvttps_epi32(bucket), table.bucket, 4);
    }
    for (int step = table.step; step > 0; step >>= 1) {
      const __m512i candidate = _mm512_add_epi32(slot, _mm512_set1_epi32(step));
      const __mmask16 above =
          _mm512_cmp_ps_mask(v, _mm512_i32gather_ps(candidate, table.threshold, 4), _CMP_GE_OQ);
      slot = _mm512_mask_mov_epi32(slot, above, candidate);
    }
    _mm512_mask_storeu_ps(quantized + i, some, _mm512_i32gather_ps(slot, table.value, 4));
    if (!in_order) slot = _mm512_i32gather_epi32(slot, table.index, 4);
    _mm512_mask_storeu_epi32(index + i, some, slot);
  }
  return outside == 0;
}

bool FindTile(const AnchorTable<float>& table, bool in_order, const float* x, int n, float* quantized,
              int32_t* index) {
  if (table.count <= 16) return FindInRegisters<1>(table, x, n, quantized, index);
  if (table.count <= 32) return FindInRegisters<2>(table, x, n, quantized, index);
  if (table.count <= 64) return FindInRegisters<4>(table, x, n, quantized, index);
  return FindInGrid(table, in_order, x, n, quantized, index);
}

constexpr FloatLoops kLoops = {
    "avx512",   kMostInRegisters, FindTile, avx2::WidenHalf, avx2::NarrowHalf, WidenTile,
    NarrowTile, AddSquares,       AllBelow, Difference,      AddScaled,
};

}  // namespace avx512

#endif  // defined(__x86_64__)

const FloatLoops& ChooseLoops() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("AIB_TF_CPU");
  const std::string most = wanted == nullptr ? "" : wanted;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && most != "avx2" && most != "baseline") return avx512::kLoops;
  if (has_avx2 && most != "baseline") return avx2::kLoops;
#endif
  return baseline::kLoops;
}

const FloatLoops& Loops() {
  static const FloatLoops& loops = ChooseLoops();
  return loops;
}

// The same steps under one name for float and double.

bool FindTile(const HostAnchorTable<float>& table, const float* x, int n, float* quantized, int32_t* index) {
  return Loops().find(table.view(), table.in_order(), x, n, quantized, index);
}
bool FindTile(const HostAnchorTable<double>& table, const double* x, int n, double* quantized, int32_t* index) {
  return baseline::FindTile(table.view(), x, n, quantized, index);
}

void AddSquares(const float* x, const float* quantized, int n, double* sums) {
  Loops().add_squares(x, quantized, n, sums);
}
void AddSquares(const double* x, const double* quantized, int n, double* sums) {
  AddSquaresLoop(x, quantized, n, sums);
}

void Difference(const float* x, const float* anchors, const int32_t* index, int n, float* difference) {
  Loops().difference(x, anchors, index, n, difference);
}
void Difference(const double* x, const double* anchors, const int32_t* index, int n, double* difference) {
  DifferenceLoop(x, anchors, index, n, difference);
}

void AddScaled(const float* d_quantized, float factor, const float* difference, int n, float* d_x) {
  Loops().add_scaled(d_quantized, factor, difference, n, d_x);
}
void AddScaled(const double* d_quantized, double factor, const double* difference, int n, double* d_x) {
  AddScaledLoop(d_quantized, factor, difference, n, d_x);
}

// A tile of T as A: the array itself where the types are the same, else the buffer.
template <typename A>
const A* WidenTile(const A* from, int, A*) {
  return from;
}
const float* WidenTile(const Half* from, int n, float* buffer) {
  Loops().widen_half(from, n, buffer);
  return buffer;
}
const float* WidenTile(const BFloat16* from, int n, float* buffer) {
  Loops().widen_bfloat16(from, n, buffer);
  return buffer;
}

// Where a tile of T is written as A, and its way back.
template <typename A>
A* TileToFill(A* to, A*) {
  return to;
}
float* TileToFill(Half*, float* buffer) { return buffer; }
float* TileToFill(BFloat16*, float* buffer) { return buffer; }
template <typename A>
void NarrowTile(const A*, int, A*) {}
void NarrowTile(const float* from, int n, Half* to) { Loops().narrow_half(from, n, to); }
void NarrowTile(const float* from, int n, BFloat16* to) { Loops().narrow_bfloat16(from, n, to); }

}  // namespace
}  // namespace aib_tf

#endif  // AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_LOOPS_H_
