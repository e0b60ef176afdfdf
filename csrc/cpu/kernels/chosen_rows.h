// Products of a few queries with rows that lie as they are in memory.
#pragma once

#include "rows.h"

namespace tir::cpu::TIR_ARCH {

// Rows of a (batch, head) that keys were chosen of.
template <class Row>
struct ChosenRows {
  using Element = typename Row::Element;
  const Element* first;
  int64_t stride;
  const int32_t* index;
  int64_t count;
  int64_t width;

  // That of the last one behind it.
  TIR_INLINE const Element* at(int64_t i) const {
    return first + index[smaller_of(i, count - 1)] * stride;
  }

  // Asks for a row, if it is one.
  TIR_INLINE void expect(int64_t i) const {
    if (i >= count) return;
    const Element* row = at(i);
    for (int64_t j = 0; j < width; j += 64 / sizeof(Element)) __builtin_prefetch(row + j);
  }
};

// The products of some queries with four rows.
template <class Row, int Queries>
TIR_INLINE void multiply_four(const ChosenRows<Row>& rows, int64_t first, const float* queries,
                              int64_t query_stride, float* products, int64_t product_stride) {
  const typename Row::Element* own[4];
  TIR_UNROLL
  for (int i = 0; i < 4; ++i) own[i] = rows.at(first + i);
  multiply_rows<Row, Queries>(own, rows.width, queries, query_stride, products + first,
                              product_stride);
}

// Sums of rows times factors, one for each query and row, added to `sums`; asks for other rows.
template <class Row, int Queries, int Vectors, class Read>
TIR_INLINE void add_columns(const ChosenRows<Row>& rows, int64_t column, const float* factors,
                            int64_t factor_stride, float* sums, int64_t sum_stride, Read read,
                            const ChosenRows<Row>& expected) {
  Vec own[Queries][Vectors];
  TIR_UNROLL
  for (int q = 0; q < Queries; ++q) {
    TIR_UNROLL
    for (int v = 0; v < Vectors; ++v) own[q][v] = zero();
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    expected.expect(i);
    const auto* row = rows.at(i) + column;
    Vec values[Vectors];
    TIR_UNROLL
    for (int v = 0; v < Vectors; ++v) values[v] = read(row + v * lanes);
    TIR_UNROLL
    for (int q = 0; q < Queries; ++q) {
      Vec factor = broadcast(factors[q * factor_stride + i]);
      TIR_UNROLL
      for (int v = 0; v < Vectors; ++v) own[q][v] = multiply_add(factor, values[v], own[q][v]);
    }
  }
  TIR_UNROLL
  for (int q = 0; q < Queries; ++q) {
    TIR_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      float* place = sums + q * sum_stride + column + v * lanes;
      store(place, load(place) + own[q][v]);
    }
  }
}

// Calls use(first, count) for the queries, two at a time: count is a constant, 1 or 2.
template <class Use>
TIR_INLINE void for_pairs(int64_t queries, Use use) {
  int64_t first = 0;
  for (; first + 2 <= queries; first += 2) use(first, std::integral_constant<int, 2>());
  if (first < queries) use(first, std::integral_constant<int, 1>());
}

}  // namespace tir::cpu::TIR_ARCH
