// The table of nearest_anchor.h, made on the host and owned.
#ifndef AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_TABLE_H_
#define AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_TABLE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "nearest_anchor.h"

namespace aib_tf {

// Tables of up to this many anchors can be held in registers, which load that many entries, whatever their number.
constexpr int kMostInRegisters = 64;

// Owns the arrays of an AnchorTable.
template <typename A>
class HostAnchorTable {
 public:
  // `anchors` have to outlive the table.
  HostAnchorTable(const A* anchors, int count, int most_without_grid) : anchors_(anchors) {
    view_.count = count;
    index_.resize(count);
    for (int k = 0; k < count; ++k) index_[k] = k;
    std::sort(index_.begin(), index_.end(), [anchors](int32_t a, int32_t b) {
      return anchors[a] < anchors[b] || (anchors[a] == anchors[b] && a < b);
    });
    for (int slot = 1; slot < count; ++slot) {
      if (anchors[index_[slot]] == anchors[index_[slot - 1]]) index_[slot] = index_[slot - 1];
    }
    value_.resize(std::max(count, kMostInRegisters));
    for (int slot = 0; slot < count; ++slot) value_[slot] = anchors[index_[slot]];
    in_order_ = true;
    for (int slot = 0; slot < count; ++slot) in_order_ = in_order_ && index_[slot] == slot;

    view_.low = -std::numeric_limits<A>::max();
    view_.high = std::numeric_limits<A>::max();
    for (int slot = 0; slot <= count; ++slot) {
      A low, high;
      ReliableRange(value_.data(), count, slot, &low, &high);
      view_.low = std::max(view_.low, low);
      view_.high = std::min(view_.high, high);
    }

    threshold_.assign(2 * static_cast<size_t>(count) + kMostInRegisters, std::numeric_limits<A>::infinity());
    threshold_[0] = -std::numeric_limits<A>::infinity();
    for (int slot = 1; slot < count; ++slot) {
      threshold_[slot] = Threshold(value_[slot - 1], value_[slot], index_[slot - 1], index_[slot]);
    }

    lowest_.resize(2 * static_cast<size_t>(count));
    std::copy(index_.begin(), index_.end(), lowest_.begin() + count);
    for (int node = count - 1; node >= 1; --node) {
      lowest_[node] = std::min(lowest_[2 * node], lowest_[2 * node + 1]);
    }
    index_.resize(std::max(count, kMostInRegisters));

    view_.value = value_.data();
    view_.index = index_.data();
    view_.threshold = threshold_.data();
    view_.lowest = lowest_.data();
    view_.bucket = nullptr;
    view_.buckets = 0;
    view_.origin = view_.scale = 0;
    view_.step = FirstStep(count - 1);
    if (count > most_without_grid) MakeGrid();
  }

  const AnchorTable<A>& view() const { return view_; }
  const A* anchors() const { return anchors_; }
  // Whether the anchors came ascending and without duplicates, so that the slot is the index.
  bool in_order() const { return in_order_; }

 private:
  // The first step of a search among `count` thresholds: the highest power of two up to it.
  static int FirstStep(int count) {
    int step = 1;
    while (step <= count) step *= 2;
    return step / 2;
  }

  void MakeGrid() {
    int buckets = 1;
    while (buckets < 4 * view_.count) buckets *= 2;
    const A first = threshold_[1], last = threshold_[view_.count - 1];
    const A scale = static_cast<A>(buckets) / (last - first);
    if (!IsFinite(scale) || !(scale > 0)) return;  // they are too near to each other, or too far apart
    bucket_.assign(buckets + 1, 0);
    for (int slot = 1; slot < view_.count; ++slot) ++bucket_[Bucket(threshold_[slot], first, scale, buckets) + 1];
    const int fullest = *std::max_element(bucket_.begin(), bucket_.end());
    for (int b = 1; b <= buckets; ++b) bucket_[b] += bucket_[b - 1];
    view_.bucket = bucket_.data();
    view_.buckets = buckets;
    view_.origin = first;
    view_.scale = scale;
    view_.step = FirstStep(fullest);
  }

  const A* const anchors_;
  AnchorTable<A> view_;
  std::vector<A> value_, threshold_;
  std::vector<int32_t> index_, lowest_, bucket_;
  bool in_order_;
};

}  // namespace aib_tf

#endif  // AIB_TF_CUSTOM_OPS_NEAREST_ANCHOR_NEAREST_ANCHOR_TABLE_H_
