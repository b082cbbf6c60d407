// Anchor-nearest quantization: the arithmetic and its rules, for the host and for CUDA devices, without any framework.
//
//     index     = argmin_k |x - anchors[k]|
//     quantized = anchors[index]
//     loss      = mean((x - quantized)^2), both as codebook and as commitment loss
//
// The rules, which hold on every path (CPU, CUDA, XLA, the Python path):
//
//   - Arithmetic is in the type of the anchors, A: float, or double for double x. A distance is the rounded difference
//     |x - anchors[k]|, and two anchors are equally near when these rounded numbers are equal.
//   - Of equally near anchors, the lowest k wins, whether they are duplicates, lie on either side of x, or differ by
//     less than the rounding of the distance. The anchors may be in any order. -0 and 0 are duplicates.
//   - NaN in x: quantized is that NaN, index is 0, both losses are NaN. Plus and minus infinity go to the largest and
//     the smallest anchor.
//   - Anchors that are not finite are an error; where there is no way to report one (CUDA, XLA), quantized and losses
//     are NaN and index is 0.
//   - The squares (x - quantized)^2 are rounded to A and summed in double; the mean of no elements is 0.
//   - The gradient is straight-through, with difference = x - quantized and N elements in x:
//         d_x          = d_quantized + (d_commitment * 2 / N) * difference
//         d_anchors[k] = d_codebook * 2 / N * sum over index = k of -difference
//     A loss whose upstream gradient is 0 adds nothing, also where difference is infinite or NaN.
//
// How it is fast: in the ascending anchors, each pair of neighbours has one threshold, the lowest x that goes to the
// upper one. The answer is the number of thresholds that are not above x. This holds for all x that are near enough
// to the anchors (from `low` to `high`, for ordinary anchors millions of times their spacing) for the rounded
// distances to more than two anchors not to be equal; the others take a slower way, NearestIndex.
#ifndef AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_H_
#define AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define AIB_TF_HOST_DEVICE __host__ __device__
#else
#define AIB_TF_HOST_DEVICE
#endif

