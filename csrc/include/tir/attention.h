// Weighted attention: softmax over keys whose exponentials are multiplied by a weight per key.
#pragma once

#include "tir/types.h"

namespace tir {

// B, H, Lq, L and d below.
struct AttentionShape {
  int64_t batch;
  int64_t heads;
  int64_t queries;
  int64_t length;  // of the keys
  int64_t head_dim;
  Type type;       // of queries, keys, values, outputs and their gradients
  float scale;     // of the scores
  bool is_causal;  // query i attends to the keys j <= i alone
};

struct AttentionForward {
  AttentionShape shape;
  RowGrid query;         // [B, H, Lq, d]
  RowGrid key, value;    // [B, H, L, d]
  const float* weights;  // [B, L], or null: then 1, or found by the launcher
  ResultGrid output;     // [B, H, Lq, d]
  float* log_sum_exp;    // [B, H, Lq]
};

// Results are [B, H, L] by the key, [B, H, Lq] by the query.
struct AttentionStatistics {
  AttentionShape shape;
  RowGrid query;                // [B, H, Lq, d]
  RowGrid key;                  // [B, H, L, d]
  const float* weights;         // [B, L], or null for 1
  int64_t num_prefix_tokens;    // P of the queries
  float* received_from_prefix;  // mean over the queries i < P of the attention to the key, or 0
  float* received_from_patches; // mean over the queries i >= P, or 0
  float* entropy;               // of the query's attention, natural; 0 where it attends to nothing
  float* log_sum_exp;
};

struct AttentionBackward {
  AttentionShape shape;
  RowGrid grad_output;         // [B, H, Lq, d]
  RowGrid query;               // [B, H, Lq, d]
  RowGrid key, value;          // [B, H, L, d]
  const float* weights;        // [B, L], or null as above
  RowGrid output;              // [B, H, Lq, d]
  const float* log_sum_exp;    // [B, H, Lq]
  ResultGrid grad_query;       // [B, H, Lq, d]
  ResultGrid grad_key;         // [B, H, L, d]
  ResultGrid grad_value;       // [B, H, L, d]
  float* grad_weights;         // [B, L], or null where it is not wanted
};

}  // namespace tir
