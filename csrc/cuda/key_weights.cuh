// The weights of an image's keys as the attention kernels use them: base-2 logarithms to add to the
// scores.
#pragma once

#include "cuda/selection.cuh"
#include "tir/cuda.h"

namespace tir::cuda {

// A weight below this acts as 0: its logarithm may not be taken with denormals flushed. NaN is not
// below it, and shows.
constexpr float kSmallestWeight = 1.1754943508222875e-38f;

TIR_DEVICE bool is_attended(float weight) { return !(weight < kSmallestWeight); }

// Bytes of shared memory in which an image's counts can be found by `warps` warps.
inline int64_t selection_scratch(int64_t num_patches, int warps) {
  return (warps + 1) * num_patches * 4;
}

// Finds the counts of one image in `scratch`, all threads of the block together. Ends with a
// barrier; returns the counts.
TIR_DEVICE const int32_t* find_counts(const float* relevance, int num_classes, int num_patches,
                                      int top_k, void* scratch) {
  int32_t* counts = static_cast<int32_t*>(scratch);
  int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  int warp = thread / kWarp, warps = threads / kWarp, lane = thread % kWarp;
  uint32_t* keys = static_cast<uint32_t*>(scratch) + (warp + 1) * num_patches;
  for (int n = thread; n < num_patches; n += threads) counts[n] = 0;
  __syncthreads();
  auto key_of = [&](int n) { return keys[n]; };
  for (int c = warp; c < num_classes; c += warps) {
    const float* row = relevance + static_cast<int64_t>(c) * num_patches;
    for (int n = lane; n < num_patches; n += kWarp) keys[n] = selection_key(row[n]);
    __syncwarp();
    SelectionCut cut = find_cut(key_of, num_patches, top_k, lane);
    select_by(cut, key_of, num_patches, lane, [&](int n) { atomicAdd(&counts[n], 1); });
    __syncwarp();
  }
  __syncthreads();
  return counts;
}

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
