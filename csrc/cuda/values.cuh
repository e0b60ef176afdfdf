// Elements of any type, and vectors of them, as float32.
#pragma once

#include "cuda/tile.cuh"
#include "tir/types.h"

namespace tir::cuda {

// The sum over a warp, in every lane.
TIR_DEVICE float warp_sum(float value) {
  TIR_UNROLL
  for (int flip = kWarp / 2; flip > 0; flip /= 2) value += __shfl_xor_sync(kAllLanes, value, flip);
  return value;
}

// One 16-byte vector of elements.
template <class T>
TIR_DEVICE void read_vector(float (&values)[kVector<T>], const T* source) {
  if constexpr (kHasTensorCores<T>) {
    uint4 packed = *reinterpret_cast<const uint4*>(source);
    uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    TIR_UNROLL
    for (int e = 0; e < 8; ++e) {
      values[e] = to_float(T{static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)))});
    }
  } else {
    float4 four = *reinterpret_cast<const float4*>(source);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  }
}

template <class T>
TIR_DEVICE void write_vector(T* target, const float (&values)[kVector<T>]) {
  if constexpr (kHasTensorCores<T>) {
    *reinterpret_cast<uint4*>(target) = {
        pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
        pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
  } else {
    *reinterpret_cast<float4*>(target) = {values[0], values[1], values[2], values[3]};
  }
}

TIR_DEVICE float read_element(const Array& array, int64_t index) {
  if (array.type == Type::float32) return static_cast<const float*>(array.data)[index];
  uint16_t bits = static_cast<const uint16_t*>(array.data)[index];
  return array.type == Type::float16 ? to_float(float16{bits}) : to_float(bfloat16{bits});
}

// Elements `first` and following. Only `count` of them exist, zeros stand for the others; where
// they are aligned, to 16 bytes, all or none exist.
template <int kCount>
TIR_DEVICE void read_elements(float (&values)[kCount], const Array& array, int64_t first, int count,
                              bool is_aligned) {
  if constexpr (kCount % 4 == 0) {
    if (is_aligned && count > 0 && array.type == Type::float32) {
      auto* source = static_cast<const float*>(array.data) + first;
      TIR_UNROLL
      for (int e = 0; e < kCount; e += 4) {
        float4 four = *reinterpret_cast<const float4*>(source + e);
        values[e] = four.x, values[e + 1] = four.y, values[e + 2] = four.z, values[e + 3] = four.w;
      }
      return;
    }
  }
  if constexpr (kCount == 8) {
    if (is_aligned && count > 0) {
      if (array.type == Type::float16) {
        read_vector<float16>(values, static_cast<const float16*>(array.data) + first);
      } else {
        read_vector<bfloat16>(values, static_cast<const bfloat16*>(array.data) + first);
      }
      return;
    }
  }
  TIR_UNROLL
  for (int e = 0; e < kCount; ++e) {
    values[e] = e < count ? read_element(array, first + e) : 0.0f;
  }
}

}  // namespace tir::cuda
