// Products of a few rows with many that are read where they lie: to pack these for so few would
// take longer than to multiply them.
#pragma once

#include "matrix.h"

namespace tir::cpu::TIR_ARCH {

struct FewRowsMath : Float32Math {
  static constexpr bool reads_rows = true;
  static constexpr int64_t tile_queries = 4, row_multiple = tile_queries;
};

// Calls function(constant) with the number of rows rounded up to 1, 2 or 4.
template <class Function>
TIR_INLINE void with_few_rows(int64_t rows, Function function) {
  if (rows == 1) return function(std::integral_constant<int, 1>());
  if (rows == 2) return function(std::integral_constant<int, 2>());
  function(std::integral_constant<int, FewRowsMath::tile_queries>());
}

// Calls visit(column, vector) for the columns of a row, with zeros behind the last.
template <class Row, class Visit>
TIR_INLINE void each_vector(const typename Row::Element* row, int64_t width, Visit visit) {
  int64_t column = 0;
  for (; column + lanes <= width; column += lanes) visit(column, Row::read(row + column));
  if (column < width) visit(column, Row::read(row + column, width - column));
}

// product[i][j] = left row i . row j, and 0 from `count` up to a whole vector of columns.
//
// Left rows end in zeros up to a whole vector; as many of them as with_few_rows() says are read,
// and of the product written.
template <class RowAt>
void multiply_by_rows(int64_t left_rows, Left<FewRowsMath> left, RowAt row_at, Type type,
                      int64_t count, int64_t width, float* product, int64_t product_stride) {
  with_row_type(type, [&](auto row_type) {
    using Row = decltype(row_type);
    with_few_rows(left_rows, [&](auto rounded_up) {
      constexpr int rows = decltype(rounded_up)::value;
      alignas(64) float partial_sums[rows][lanes * lanes];
      for (int64_t first = 0; first < count; first += lanes) {
        for (int64_t j = 0; j < lanes; ++j) {
          Vec sums[rows];
          TIR_UNROLL
          for (int i = 0; i < rows; ++i) sums[i] = zero();
          if (first + j < count) {
            auto* row = static_cast<const typename Row::Element*>(row_at(first + j));
            each_vector<Row>(row, width, [&](int64_t column, Vec values) {
              TIR_UNROLL
              for (int i = 0; i < rows; ++i) {
                const float* own = left.data + i * left.row_stride + column;
                sums[i] = multiply_add(load(own), values, sums[i]);
              }
            });
          }
          TIR_UNROLL
          for (int i = 0; i < rows; ++i) store(partial_sums[i] + j * lanes, sums[i]);
        }
        TIR_UNROLL
        for (int i = 0; i < rows; ++i) {
          transpose_block(partial_sums[i], lanes, partial_sums[i], lanes);
          Vec sum = zero();
          for (int j = 0; j < lanes; ++j) sum = sum + load(partial_sums[i] + j * lanes);
          store(product + i * product_stride + first, sum);
        }
      }
    });
  });
}

// sums[i] = sum over j of factors[i][j] row j, or sums[i] += it where `adds`; as many of both as
// with_few_rows() says.
template <class RowAt>
void add_up_rows(int64_t left_rows, Left<FewRowsMath> factors, RowAt row_at, Type type,
                 int64_t count, int64_t width, float* sums, int64_t sum_stride, bool adds) {
  with_row_type(type, [&](auto row_type) {
    using Row = decltype(row_type);
    with_few_rows(left_rows, [&](auto rounded_up) {
      constexpr int rows = decltype(rounded_up)::value;
      if (!adds) {
        for (int i = 0; i < rows; ++i) memset(sums + i * sum_stride, 0, sum_stride * sizeof *sums);
      }
      for (int64_t j = 0; j < count; ++j) {
        Vec own_factors[rows];
        TIR_UNROLL
        for (int i = 0; i < rows; ++i) {
          own_factors[i] = broadcast(factors.data[i * factors.row_stride + j]);
        }
        auto* row = static_cast<const typename Row::Element*>(row_at(j));
        each_vector<Row>(row, width, [&](int64_t column, Vec values) {
          TIR_UNROLL
          for (int i = 0; i < rows; ++i) {
            float* sum = sums + i * sum_stride + column;
            store(sum, multiply_add(own_factors[i], values, load(sum)));
          }
        });
      }
    });
  });
}

// sums[j] = sum over i of factors[i][j] left row i, for `count` columns of factors.
inline void add_up_left_rows(int64_t left_rows, Left<FewRowsMath> factors, Left<FewRowsMath> left,
                             int64_t count, float* sums, int64_t sum_stride) {
  with_few_rows(left_rows, [&](auto rounded_up) {
    constexpr int rows = decltype(rounded_up)::value;
    for (int64_t j = 0; j < count; ++j) {
      Vec own_factors[rows];
      TIR_UNROLL
      for (int i = 0; i < rows; ++i) {
        own_factors[i] = broadcast(factors.data[i * factors.row_stride + j]);
      }
      for (int64_t column = 0; column < sum_stride; column += lanes) {
        Vec sum = zero();
        TIR_UNROLL
        for (int i = 0; i < rows; ++i) {
          const float* own = left.data + i * left.row_stride + column;
          sum = multiply_add(own_factors[i], load(own), sum);
        }
        store(sums + j * sum_stride + column, sum);
      }
    }
  });
}

}  // namespace tir::cpu::TIR_ARCH
