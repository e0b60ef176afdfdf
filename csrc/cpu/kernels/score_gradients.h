// From scores and the gradients of probabilities to probabilities and the gradients of scores.
#pragma once

#include "attention.h"

namespace tir::cpu::TIR_ARCH {

constexpr float max_power_of_two = max_exponent * log2_e;

// Where probabilities and gradients of scores go, for rows of queries and columns of keys.
//
// Paired values are needed with neighbouring queries in a unit, for the gradients of keys and
// values, and gradients of scores with neighbouring keys in a unit, for those of the queries.
template <class Math>
struct ScoreRows {
  typename Math::Unit *probabilities, *grad_scores, *grad_pairs;
  int64_t stride;

  // Rows in pairs.
  TIR_INLINE ScoreRows at(int64_t row, int64_t column) const {
    int64_t place = row / Math::values_per_unit * stride + column;
    auto* pairs = Math::values_per_unit == 1 ? nullptr : grad_pairs + (row * stride + column) / 2;
    return {probabilities + place, grad_scores + place, pairs, stride};
  }

  // A vector of keys for two queries; then it is at the next two.
  TIR_INLINE void write(const Vec (&probability_rows)[2], const Vec (&grad_rows)[2]) {
    if constexpr (Math::values_per_unit == 2) {
      UintVec grads = Math::side_by_side(grad_rows[0], grad_rows[1]);
      Math::store_halves(grad_pairs, grad_pairs + stride / 2, grads);
      store_bits(grad_scores, Math::paired(grads));
      store_bits(probabilities,
                 Math::paired(Math::side_by_side(probability_rows[0], probability_rows[1])));
      grad_pairs += stride;
      grad_scores += stride;
      probabilities += stride;
    } else {
      for (int i = 0; i < 2; ++i) {
        store(probabilities, probability_rows[i]);
        store(grad_scores, grad_rows[i]);
        probabilities += stride;
        grad_scores += stride;
      }
    }
  }
};

// What is known of a tile of queries and a block of keys, whichever of both it begins with.
template <class Math>
struct ScoreGradients {
  ScoreRows<Math> targets;
  const float *exponent_offsets, *deltas;  // of each query
  int64_t first_query;
  const float *weights, *exponents;  // of each key; no exponents where all are 0
  const int32_t* key_index;
  float* weight_sums;
  float scale;  // of the scores, log2(e) included

  TIR_INLINE ScoreGradients at(int64_t row, int64_t column) const {
    return {targets.at(row, column),
            exponent_offsets + row,
            deltas + row,
            first_query + row,
            weights + column,
            exponents == nullptr ? nullptr : exponents + column,
            key_index + column,
            weight_sums + column,
            scale};
  }
};

// Finds them for one vector of keys after the other, two queries at a time.
template <class Math, bool WantsWeights, bool MayBeScaled, bool IsCausal>
struct ScoreGradientEpilogue {
  ScoreGradients<Math> known;

  TIR_INLINE ScoreGradientEpilogue at(int64_t row, int64_t column) const {
    return {known.at(row, column)};
  }

  // Scores and gradients of probabilities in registers.
  template <int Rows, class Sums>
  TIR_INLINE void take(const Sums (&scores)[Rows][1], const Sums (&grads)[Rows][1]) const {
    Column column(known);
    TIR_UNROLL
    for (int row = 0; row < Rows; row += 2) {
      column.take(row, {whole(scores[row][0]), whole(scores[row + 1][0])},
                  {whole(grads[row][0]), whole(grads[row + 1][0])});
    }
    column.finish();
  }

  // Those that lie in memory.
  TIR_INLINE void take_rows(int64_t count, const float* scores, const float* grads,
                            int64_t stride) const {
    Column column(known);
    for (int64_t row = 0; row < count; row += 2) {
      column.take(row, {load(scores), load(scores + stride)}, {load(grads), load(grads + stride)});
      scores += 2 * stride;
      grads += 2 * stride;
    }
    column.finish();
  }

 private:
  class Column {
   public:
    TIR_INLINE explicit Column(const ScoreGradients<Math>& known)
        : known_(known),
          target_(known.targets),
          weights_(load(known.weights)),
          scale_(broadcast(known.scale)),
          weight_sum_(zero()) {}

    TIR_INLINE void take(int64_t row, const Vec (&scores)[2], const Vec (&grad_probabilities)[2]) {
      Vec probabilities[2], grad_scores[2];
      TIR_UNROLL
      for (int i = 0; i < 2; ++i) {
        Vec exponents =
            multiply_add(scores[i], scale_, broadcast(known_.exponent_offsets[row + i]));
        if (MayBeScaled && known_.exponents != nullptr) {
          exponents = exponents + load(known_.exponents);
        }
        if (IsCausal) {
          exponents = without_later_keys(exponents, known_.key_index, known_.first_query + row + i);
        }
        // smaller() keeps a NaN in its second argument.
        exponents = smaller(broadcast(max_power_of_two), exponents);
        Vec per_weight = Math::exp2(exponents);  // probability / scaled weight
        Vec grads = grad_probabilities[i] - broadcast(known_.deltas[row + i]);
        probabilities[i] = per_weight * weights_;
        grad_scores[i] = probabilities[i] * grads;
        if (WantsWeights) weight_sum_ = multiply_add(per_weight, grads, weight_sum_);
      }
      target_.write(probabilities, grad_scores);
    }

    TIR_INLINE void finish() const {
      if (WantsWeights) store(known_.weight_sums, load(known_.weight_sums) + weight_sum_);
    }

   private:
    const ScoreGradients<Math>& known_;
    ScoreRows<Math> target_;
    Vec weights_, scale_, weight_sum_;
  };
};

}  // namespace tir::cpu::TIR_ARCH
