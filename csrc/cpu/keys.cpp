#include "keys.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "parallel.h"

namespace tir::cpu {
namespace {

// The power of two by which an image's weights are divided.
int exponent_of(const float* weights, int64_t length) {
  constexpr int ordinary = 60, largest_power = 120;
  float largest = 0;
  for (int64_t key = 0; key < length; ++key) {
    if (weights[key] > largest) largest = weights[key];
  }
  if (largest == 0 || !std::isfinite(largest)) return 0;
  int exponent = std::ilogb(largest);
  if (std::abs(exponent) <= ordinary) return 0;
  return std::clamp(exponent, -largest_power, largest_power);
}

}  // namespace

KeyLists::KeyLists(const float* weights, int64_t batch, int64_t length, Which which)
    : stride_((length + padding - 1) / padding * padding) {
  // One allocation, so that there is one thing to release: counts, exponents, indices,
  // weights, logarithms.
  char* memory = static_cast<char*>(allocate(batch * (12 + 12 * stride_)));
  counts_ = reinterpret_cast<int64_t*>(memory);
  exponents_ = reinterpret_cast<int32_t*>(counts_ + batch);
  index_ = exponents_ + batch;
  scaled_weight_ = reinterpret_cast<float*>(index_ + batch * stride_);
  log2_weight_ = scaled_weight_ + batch * stride_;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t start = b * stride_, count = 0;
    exponents_[b] = weights == nullptr ? 0 : exponent_of(weights + b * length, length);
    float factor = std::ldexp(1.0f, -exponents_[b]);
    for (int64_t key = 0; key < length; ++key) {
      float weight = weights == nullptr ? 1.0f : weights[b * length + key];
      if (which == Which::positive ? weight <= 0 : weight != 0) continue;
      index_[start + count] = static_cast<int32_t>(key);
      scaled_weight_[start + count] = weight * factor;
      log2_weight_[start + count] = weight == 1.0f ? 0.0f : std::log2(weight);
      ++count;
    }
    counts_[b] = count;
    std::fill(scaled_weight_ + start + count, scaled_weight_ + start + stride_, 0.0f);
    std::fill(log2_weight_ + start + count, log2_weight_ + start + stride_,
              -std::numeric_limits<float>::infinity());
  }
}

KeyLists::~KeyLists() { release(counts_); }

KeyList KeyLists::of(int64_t b) const {
  int64_t start = b * stride_;
  return {counts_[b], index_ + start, scaled_weight_ + start, log2_weight_ + start,
          exponents_[b]};
}

}  // namespace tir::cpu
