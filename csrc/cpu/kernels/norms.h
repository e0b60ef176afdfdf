// Norms of rows, and rows brought to where their squares do not leave float32's range.
#pragma once

#include "rows.h"
#include "tir/rules.h"

namespace tir::cpu::TIR_ARCH {

// A sum over the whole vectors of `count` values, of which add(sum, i) adds the one at i, in chains
// that need not wait for each other.
template <class Add>
TIR_INLINE Vec sum_in_chains(int64_t count, Add add) {
  constexpr int chains = 4;
  Vec sums[chains] = {};
  int64_t i = 0;
  for (; i + chains * lanes <= count; i += chains * lanes) {
    TIR_UNROLL
    for (int c = 0; c < chains; ++c) sums[c] = add(sums[c], i + c * lanes);
  }
  for (; i + lanes <= count; i += lanes) sums[0] = add(sums[0], i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline float norm_of(const float* values, int64_t count) {
  Vec squares = sum_in_chains(count, [&](Vec sum, int64_t i) {
    return multiply_add(load(values + i), load(values + i), sum);
  });
  int64_t rest = count % lanes;
  Vec last = load_first(values + count - rest, rest);
  return __builtin_sqrtf(sum_of(multiply_add(last, last, squares)));
}

// The largest magnitude; infinite or NaN where a value is.
inline float largest_magnitude(const float* values, int64_t count) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    float magnitude = __builtin_fabsf(values[i]);
    if (magnitude != magnitude) return magnitude;
    if (magnitude > largest) largest = magnitude;
  }
  return largest;
}

// Scales values, of which `largest` is the largest magnitude, to where the sum of their squares
// fits float32 with room to spare: by a power of two, which is returned and rounds nothing.
inline float rescale(float* values, int64_t count, float largest) {
  constexpr int wanted_exponent = 40, largest_exponent = 120;
  uint32_t bits;
  memcpy(&bits, &largest, sizeof bits);
  int64_t exponent = wanted_exponent - (static_cast<int64_t>(bits >> 23) - 127);
  uint32_t factor_bits = static_cast<uint32_t>(smaller_of(exponent, largest_exponent) + 127) << 23;
  float factor = load_bits<float>(&factor_bits);
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
  return factor;
}

// |values| + cosine_eps: what the cosine divides by, for values multiplied by `factor`. Values
// whose squares leave float32's range are scaled in place, and the result with them.
inline float cosine_divisor(float* values, int64_t count, float factor) {
  constexpr float smallest = 8.8817841970012523e-16f;  // 2^-50
  constexpr float largest = 1.125899906842624e15f;      // 2^50
  float norm = norm_of(values, count);
  if (!(norm > smallest && norm < largest)) {
    float magnitude = largest_magnitude(values, count);
    if (magnitude > 0 && magnitude < __builtin_inff()) {
      factor *= rescale(values, count, magnitude);
      norm = norm_of(values, count);
    }
  }
  return norm + cosine_eps * factor;
}

}  // namespace tir::cpu::TIR_ARCH
