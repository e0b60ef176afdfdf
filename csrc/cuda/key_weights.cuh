// The weights of an image's keys as the attention kernels use them: base-2 logarithms to add to the
// scores.
#pragma once

#include "cuda/device.cuh"
#include "tir/cuda.h"
#include "tir/rules.h"

namespace tir::cuda {

// A weight below this acts as 0: its logarithm may not be taken with denormals flushed. NaN is not
// below it, and shows.
constexpr float kSmallestWeight = 1.1754943508222875e-38f;

TIR_DEVICE bool is_attended(float weight) { return !(weight < kSmallestWeight); }

// The weight of one token, from wherever weights come; `counts` are the image's.
TIR_DEVICE float key_weight(const float* weights, const KeyWeights& derived,
                            const int32_t* counts, int64_t batch, int length, int token) {
  if (derived.table == nullptr) return weights[batch * length + token];
  return token_weight(token, derived.num_prefix_tokens, counts, derived.table);
}

// The counts of an image that lie in memory, or null.
TIR_DEVICE const int32_t* stored_counts(const KeyWeights& derived, int64_t batch, int length) {
  if (derived.table == nullptr) return nullptr;
  return derived.counts + batch * (length - derived.num_prefix_tokens);
}

}  // namespace tir::cuda
