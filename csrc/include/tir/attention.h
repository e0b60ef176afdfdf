// Weighted attention: softmax over keys whose exponentials are multiplied by a weight per key.
#pragma once

#include "tir/types.h"

namespace tir {

// B, H, L and d below.
struct AttentionShape {
  int64_t batch;
  int64_t heads;
  int64_t length;
  int64_t head_dim;
  Type type;    // of queries, keys, values, outputs and their gradients
  float scale;  // of the scores
};

struct AttentionForward {
  AttentionShape shape;
  RowGrid query, key, value;  // [B, H, L, d]
  const float* weights;       // [B, L], or null: then 1, or found by the launcher
  void* output;               // [B, H, L, d], contiguous
  float* log_sum_exp;         // [B, H, L]
};

// Results are [B, H, L]: two per key, two per query.
struct AttentionStatistics {
  AttentionShape shape;
  RowGrid query, key;           // [B, H, L, d]
  const float* weights;         // [B, L], or null for 1
  int64_t num_prefix_tokens;    // P
  float* received_from_prefix;  // mean over the queries i < P of the attention to the key, or 0
  float* received_from_patches; // mean over the queries i >= P, or 0
  float* entropy;               // of the query's attention, natural; 0 where it attends to nothing
  float* log_sum_exp;
};

struct AttentionBackward {
  AttentionShape shape;
  RowGrid grad_output;         // [B, H, L, d]
  RowGrid query, key, value;   // [B, H, L, d]
  const float* weights;        // [B, L], or null as above
  RowGrid output;              // [B, H, L, d]
  const float* log_sum_exp;    // [B, H, L]
  void* grad_query;            // [B, H, L, d], contiguous
  void* grad_key;              // [B, H, L, d], contiguous
  void* grad_value;            // [B, H, L, d], contiguous
  float* grad_weights;         // [B, L], or null where it is not wanted
};

}  // namespace tir
