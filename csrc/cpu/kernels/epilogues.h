// What attention makes of products while they lie in registers.
#pragma once

#include "matrix.h"

namespace tir::cpu::TIR_ARCH {

// Probabilities in the type that is multiplied: values, or halves of units.
template <class Math>
using Probability = std::conditional_t<Math::values_per_unit == 1, float, uint16_t>;

template <class Math>
TIR_INLINE void write_probabilities(Probability<Math>* target, const Vec (&values)[1]) {
  if constexpr (Math::values_per_unit == 1) {
    store(target, values[0]);
  } else {
    store_bits(target, to_bfloat16(values[0]));
  }
}
template <class Math>
TIR_INLINE void write_probabilities(Probability<Math>* target, const Vec (&values)[2]) {
  if constexpr (Math::values_per_unit == 1) {
    store(target, values[0]);
    store(target + lanes, values[1]);
  } else {
    store_bits(target, Math::side_by_side(values[0], values[1]));
  }
}

// Whether scores become exponentials, and sums results, in the registers that they are summed up in:
// a store and one or two loads less for each. Tiles of a matrix unit lie in no such registers.
template <class Math>
constexpr bool has_epilogues = Math::row_multiple == 2;
// Whether those of two products do: of fewer rows, a vector of each would wait for its own sums.
template <class Math>
constexpr bool has_joint_epilogues = has_epilogues<Math> && max_tile_rows >= 12;

// Scores of a panel of keys become exponentials, relative to an integer near the largest exponent
// of the first panel, which this finds.
template <class Math, bool IsFirst>
struct ExponentialEpilogue {
  Probability<Math>* probabilities;
  int64_t stride;
  const float* log2_weights;
  float scale;        // of the scores, log2(e) included
  float* references;  // of each row
  float* offsets;     // what Math makes of them
  float* sums;        // a vector for each row

  // For the other panels of keys, whose first weights' logarithms these are.
  ExponentialEpilogue<Math, false> rest(const float* own_log2_weights) const {
    return {probabilities, stride, own_log2_weights, scale, references, offsets, sums};
  }

  TIR_INLINE ExponentialEpilogue at(int64_t row, int64_t column) const {
    return {probabilities + row * stride + column,
            stride,
            log2_weights + column,
            scale,
            references + row,
            offsets + row,
            sums + row * lanes};
  }

  template <int Rows, int Vectors, class Sums>
  TIR_INLINE void take(const Sums (&scores)[Rows][Vectors]) const {
    Vec scales = broadcast(scale), log2_weight[Vectors];
    TIR_UNROLL
    for (int v = 0; v < Vectors; ++v) log2_weight[v] = load(log2_weights + v * lanes);
    auto exponent = [&](int row, int v) {
      return multiply_add(whole(scores[row][v]), scales, log2_weight[v]);
    };
    if constexpr (IsFirst) {
      constexpr int group = Rows % 4 == 0 ? 4 : 2;
      TIR_UNROLL
      for (int first = 0; first < Rows; first += group) {
        Vec largest[group];
        TIR_UNROLL
        for (int r = 0; r < group; ++r) {
          largest[r] = exponent(first + r, 0);
          if constexpr (Vectors == 2) largest[r] = larger(exponent(first + r, 1), largest[r]);
        }
        float maxima[group];
        combine_each(largest, maxima, Largest());
        TIR_UNROLL
        for (int r = 0; r < group; ++r) {
          constexpr float integers = 12582912.0f;  // 1.5 * 2^23
          float reference = (maxima[r] + integers) - integers;
          references[first + r] = reference;
          offsets[first + r] = Math::offset_of(reference);
        }
      }
    }
    Probability<Math>* target = probabilities;
    float* row_sums = sums;
    TIR_UNROLL
    for (int r = 0; r < Rows; ++r) {
      Vec exponentials[Vectors], offset = broadcast(offsets[r]);
      TIR_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        exponentials[v] = Math::exp2_beyond(exponent(r, v), offset);
      }
      write_probabilities<Math>(target, exponentials);
      Vec sum = IsFirst ? exponentials[0] : load(row_sums) + exponentials[0];
      if constexpr (Vectors == 2) sum = sum + exponentials[1];
      store(row_sums, sum);
      row_sums += lanes;
      target += stride;
      keep_in_register(target);
    }
  }
};

// Sums times a factor, in the type of the results; added to those that lie in memory before.
template <class Math, bool Adds>
struct RowEpilogue {
  using Element = Probability<Math>;  // float32, or bfloat16 in halves of units
  Element* results;
  int64_t stride;
  int64_t rows, width;  // of what there is to write
  const float* factors;
  int64_t factor_stride;  // 1, or 0 for one factor of all rows
  const float* sums;
  int64_t sum_stride;

  TIR_INLINE RowEpilogue at(int64_t row, int64_t column) const {
    return {results + row * stride + column,
            stride,
            rows - row,
            width - column,
            factors + row * factor_stride,
            factor_stride,
            Adds ? sums + row * sum_stride + column : nullptr,
            sum_stride};
  }

  template <int Rows, int Vectors, class Sums>
  TIR_INLINE void take(const Sums (&tile)[Rows][Vectors]) const {
    Element* row = results;
    const float* row_sums = sums;
    TIR_UNROLL
    for (int r = 0; r < Rows; ++r) {
      if (r == Rows - 1 && rows < Rows) return;  // which was added for an even number
      Vec values[Vectors], factor = broadcast(factors[r * factor_stride]);
      TIR_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        Vec sum = whole(tile[r][v]);
        values[v] = (Adds ? load(row_sums + v * lanes) + sum : sum) * factor;
      }
      if (width >= Vectors * lanes) {
        write_probabilities<Math>(row, values);
      } else {
        TIR_UNROLL
        for (int v = 0; v < Vectors; ++v) write_first(row + v * lanes, values[v], v * lanes);
      }
      row += stride;
      keep_in_register(row);
      if (Adds) {
        row_sums += sum_stride;
        keep_in_register(row_sums);
      }
    }
  }

 private:
  TIR_INLINE void write_first(Element* target, Vec values, int64_t column) const {
    int64_t count = larger_of(0, smaller_of(lanes, width - column));
    if constexpr (Math::values_per_unit == 1) {
      store_first(target, values, count);
    } else {
      store_first(target, to_bfloat16(values), count);
    }
  }
};

// Whether results of a type are of the one that is multiplied.
template <class Math>
constexpr bool is_own_type(Type type) {
  return type == (Math::values_per_unit == 1 ? Type::float32 : Type::bfloat16);
}

}  // namespace tir::cpu::TIR_ARCH
