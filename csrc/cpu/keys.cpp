#include "keys.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "parallel.h"

namespace tir::cpu {
namespace {

// The power of two by which a weight is divided, so that a probability divided by the quotient stays
// in float32's range: at most 1 / weight for the key that a query attends to most, whatever the
// other weights. Of a tiny weight it is half of the exponent: a probability too small for float32
// may be a large multiple of the weight.
int exponent_of(float weight) {
  constexpr int ordinary = 60, largest_power = 120;
  if (!(weight > 0) || !std::isfinite(weight)) return 0;
  int exponent = std::ilogb(weight);
  if (exponent > ordinary) return std::min(exponent, largest_power);
  return exponent < -ordinary ? exponent / 2 : 0;
}

// The same of a weight of 0: that of the image's largest weight where all are tiny.
int exponent_beside(const float* weights, int64_t length) {
  float largest = 0;
  for (int64_t key = 0; key < length; ++key) {
    if (weights[key] > largest) largest = weights[key];
  }
  return std::min(exponent_of(largest), 0);
}

}  // namespace

KeyLists::KeyLists(const float* weights, int64_t batch, int64_t length, Which which)
    : stride_((length + padding - 1) / padding * padding) {
  // One allocation, so that there is one thing to release: counts, indices, weights, logarithms,
  // exponents, whether there are any.
  char* memory = static_cast<char*>(allocate(batch * (9 + 16 * stride_)));
  counts_ = reinterpret_cast<int64_t*>(memory);
  index_ = reinterpret_cast<int32_t*>(counts_ + batch);
  scaled_weight_ = reinterpret_cast<float*>(index_ + batch * stride_);
  log2_weight_ = scaled_weight_ + batch * stride_;
  exponent_ = log2_weight_ + batch * stride_;
  is_scaled_ = reinterpret_cast<bool*>(exponent_ + batch * stride_);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t start = b * stride_, count = 0;
    bool has_zeros = weights != nullptr && which == Which::zero;
    int beside = has_zeros ? exponent_beside(weights + b * length, length) : 0;
    is_scaled_[b] = false;
    for (int64_t key = 0; key < length; ++key) {
      float weight = weights == nullptr ? 1.0f : weights[b * length + key];
      if (which == Which::positive ? weight <= 0 : weight != 0) continue;
      int exponent = which == Which::positive ? exponent_of(weight) : beside;
      is_scaled_[b] |= exponent != 0;
      index_[start + count] = static_cast<int32_t>(key);
      exponent_[start + count] = static_cast<float>(exponent);
      scaled_weight_[start + count] = exponent == 0 ? weight : std::ldexp(weight, -exponent);
      log2_weight_[start + count] = weight == 1.0f ? 0.0f : std::log2(weight);
      ++count;
    }
    counts_[b] = count;
    std::fill(scaled_weight_ + start + count, scaled_weight_ + start + stride_, 0.0f);
    std::fill(exponent_ + start + count, exponent_ + start + stride_, 0.0f);
    std::fill(log2_weight_ + start + count, log2_weight_ + start + stride_,
              -std::numeric_limits<float>::infinity());
  }
}

KeyLists::~KeyLists() { release(counts_); }

KeyList KeyLists::of(int64_t b) const {
  int64_t start = b * stride_;
  return {counts_[b], index_ + start, scaled_weight_ + start, log2_weight_ + start,
          is_scaled_[b] ? exponent_ + start : nullptr};
}

}  // namespace tir::cpu
