// What training adapters needs beside attention: dropout from counted random numbers, and the
// activation of a frozen layer.
#pragma once

#include "tir/types.h"

namespace tir {

// Rows for several branches, each with dropout of its own.
//
// Whether a channel is kept depends on (seed of the group, stream, branch, step, sequence in its
// group, position, channel) and nothing else: no state, no order, no other group. A block of 8
// channels that lie `blocks` apart shares one draw of Philox4x32-10.
struct PhiloxDropout {
  int64_t groups;     // G
  int64_t branches;   // K
  int64_t sequences;  // S, of a group
  int64_t length;     // T
  int64_t channels;   // D
  Array rows;            // [G, S, T, D], contiguous
  const int64_t* seeds;  // [G]
  int64_t step;
  uint32_t stream;        // below 2^8
  uint32_t first_branch;  // first_branch + K at most 2^8
  uint32_t threshold;     // a channel is kept where 16 random bits are at least this
  float scale;            // of what is kept
  Type output_type;
  void* output;  // [G, K, S, T, D], contiguous
};

constexpr int64_t channels_per_draw = 8;

enum class ActivationKind : int { gelu = 0, quick_gelu = 1, gelu_tanh = 2 };

// act(hidden + bias), or the gradient of it where there is one of the output.
struct Activation {
  ActivationKind kind;
  int64_t rows;      // R
  int64_t channels;  // D
  Type type;         // of hidden, grad_output and output
  const void* hidden;       // [R, D], contiguous
  Array bias;               // [D], or null
  const void* grad_output;  // [R, D], contiguous; null for the forward pass
  void* output;             // [R, D]: the activation, or the gradient of hidden
};

}  // namespace tir
