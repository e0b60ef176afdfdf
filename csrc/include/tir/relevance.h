// Relevance of patch tokens to classes, and the token weights that follow from it.
#pragma once

#include "tir/types.h"

namespace tir {

struct Relevance {
  int64_t batch;              // B
  int64_t length;             // L, prefix tokens included
  int64_t num_prefix_tokens;  // P; N = L - P patch tokens have a relevance
  int64_t model_dim;          // D
  int64_t joint_dim;          // E; equals D without a projection
  int64_t num_groups;         // G, divides B
  int64_t num_classes;        // C

  Type token_type;
  RowGrid tokens;          // [B, L, D]; the head stride is not used
  Array class_embeddings;  // [G, C, E], contiguous
  bool has_norm;           // LayerNorm before the projection?
  Array norm_weight;       // [D], or null for 1
  Array norm_bias;         // [D], or null for 0; of the type of norm_weight
  float norm_eps;
  Array proj;                                   // [D, E], or null for none
  int64_t proj_row_stride, proj_column_stride;  // one of them is 1

  float* relevance;  // [B, C, N]
};

struct Selection {
  int64_t batch, num_classes, num_patches, num_prefix_tokens;  // B, C, N, P
  int64_t top_k;           // tokens that each class selects
  const float* relevance;  // [B, C, N]
  const float* table;      // [C + 1]
  int32_t* counts;         // [B, N]
  float* weights;          // [B, P + N]
};

// The weights alone, of tokens that were counted before.
struct WeightLookUp {
  int64_t batch, num_patches, num_prefix_tokens;  // B, N, P
  const float* table;                             // [C + 1]
  const int32_t* counts;                          // [B, N]
  float* weights;                                 // [B, P + N]
};

}  // namespace tir
