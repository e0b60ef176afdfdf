// What the backward pass knows of the keys that a warp holds, 16 or 32: their weights, and the sums
// for the gradients of these.
#pragma once

#include "cuda/heads.cuh"

namespace tir::cuda {

constexpr float kMaxPowerOfTwo = max_exponent * log2_e;

// Of every 16 keys a lane has a part in two, lane / 4 and lane / 4 + 8.
template <int kHeld>
struct HeldKeys {
  const float* given;
  const KeyWeights& derived;
  int batch, length, first, lane;  // of the image's keys; of the warp's

  float shifts[kHeld][2], sums[kHeld][2];
  int attended;  // a bit for each of them

  // The lane's place among 16 keys is found anew, as weights are read again at the end: between,
  // they and what is found from them would only take registers.
  TIR_DEVICE int own() const { return anew(first) + anew(lane) / 4; }

  // One that does not exist is as one of weight 0.
  TIR_DEVICE float weight(int key) const {
    if (key >= length) return 0.0f;
    int image = anew(batch);
    return key_weight(given, derived, stored_counts(derived, image, length), image, length, key);
  }

  // Whether keys are attended to, those of bit 2 m + r.
  TIR_DEVICE int attention() const { return anew(attended); }

  TIR_DEVICE void begin() {
    int key = own();
    float weights[kHeld][2];  // all on their way before the first is used
    TIR_UNROLL
    for (int i = 0; i < 2 * kHeld; ++i) weights[i / 2][i % 2] = weight(key + 8 * i);
    attended = 0;
    TIR_UNROLL
    for (int i = 0; i < 2 * kHeld; ++i) {
      int m = i / 2, r = i % 2;
      bool has_weight = is_attended(weights[m][r]);
      // Without attention the shift is that of weight 1: the derivative by the weight itself has a
      // limit at 0. What such a key sums up for key and value is dropped at the end.
      shifts[m][r] = has_weight ? log2f(weights[m][r]) : 0.0f;
      if (has_weight) attended |= 1 << i;
      sums[m][r] = 0.0f;
    }
  }

  template <int N>
  TIR_DEVICE void add(const float (&grads)[kHeld][N][4]) {
    TIR_UNROLL
    for (int j = 0; j < N; ++j) {
      TIR_UNROLL
      for (int m = 0; m < kHeld; ++m) {
        TIR_UNROLL
        for (int e = 0; e < 4; ++e) sums[m][e / 2] += grads[m][j][e];
      }
    }
  }

  // Writes the gradients of the head's weights, one a key, where `partial` [B, H, L] is not null.
  TIR_DEVICE void write(float* partial, int64_t head_index) const {
    if (partial == nullptr) return;
    int of_lane = own();
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      TIR_UNROLL
      for (int r = 0; r < 2; ++r) {
        int key = of_lane + m * kRows + 8 * r;
        float sum = quad_sum(sums[m][r]), found = weight(key);
        if (is_attended(found)) sum /= found;
        if (lane % 4 == 0 && key < length) {
          partial[head_index * length + key] = found < 0.0f ? 0.0f : sum;
        }
      }
    }
  }

  // Forgets what was summed up for keys that are not attended to.
  template <int N>
  TIR_DEVICE void drop_unattended(float (&totals)[kHeld][N][4]) const {
    int kept = attention();
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      TIR_UNROLL
      for (int r = 0; r < 2; ++r) {
        if ((kept >> (2 * m + r) & 1) != 0) continue;
        TIR_UNROLL
        for (int j = 0; j < N; ++j) totals[m][j][2 * r] = totals[m][j][2 * r + 1] = 0.0f;
      }
    }
  }
};

}  // namespace tir::cuda
