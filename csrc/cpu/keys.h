// Which keys of each image are attended to, gathered so that the kernels see no others.
#pragma once

#include <cstdint>

namespace tir::cpu {

// Keys of one image in ascending order.
struct KeyList {
  int64_t count;
  const int32_t* index;
  const float* scaled_weight;  // weight / 2^exponent; 0 beyond `count`, up to a multiple of padding
  const float* log2_weight;    // of the weight itself; -inf beyond `count`
  const float* exponent;       // 0 beyond `count`; null where all are 0, as of ordinary weights
};

class KeyLists {
 public:
  static constexpr int64_t padding = 64;

  // weights: [B, L], or null for weights of 1. Lists the keys of positive weight, or else those of
  // weight exactly 0. A weight that is NaN belongs to the positive ones, where it makes the result
  // NaN.
  enum class Which { positive, zero };
  KeyLists(const float* weights, int64_t batch, int64_t length, Which which);
  ~KeyLists();
  KeyLists(const KeyLists&) = delete;
  KeyLists& operator=(const KeyLists&) = delete;

  KeyList of(int64_t batch) const;

 private:
  int64_t stride_;
  int64_t* counts_;
  int32_t* index_;
  float* scaled_weight_;
  float* log2_weight_;
  float* exponent_;
  bool* is_scaled_;
};

}  // namespace tir::cpu
