// Products of float32 by tensor cores, as accurate as without them.
#pragma once

#include "cuda/device.cuh"

namespace tir::cuda {

// A float32 as the sum of two numbers with significands of 11 bits, which tensor cores take, to
// within 2^-23 of it, or 2^-136 where it is tiny. The large one is rounded to nearest; what of the
// small one is cut off is its last bit. NaN and infinity make the small one NaN; a number within
// 2^-12 of the largest float32 makes products NaN.
struct Parts {
  uint32_t large, small;
};

TIR_DEVICE Parts split(uint32_t bits) {
  constexpr uint32_t kTaken = 0xffffe000;
  uint32_t large = (bits + 0x1000) & kTaken;
  return {large, __float_as_uint(__uint_as_float(bits) - __uint_as_float(large)) & kTaken};
}

// total (16 x 8) += left (16 x 8) right (8 x 8), as multiply_add_tf32 lays them out. The product of
// small parts, at most 2^-22 of the whole, is left out. Tensor cores cut sums off where others round
// them, and errors that all point to 0 add up; so they sum one product only, its least part first.
template <>
TIR_DEVICE void multiply_add<float>(float (&total)[4], const uint32_t (&left)[4], uint32_t right_0,
                                    uint32_t right_1) {
  uint32_t large[4], small[4];
  TIR_UNROLL
  for (int i = 0; i < 4; ++i) {
    Parts parts = split(left[i]);
    large[i] = parts.large, small[i] = parts.small;
  }
  Parts first = split(right_0), second = split(right_1);
  float sum[4] = {};
  multiply_add_tf32(sum, small, first.large, second.large);
  multiply_add_tf32(sum, large, first.small, second.small);
  multiply_add_tf32(sum, large, first.large, second.large);
  TIR_UNROLL
  for (int e = 0; e < 4; ++e) total[e] += sum[e];
}

}  // namespace tir::cuda
