#include "keys.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"

namespace tir::cpu {

KeyLists::KeyLists(const float* weights, int64_t batch, int64_t length, Which which)
    : stride_((length + padding - 1) / padding * padding) {
  // One allocation, so that there is one thing to release: counts, indices, weights, logarithms.
  char* memory = static_cast<char*>(allocate(batch * (8 + 12 * stride_)));
  counts_ = reinterpret_cast<int64_t*>(memory);
  index_ = reinterpret_cast<int32_t*>(counts_ + batch);
  weight_ = reinterpret_cast<float*>(index_ + batch * stride_);
  log2_weight_ = weight_ + batch * stride_;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t start = b * stride_, count = 0;
    for (int64_t key = 0; key < length; ++key) {
      float weight = weights[b * length + key];
      if (which == Which::positive ? weight <= 0 : weight != 0) continue;
      index_[start + count] = static_cast<int32_t>(key);
      weight_[start + count] = weight;
      log2_weight_[start + count] = weight == 1.0f ? 0.0f : std::log2(weight);
      ++count;
    }
    counts_[b] = count;
    std::fill(weight_ + start + count, weight_ + start + stride_, 0.0f);
    std::fill(log2_weight_ + start + count, log2_weight_ + start + stride_,
              -std::numeric_limits<float>::infinity());
  }
}

KeyLists::~KeyLists() { release(counts_); }

KeyList KeyLists::of(int64_t b) const {
  int64_t start = b * stride_;
  return {counts_[b], index_ + start, weight_ + start, log2_weight_ + start};
}

}  // namespace tir::cpu
