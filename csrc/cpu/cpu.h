// The CPU kernels as the binding layer sees them.
#pragma once

#include <string>
#include <vector>

#include "tir/adapters.h"
#include "tir/attention.h"
#include "tir/relevance.h"

namespace tir::cpu {

// One instruction set's build of the kernels.
struct Kernels {
  void (*attention_forward)(const AttentionForward&, int threads);
  void (*attention_backward)(const AttentionBackward&, int threads);
  void (*attention_statistics)(const AttentionStatistics&, int threads);
  void (*relevance)(const Relevance&, int threads);
  void (*philox_dropout)(const PhiloxDropout&, int threads);
  void (*activation)(const Activation&, int threads);
};

struct Architecture {
  const char* name;
  Kernels kernels;
  bool is_supported;  // by this machine
};

// From the plainest to the fastest; only what the compiler could build.
const std::vector<Architecture>& architectures();

// The fastest that the machine runs, unless TIR_CPU_ARCH or use_architecture() asks for another.
const Architecture& architecture();

// Throws std::invalid_argument for a name that is unknown, not built or not supported here.
void use_architecture(const std::string& name);

// Counts and weights from relevance: integer work, the same on every instruction set.
void select_tokens(const Selection&, int threads);
// The same from relevance that has yet to be found, by a kernel, and lies in memory of its own.
void token_weights(void (*relevance)(const Relevance&, int threads), const Relevance&,
                   const Selection&, int threads);
void look_up_weights(const WeightLookUp&);

}  // namespace tir::cpu
