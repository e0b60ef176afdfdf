// Attention of few queries, as of a class token alone or of a pool: keys and values are multiplied
// where they lie, since to pack them would take longer. In float32, whatever their type.
#pragma once

#include "epilogues.h"
#include "score_gradients.h"

namespace tir::cpu::TIR_ARCH {

// Of more queries, products of packed rows are faster.
constexpr int64_t max_few_queries = 2;

inline bool has_few_queries(const AttentionShape& shape) {
  return shape.queries <= max_few_queries && !shape.is_causal;
}

// Rows of a (batch, head) that keys were chosen of.
template <class Row>
struct ChosenRows {
  using Element = typename Row::Element;
  const Element* first;
  int64_t stride;
  const int32_t* index;
  int64_t count;  // at least 1
  int64_t width;

  TIR_INLINE const Element* at(int64_t i) const {
    return first + index[smaller_of(i, count - 1)] * stride;
  }

  // A core does not foresee by itself where rows lie that are far apart.
  TIR_INLINE void expect(int64_t i) const {
    const Element* row = at(i);
    for (int64_t j = 0; j < width; j += 64 / sizeof(Element)) __builtin_prefetch(row + j);
  }
};

// The products of some queries with four rows.
template <class Row, int Queries>
TIR_INLINE void multiply_four(const ChosenRows<Row>& rows, int64_t first, const float* queries,
                              int64_t query_stride, float* products, int64_t product_stride) {
  const typename Row::Element* own[4];
  Vec sums[Queries][4];
  TIR_UNROLL
  for (int i = 0; i < 4; ++i) own[i] = rows.at(first + i);
  TIR_UNROLL
  for (int q = 0; q < Queries; ++q) {
    TIR_UNROLL
    for (int i = 0; i < 4; ++i) sums[q][i] = zero();
  }
  auto add = [&](int64_t column, auto read) {
    Vec values[4];
    TIR_UNROLL
    for (int i = 0; i < 4; ++i) values[i] = read(own[i] + column);
    TIR_UNROLL
    for (int q = 0; q < Queries; ++q) {
      Vec query = load(queries + q * query_stride + column);
      TIR_UNROLL
      for (int i = 0; i < 4; ++i) sums[q][i] = multiply_add(values[i], query, sums[q][i]);
    }
  };
  int64_t column = 0;
  for (; column + lanes <= rows.width; column += lanes) {
    add(column, [](auto* source) { return Row::read(source); });
  }
  if (column < rows.width) {
    add(column, [&](auto* source) { return Row::read(source, rows.width - column); });
  }
  TIR_UNROLL
  for (int q = 0; q < Queries; ++q) {
    combine_each(sums[q], products + q * product_stride + first, Sum());
  }
}

// Sums of rows times factors, one for each query and row, added to `sums`.
template <class Row, int Queries, int Vectors, class Read>
TIR_INLINE void add_columns(const ChosenRows<Row>& rows, int64_t column, const float* factors,
                            int64_t factor_stride, float* sums, int64_t sum_stride, Read read) {
  Vec own[Queries][Vectors];
  TIR_UNROLL
  for (int q = 0; q < Queries; ++q) {
    TIR_UNROLL
    for (int v = 0; v < Vectors; ++v) own[q][v] = zero();
  }
  for (int64_t i = 0; i < rows.count; ++i) {
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

// One worker's memory, and what it does for one (batch, head).
class FewQueries : AttentionWorker {
 public:
  explicit FewQueries(const AttentionShape& shape)
      : AttentionWorker(shape, 0, key_block),
        stride_(larger_of(round_up(shape.length, lanes), key_block)),
        queries_(max_few_queries * padded_head_dim_),
        grads_(max_few_queries * padded_head_dim_),
        sums_(max_few_queries * padded_head_dim_),
        scores_(max_few_queries * stride_),
        products_(max_few_queries * stride_) {}

  // Outputs and log-sum-exp.
  void attend(const AttentionForward& problem, int64_t batch, int64_t head, const KeyList& keys) {
    choose(batch, head);
    read_queries(queries_, problem.query);
    with_row_type(shape_.type, [&](auto row_type) {
      using Row = decltype(row_type);
      multiply(rows_of<Row>(problem.key, keys), queries_, scores_);
      float* log_sum_exp = problem.log_sum_exp + first_query_place();
      float factors[max_few_queries];
      for (int64_t q = 0; q < shape_.queries; ++q) {
        factors[q] = find_probabilities(scores_ + q * stride_, keys, log_sum_exp + q);
      }
      clear_sums();
      for_blocks(keys, [&](const KeyList& own, int64_t first) {
        add_rows(rows_of<Row>(problem.value, own), scores_ + first);
      });
      for (int64_t q = 0; q < shape_.queries; ++q) {
        write_row_as<Row>(row_of(problem.output, q), sums_ + q * padded_head_dim_, factors[q],
                          shape_.head_dim);
      }
    });
  }

  // Gradients of all but the weights of keys that nothing attends to; `head_grads` of the weights
  // are null where they are not wanted.
  void differentiate(const AttentionBackward& problem, int64_t batch, int64_t head,
                     const KeyList& keys, float* head_grads) {
    begin_backward(problem, batch, head);
    with_row_type(shape_.type, [&](auto row_type) {
      using Row = decltype(row_type);
      int64_t row = 0;  // of the next key's gradients
      for_blocks(keys, [&](const KeyList& own, int64_t) {
        find_score_gradients<Row>(problem, own, head_grads);
        add_rows(rows_of<Row>(problem.key, own), scores_);
        for (int64_t i = 0; i < own.count; ++i, ++row) {
          for (; row < own.index[i]; ++row) write_zeros(problem, row);
          write_products<Row>(row_of(problem.grad_key, row), scores_ + i, queries_, shape_.scale);
          write_products<Row>(row_of(problem.grad_value, row), products_ + i, grads_, 1.0f);
        }
      });
      for (; row < shape_.length; ++row) write_zeros(problem, row);
      for (int64_t q = 0; q < shape_.queries; ++q) {
        write_row_as<Row>(row_of(problem.grad_query, q), sums_ + q * padded_head_dim_,
                          shape_.scale, shape_.head_dim);
      }
    });
  }

  // Those that `differentiate` leaves out.
  void differentiate_ignored(const AttentionBackward& problem, const KeyList& keys,
                             float* head_grads) {
    with_row_type(shape_.type, [&](auto row_type) {
      for_blocks(keys, [&](const KeyList& own, int64_t) {
        find_score_gradients<decltype(row_type)>(problem, own, head_grads);
      });
    });
  }

 private:
  // Keys whose rows stay in the first-level cache; sums over a block are added to those before it.
  static constexpr int64_t key_block = 64;

  template <class Use>
  void for_blocks(const KeyList& keys, Use use) const {
    for (int64_t first = 0; first < keys.count; first += key_block) {
      use(KeyList{smaller_of(key_block, keys.count - first), keys.index + first,
                  keys.scaled_weight + first, keys.log2_weight + first,
                  keys.exponent == nullptr ? nullptr : keys.exponent + first},
          first);
    }
  }

  void choose(int64_t batch, int64_t head) {
    batch_ = batch;
    head_ = head;
  }

  template <class Row>
  ChosenRows<Row> rows_of(const RowGrid& grid, const KeyList& keys) const {
    return {static_cast<const typename Row::Element*>(row_of(grid, 0)), grid.row_stride,
            keys.index, keys.count, shape_.head_dim};
  }

  void read_queries(float* target, const RowGrid& source) const {
    for (int64_t q = 0; q < shape_.queries; ++q) {
      read_row(target + q * padded_head_dim_, row_of(source, q), shape_.type, shape_.head_dim);
    }
  }
  void clear_sums() {
    memset(sums_, 0, max_few_queries * padded_head_dim_ * sizeof(float));
  }

  // Products of queries and rows, 0 behind the last up to a whole vector.
  template <class Row>
  void multiply(const ChosenRows<Row>& rows, const float* queries, float* products) const {
    constexpr int64_t ahead = 16;
    for (int64_t first = 0; first < rows.count; first += 4) {
      for (int64_t i = 0; i < 4; ++i) rows.expect(first + ahead + i);
      for_pairs(shape_.queries, [&](int64_t q, auto count) {
        multiply_four<Row, decltype(count)::value>(rows, first, queries + q * padded_head_dim_,
                                                   padded_head_dim_, products + q * stride_,
                                                   stride_);
      });
    }
    for (int64_t q = 0; q < shape_.queries; ++q) {
      for (int64_t i = rows.count; i % lanes != 0; ++i) products[q * stride_ + i] = 0;
    }
  }

  // Sums of rows times the factors of each query.
  template <class Row>
  void add_rows(const ChosenRows<Row>& rows, const float* factors) {
    for_pairs(shape_.queries, [&](int64_t q, auto count) {
      constexpr int queries = decltype(count)::value;
      float* sums = sums_ + q * padded_head_dim_;
      add_all<8 / queries>(rows, 0, [&](int64_t column, auto vectors, auto read) {
        add_columns<Row, queries, decltype(vectors)::value>(
            rows, column, factors + q * stride_, stride_, sums, padded_head_dim_, read);
      });
    });
  }

  // Calls add(column, vectors, read) for all columns of rows, for as many vectors at once as there
  // are left, at most Vectors.
  template <int Vectors, class Row, class Add>
  TIR_INLINE void add_all(const ChosenRows<Row>& rows, int64_t column, Add add) const {
    using Element = typename Row::Element;
    for (; column + Vectors * lanes <= rows.width; column += Vectors * lanes) {
      add(column, std::integral_constant<int, Vectors>(),
          [](const Element* source) { return Row::read(source); });
    }
    if constexpr (Vectors > 1) {
      add_all<Vectors / 2>(rows, column, add);
    } else if (column < rows.width) {
      int64_t left = rows.width - column;
      add(column, std::integral_constant<int, 1>(),
          [left](const Element* source) { return Row::read(source, left); });
    }
  }

  // A row of scores becomes exponentials relative to the largest; the factor that makes them
  // probabilities.
  float find_probabilities(float* scores, const KeyList& keys, float* log_sum_exp) const {
    Vec scale = broadcast(shape_.scale * log2_e), largest = broadcast(-infinity), sum = zero();
    for (int64_t i = 0; i < keys.count; i += lanes) {
      Vec exponents = multiply_add(load(scores + i), scale, load(keys.log2_weight + i));
      store(scores + i, exponents);
      largest = larger(exponents, largest);
    }
    float maximum = largest_of(largest);
    Vec shift = broadcast(maximum == -infinity ? 0.0f : maximum);
    for (int64_t i = 0; i < keys.count; i += lanes) {
      Vec exponentials = exp2(load(scores + i) - shift);
      store(scores + i, exponentials);
      sum = sum + exponentials;
    }
    float total = sum_of(sum);
    *log_sum_exp = total == 0 ? -infinity : maximum * ln_2 + log(broadcast(total))[0];
    return total == 0 ? 0 : 1 / total;
  }

  void begin_backward(const AttentionBackward& problem, int64_t batch, int64_t head) {
    choose(batch, head);
    read_queries(queries_, problem.query);
    read_queries(grads_, problem.grad_output);
    clear_sums();
    for (int64_t q = 0; q < max_few_queries; ++q) {
      bool exists = q < shape_.queries;
      deltas_[q] = exists ? dot_of_rows(row_of(problem.grad_output, q), row_of(problem.output, q),
                                        shape_.type, shape_.head_dim)
                          : 0;
      float log_sum = exists ? problem.log_sum_exp[first_query_place() + q] : -infinity;
      exponent_offsets_[q] = log_sum == -infinity ? -infinity : -log_sum * log2_e;
    }
  }

  // Probabilities in place of products, gradients of scores in place of scores, and those of
  // weights.
  template <class Row>
  void find_score_gradients(const AttentionBackward& problem, const KeyList& keys,
                            float* head_grads) {
    multiply(rows_of<Row>(problem.key, keys), queries_, scores_);
    multiply(rows_of<Row>(problem.value, keys), grads_, products_);
    int64_t num_rows = round_up(shape_.queries, 2);
    if (num_rows > shape_.queries) {
      memset(scores_ + shape_.queries * stride_, 0, key_block * sizeof(float));
      memset(products_ + shape_.queries * stride_, 0, key_block * sizeof(float));
    }
    float weight_sums[key_block] = {};
    ScoreGradients<Float32Math> known{{products_, scores_, nullptr, stride_},
                                      exponent_offsets_,
                                      deltas_,
                                      0,
                                      keys.scaled_weight,
                                      keys.exponent,
                                      keys.index,
                                      weight_sums,
                                      shape_.scale * log2_e};
    ScoreGradientEpilogue<Float32Math, true, true, false> epilogue{known};
    for (int64_t i = 0; i < keys.count; i += lanes) {
      epilogue.at(0, i).take_rows(num_rows, scores_ + i, products_ + i, stride_);
    }
    if (head_grads == nullptr) return;
    for (int64_t i = 0; i < keys.count; ++i) head_grads[keys.index[i]] = weight_sums[i];
  }

  // A row of a result: the queries' rows times a factor each.
  template <class Row>
  void write_products(void* target, const float* factors, const float* rows, float scale) const {
    auto* elements = static_cast<typename Row::Element*>(target);
    auto product_at = [&](int64_t column) {
      Vec sum = zero();
      for (int64_t q = 0; q < shape_.queries; ++q) {
        Vec factor = broadcast(factors[q * stride_] * scale);
        sum = multiply_add(factor, load(rows + q * padded_head_dim_ + column), sum);
      }
      return sum;
    };
    int64_t column = 0, width = shape_.head_dim;
    for (; column + lanes <= width; column += lanes) {
      Row::write(elements + column, product_at(column));
    }
    if (column < width) Row::write(elements + column, product_at(column), width - column);
  }

  void write_zeros(const AttentionBackward& problem, int64_t row) const {
    int64_t bytes = shape_.head_dim * bytes_of(shape_.type);
    memset(row_of(problem.grad_key, row), 0, bytes);
    memset(row_of(problem.grad_value, row), 0, bytes);
  }

  int64_t stride_;  // of scores
  Buffer<float> queries_, grads_, sums_;  // a row for each query
  Buffer<float> scores_, products_;       // of all keys, or of a block
  float deltas_[max_few_queries], exponent_offsets_[max_few_queries];
};

}  // namespace tir::cpu::TIR_ARCH