namespace aib_tf {

constexpr int kMaxAnchors = 65536;

// The 16-bit types of x: IEEE binary16, and the upper half of a float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
AIB_TF_HOST_DEVICE inline To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "BitCast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

AIB_TF_HOST_DEVICE inline float Widen(float x) { return x; }
AIB_TF_HOST_DEVICE inline double Widen(double x) { return x; }
AIB_TF_HOST_DEVICE inline float Widen(BFloat16 x) { return BitCast<float>(static_cast<uint32_t>(x.bits) << 16); }
AIB_TF_HOST_DEVICE inline float Widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return BitCast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinite or NaN
  // As the bits of a float, exponent and fraction are right but for the exponent's bias: 2^112 mends it, also for
  // subnormal numbers.
  return BitCast<float>(sign | BitCast<uint32_t>(BitCast<float>(magnitude << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even; NaN stays NaN.
AIB_TF_HOST_DEVICE inline void Narrow(float x, float* to) { *to = x; }
AIB_TF_HOST_DEVICE inline void Narrow(double x, double* to) { *to = x; }
AIB_TF_HOST_DEVICE inline void Narrow(float x, BFloat16* to) {
  const uint32_t bits = BitCast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}
AIB_TF_HOST_DEVICE inline void Narrow(float x, Half* to) {
  const uint32_t bits = BitCast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65,520 and above round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 the result is subnormal, a multiple of 2^-24: beside 0.5, that is where a float rounds.
    half = BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

template <typename A>
AIB_TF_HOST_DEVICE inline bool IsFinite(A x) {
  return x - x == 0;
}

// The rounded distance that decides.
template <typename A>
AIB_TF_HOST_DEVICE inline A Distance(A x, A anchor) {
  return x < anchor ? anchor - x : x - anchor;
}

// A constant, which device code can use where it cannot call std::numeric_limits.
template <typename A>
constexpr A kLargestNumber = std::numeric_limits<A>::max();

// 2^21 for float, 2^50 for double. A rounded distance to an anchor tells it from its neighbour, d further away, at
// least up to a distance of d * kReach: there, the spacing of the floating-point numbers is below d.
template <typename A>
AIB_TF_HOST_DEVICE constexpr A Reach() {
  return sizeof(A) == 4 ? static_cast<A>(0x1p21) : static_cast<A>(0x1p50);
}

// The anchors in ascending order, and what finds the nearest one. A view: the arrays belong to who made the table.
// A "slot" is a place in the ascending order.
template <typename A>
struct AnchorTable {
  int count;             // Q
  const A* value;        // [Q] ascending; slots of equal value hold anchors[index], so the sign of a zero is right
  const int32_t* index;  // [Q] the lowest k with that value
  // [Q + padding] not descending. x belongs to slot j or above where x >= threshold[j]. The first one is -infinity,
  // those past the end, up to twice the highest step below, are +infinity.
  const A* threshold;
  // [2 Q] a tree of minima: lowest[Q + j] = index[j], lowest[j] = min(lowest[2 j], lowest[2 j + 1]) for j >= 1.
  const int32_t* lowest;
  A low, high;  // for low <= x <= high, the thresholds alone decide
  // A grid over the thresholds, for many anchors: x in bucket b belongs to a slot from bucket[b] to
  // bucket[b] + 2 * step - 1. Without grid, bucket is null and the search begins at slot 0.
  const int32_t* bucket;
  int buckets;
  A origin, scale;
  int step;  // the first step of the search in a bucket, a power of two; 0 where there is nothing left to search
};

// Which bucket of the grid x is in. It never descends with x, whatever is rounded, and that is all the grid needs.
template <typename A>
AIB_TF_HOST_DEVICE inline int Bucket(A x, A origin, A scale, int buckets) {
  const A place = (x - origin) * scale;
  const A last = static_cast<A>(buckets - 1);
  return static_cast<int>(place > 0 ? (place < last ? place : last) : 0);
}

// The slot of finite x by the thresholds: the nearest for low <= x <= high, one of the nearest for others.
template <typename A>
AIB_TF_HOST_DEVICE inline int FindSlot(const AnchorTable<A>& table, A x) {
  int slot = table.bucket == nullptr ? 0 : table.bucket[Bucket(x, table.origin, table.scale, table.buckets)];
  for (int step = table.step; step > 0; step >>= 1) {
    if (x >= table.threshold[slot + step]) slot += step;
  }
  return slot;
}

// The lowest index of the slots from `first` to `last`.
template <typename A>
AIB_TF_HOST_DEVICE inline int32_t LowestIndex(const AnchorTable<A>& table, int first, int last) {
  int32_t lowest = table.index[first];
  int begin = first + table.count, end = last + table.count + 1;
  for (; begin < end; begin >>= 1, end >>= 1) {
    if (begin & 1) {
      const int32_t other = table.lowest[begin++];
      lowest = other < lowest ? other : lowest;
    }
    if (end & 1) {
      const int32_t other = table.lowest[--end];
      lowest = other < lowest ? other : lowest;
    }
  }
  return lowest;
}

// argmin_k |x - anchors[k]| for any x, by all of the rules; O(log Q).
template <typename A>
AIB_TF_HOST_DEVICE inline int32_t NearestIndex(const AnchorTable<A>& table, A x) {
  if (x != x) return 0;
  if (x - x != 0) return table.index[x > 0 ? table.count - 1 : 0];
  const int slot = FindSlot(table, x);
  if (x >= table.low && x <= table.high) return table.index[slot];
  // On both sides of a nearest slot, distances never fall on the way out. So the equally near ones are a run, and
  // halving finds its ends.
  const A least = Distance(x, table.value[slot]);
  int first = slot, last = slot;
  for (int outside = -1; first - outside > 1;) {
    const int middle = outside + (first - outside) / 2;
    if (Distance(x, table.value[middle]) == least) {
      first = middle;
    } else {
      outside = middle;
    }
  }
  for (int outside = table.count; outside - last > 1;) {
    const int middle = last + (outside - last) / 2;
    if (Distance(x, table.value[middle]) == least) {
      last = middle;
    } else {
      outside = middle;
    }
  }
  return LowestIndex(table, first, last);
}

// Making a table. Each slot is filled from the ascending values alone, so that a device can fill them in parallel.

// The integers in the order of the floating-point numbers: neighbours differ by one, -0 and 0 are the same.
AIB_TF_HOST_DEVICE inline int32_t Ordinal(float x) {
  const int32_t bits = BitCast<int32_t>(x);
  return bits < 0 ? -(bits & 0x7fffffff) : bits;
}
AIB_TF_HOST_DEVICE inline int64_t Ordinal(double x) {
  const int64_t bits = BitCast<int64_t>(x);
  return bits < 0 ? -(bits & 0x7fffffffffffffff) : bits;
}
AIB_TF_HOST_DEVICE inline float FromOrdinal(int32_t ordinal) {
  return ordinal < 0 ? -BitCast<float>(-ordinal) : BitCast<float>(ordinal);
}
AIB_TF_HOST_DEVICE inline double FromOrdinal(int64_t ordinal) {
  return ordinal < 0 ? -BitCast<double>(-ordinal) : BitCast<double>(ordinal);
}

// The first slot whose value is `value`, which is in the ascending values[0, count).
template <typename A>
AIB_TF_HOST_DEVICE inline int FirstSlotOf(A value, const A* values, int count) {
  int below = -1, first = count - 1;
  while (first - below > 1) {
    const int middle = below + (first - below) / 2;
    if (values[middle] < value) {
      below = middle;
    } else {
      first = middle;
    }
  }
  return first;
}

// The first slot whose value is above `value`, or count.
template <typename A>
AIB_TF_HOST_DEVICE inline int FirstSlotAbove(A value, const A* values, int count) {
  int below = -1, first = count;
  while (first - below > 1) {
    const int middle = below + (first - below) / 2;
    if (values[middle] > value) {
      first = middle;
    } else {
      below = middle;
    }
  }
  return first;
}

// The lowest number from `below` to `above` that goes to `above`, where the two anchors have these indices. As x grows,
// the rounded distance to the one never falls and to the other never grows, so there is exactly one such border. It is
// nearly always at the middle or a few numbers beside it; halving finds it wherever it is.
template <typename A>
AIB_TF_HOST_DEVICE inline A Threshold(A below, A above, int32_t below_index, int32_t above_index) {
  if (!(below < above)) return above;
  const auto goes_up = [=](A x) {
    const A to_below = x - below, to_above = above - x;
    return to_above < to_below || (to_above == to_below && above_index < below_index);
  };
  auto stays = Ordinal(below), goes = Ordinal(above);  // the first never goes up, the second always does
  const auto middle = Ordinal(below / 2 + above / 2);
  if (middle > stays && middle < goes) {
    const bool middle_goes = goes_up(FromOrdinal(middle));
    (middle_goes ? goes : stays) = middle;
    for (int step = 1; step <= 64; step *= 2) {
      const auto near = middle_goes ? goes - step : stays + step;
      if (near <= stays || near >= goes) break;
      const bool near_goes = goes_up(FromOrdinal(near));
      (near_goes ? goes : stays) = near;
      if (near_goes != middle_goes) break;
    }
  }
  while (goes > stays + 1) {
    const auto half = stays / 2 + goes / 2 + (stays % 2 + goes % 2) / 2;  // the mean, without overflow
    (goes_up(FromOrdinal(half)) ? goes : stays) = half;
  }
  return FromOrdinal(goes);
}

template <typename A>
AIB_TF_HOST_DEVICE inline A Least(A a, A b) {
  return a < b ? a : b;
}

// The range [low, high] in which thresholds alone decide, as far as `slot` and the one before it limit it. The range of
// a table is what all slots from 0 to count leave of each other's; it can be empty. No distance in it overflows, since
// then all anchors would be equally near.
template <typename A>
AIB_TF_HOST_DEVICE inline void ReliableRange(const A* values, int count, int slot, A* low, A* high) {
  const A reach = Reach<A>();
  *low = -kLargestNumber<A>;
  *high = kLargestNumber<A>;
  if (slot == 0) {  // below all anchors
    const int second = FirstSlotAbove(values[0], values, count);
    if (second < count) *low = values[0] - Least((values[second] - values[0]) * reach, kLargestNumber<A> / 2);
    if (*low < -kLargestNumber<A>) *low = -kLargestNumber<A>;
    return;
  }
  if (slot == count) {  // above all anchors
    const int first = FirstSlotOf(values[count - 1], values, count);
    const A gap = first > 0 ? values[count - 1] - values[first - 1] : 0;
    if (first > 0) *high = values[count - 1] + Least(gap * reach, kLargestNumber<A> / 2);
    if (*high > kLargestNumber<A>) *high = kLargestNumber<A>;
    return;
  }
  const A below = values[slot - 1], above = values[slot];
  if (!(below < above)) return;
  const int first = FirstSlotOf(below, values, slot);
  const int after = FirstSlotAbove(above, values, count);
  const A gap = above - below;
  const bool reliable = gap <= kLargestNumber<A> && (first == 0 || (below - values[first - 1]) * reach >= gap) &&
                        (after == count || (values[after] - above) * reach >= gap);
  if (reliable) return;
  // Gaps that are too wide beside their neighbours are far from zero, where floating-point numbers are far apart, or
  // around it. So the range keeps the side of zero.
  if (below >= 0) {
    *high = below;
  } else if (above <= 0) {
    *low = above;
  } else {
    *low = kLargestNumber<A>;
    *high = -kLargestNumber<A>;
  }
}

}  // namespace aib_tf

#endif  // AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_H_
