// Which tokens a class selects, what a count is worth, and constants: one source for every device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TIR_HOST_DEVICE __host__ __device__
#else
#define TIR_HOST_DEVICE
#endif

namespace tir {

constexpr float cosine_eps = 1e-8f;    // added to both norms of the cosine
constexpr float max_exponent = 88.0f;  // exp() of more overflows float32
constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

// Maps relevance to integers in selection order: a larger key is selected earlier. NaN comes after
// every number and -0 equals +0, which neither the floats nor their bits would give by themselves.
TIR_HOST_DEVICE inline uint32_t selection_key(float relevance) {
  if (relevance != relevance) return 0;
  if (relevance == 0.0f) return 0x80000000u;
  uint32_t bits;
  memcpy(&bits, &relevance, sizeof bits);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// The order of selection is total: equal relevance goes to the token that comes first.
TIR_HOST_DEVICE inline bool is_selected_before(uint32_t key, int64_t index, uint32_t other_key,
                                               int64_t other_index) {
  return key != other_key ? key > other_key : index < other_index;
}

// Where one class stops selecting: every token above `key`, and the first `ties` tokens at `key`.
struct SelectionCut {
  uint32_t key;
  int64_t ties;
};

// Whether a token is selected, given how many earlier tokens have the key of the cut.
TIR_HOST_DEVICE inline bool is_selected(uint32_t key, SelectionCut cut, int64_t earlier_ties) {
  return key > cut.key || (key == cut.key && earlier_ties < cut.ties);
}

// The weight of a token of the whole sequence, whose first tokens are prefix tokens of weight 1.
TIR_HOST_DEVICE inline float token_weight(int64_t token, int64_t num_prefix_tokens,
                                          const int32_t* counts, const float* table) {
  return token < num_prefix_tokens ? 1.0f : table[counts[token - num_prefix_tokens]];
}

}  // namespace tir
