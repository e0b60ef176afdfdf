// Launchers of the CUDA kernels. They run on the current device, return at once, and throw
// std::runtime_error, naming the operator, where CUDA refuses.
#pragma once

#include <string>

#include "tir/attention.h"
#include "tir/relevance.h"

namespace tir::cuda {

using Stream = void*;

constexpr int64_t kMaxHeadDim = 128;

// Where the weights of keys come from, if not from AttentionForward::weights: they are looked up in
// a table by counts.
struct KeyWeights {
  const float* table;         // [C + 1], or null where the weights are given
  const int32_t* counts;      // [B, N]
  int64_t num_prefix_tokens;  // P
};

// The CUDA runtime that the kernels were linked with, which need not be PyTorch's.
struct Runtime {
  int version;         // 13000 for CUDA 13.0
  int driver_version;  // the newest CUDA that the driver serves; 0 without a driver
  std::string error;   // why it finds no devices, or empty
};

Runtime runtime();

void attention_forward(const AttentionForward& arguments, const KeyWeights& derived,
                       Stream stream);

// `delta` [B, H, Lq] and, where the weights' gradient is wanted, `partial` [B, H, L] are room to
// work in.
void attention_backward(const AttentionBackward& arguments, const KeyWeights& derived,
                        float* delta, float* partial, Stream stream);

// `softmax` [B, H, Lq, 2] is room to work in.
void attention_statistics(const AttentionStatistics& arguments, float* softmax, Stream stream);

void relevance(const Relevance& arguments, Stream stream);

// `weights` may be null where only counts are wanted.
void select_tokens(const Selection& arguments, Stream stream);

}  // namespace tir::cuda
