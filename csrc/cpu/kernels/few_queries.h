// Attention of few queries, as of a class token alone or of a pool: keys and values are multiplied
// where they lie, since to pack them would take longer. In float32, whatever their type.
//
// What takes time is to read keys and values and to write their gradients. Where the heads of a
// token lie side by side and tokens far apart, as in most models, some heads are worked on
// together, a few keys at a time; and what comes next is asked for meanwhile.
#pragma once

#include "chosen_rows.h"
#include "score_gradients.h"

namespace tir::cpu::TIR_ARCH {

// Of more queries, products of packed rows are faster.
constexpr int64_t max_few_queries = 2;

inline bool has_few_queries(const AttentionShape& shape) {
  return shape.queries <= max_few_queries && !shape.is_causal;
}

// Heads of an image that are worked on together.
struct HeadGroup {
  int64_t batch, first, count;
};

class HeadGroups {
 public:
  static constexpr int64_t max_heads = 4;

  // As large as leaves every thread some of them; of one head where its own rows lie closer.
  HeadGroups(const AttentionShape& shape, const RowGrid& keys, int threads)
      : heads_(shape.heads),
        size_(keys.head_stride > keys.row_stride
                  ? 1
                  : larger_of(1, smaller_of(max_heads, shape.batch * heads_ / (4 * threads)))),
        groups_per_image_(divide_up(heads_, size_)),
        count_(shape.batch * groups_per_image_) {}

  int64_t count() const { return count_; }

  HeadGroup at(int64_t i) const {
    int64_t first = i % groups_per_image_ * size_;
    return {i / groups_per_image_, first, smaller_of(size_, heads_ - first)};
  }

 private:
  int64_t heads_, size_, groups_per_image_, count_;
};

// One worker's memory, and what it does for some heads of an image.
class FewQueries : AttentionWorker {
 public:
  explicit FewQueries(const AttentionShape& shape)
      : AttentionWorker(shape, 0, key_block),
        stride_(larger_of(round_up(shape.length, lanes), key_block)),
        queries_(HeadGroups::max_heads * max_few_queries * padded_head_dim_),
        grads_(HeadGroups::max_heads * max_few_queries * padded_head_dim_),
        sums_(HeadGroups::max_heads * max_few_queries * padded_head_dim_),
        scores_(HeadGroups::max_heads * max_few_queries * stride_),
        products_(max_few_queries * key_block) {}

  // Outputs and log-sum-exp.
  void attend(const AttentionForward& problem, const HeadGroup& group, const KeyList& keys) {
    with_row_type(shape_.type, [&](auto row_type) {
      using Row = decltype(row_type);
      for_heads(group, [&] {
        read_queries(own_rows(queries_), problem.query);
        clear_sums();
      });
      for_blocks(group, keys, [&](const KeyList& own, int64_t first) {
        multiply(rows_of<Row>(problem.key, own), own_rows(queries_), own_scores() + first, stride_,
                 next_distant_rows<Row>(problem.key));
      });
      float factors[HeadGroups::max_heads][max_few_queries];
      for_heads(group, [&] {
        float* log_sum_exp = problem.log_sum_exp + first_query_place();
        for (int64_t q = 0; q < shape_.queries; ++q) {
          factors[slot_][q] =
              find_probabilities(own_scores() + q * stride_, keys, log_sum_exp + q);
        }
      });
      for_blocks(group, keys, [&](const KeyList& own, int64_t first) {
        add_rows(rows_of<Row>(problem.value, own), own_scores() + first, stride_,
                 next_distant_rows<Row>(problem.value));
      });
      for_heads(group, [&] { write_sums<Row>(problem.output, factors[slot_]); });
    });
  }

  // Gradients of all but the weights of keys that nothing attends to; `head_grads` of the weights
  // are null where they are not wanted, else those of the group's first head.
  void differentiate(const AttentionBackward& problem, const HeadGroup& group,
                     const KeyList& keys, float* head_grads) {
    with_row_type(shape_.type, [&](auto row_type) {
      using Row = decltype(row_type);
      int64_t next_row[HeadGroups::max_heads] = {};  // of the next key's gradients
      for_heads(group, [&] { begin_backward(problem); });
      for_blocks(group, keys, [&](const KeyList& own, int64_t) {
        find_score_gradients<Row>(problem, own, head_grads, rows_of<Row>(problem.grad_key, own),
                                  rows_of<Row>(problem.grad_value, own));
        add_rows(rows_of<Row>(problem.key, own), scores_, key_block, {});
        auto next_keys = next_rows<Row>(problem.key), next_values = next_rows<Row>(problem.value);
        int64_t& row = next_row[slot_];
        for (int64_t i = 0; i < own.count; ++i, ++row) {
          next_keys.expect(i);
          next_values.expect(i);
          for (; row < own.index[i]; ++row) write_zeros(problem, row);
          write_products<Row>(row_of(problem.grad_key, row), scores_ + i, own_rows(queries_),
                              shape_.scale);
          write_products<Row>(row_of(problem.grad_value, row), products_ + i, own_rows(grads_),
                              1.0f);
        }
      });
      float scales[max_few_queries];
      for (float& scale : scales) scale = shape_.scale;
      for_heads(group, [&] {
        for (int64_t row = next_row[slot_]; row < shape_.length; ++row) write_zeros(problem, row);
        write_sums<Row>(problem.grad_query, scales);
      });
    });
  }

  // Those that `differentiate` leaves out.
  void differentiate_ignored(const AttentionBackward& problem, const HeadGroup& group,
                             const KeyList& keys, float* head_grads) {
    with_row_type(shape_.type, [&](auto row_type) {
      using Row = decltype(row_type);
      for_blocks(group, keys, [&](const KeyList& own, int64_t) {
        find_score_gradients<Row>(problem, own, head_grads, next_rows<Row>(problem.key),
                                  next_rows<Row>(problem.value));
      });
    });
  }

 private:
  // Keys that are read, and asked for, at a time: their rows stay in the first-level cache.
  static constexpr int64_t key_block = 16;
  static_assert(key_block % lanes == 0);

  // Calls use() for each of the heads.
  template <class Use>
  TIR_INLINE void for_heads(const HeadGroup& group, Use use) {
    batch_ = group.batch;
    for (slot_ = 0; slot_ < group.count; ++slot_) {
      head_ = group.first + slot_;
      use();
    }
  }

  // Calls use(own keys, first) for some keys of each of the heads, then for the next ones.
  template <class Use>
  TIR_INLINE void for_blocks(const HeadGroup& group, const KeyList& keys, Use use) {
    for (int64_t first = 0; first < keys.count; first += key_block) {
      KeyList own = slice_of(keys, first, smaller_of(key_block, keys.count - first));
      int64_t end = first + own.count;
      KeyList following = slice_of(keys, end, smaller_of(key_block, keys.count - end));
      for_heads(group, [&] {
        bool is_last = slot_ + 1 == group.count;
        next_head_ = is_last ? group.first : head_ + 1;
        next_keys_ = is_last ? following : own;
        use(own, first);
      });
    }
  }

  // The rows of a head of the group.
  float* own_rows(float* rows) const { return rows + slot_ * max_few_queries * padded_head_dim_; }
  float* own_scores() const { return scores_ + slot_ * max_few_queries * stride_; }

  template <class Row, class Grid>
  ChosenRows<Row> rows_of(const Grid& grid, const KeyList& keys) const {
    return rows_at<Row>(grid, head_, keys);
  }
  // Those that come next, if any do.
  template <class Row, class Grid>
  ChosenRows<Row> next_rows(const Grid& grid) const {
    return rows_at<Row>(grid, next_head_, next_keys_);
  }
  // The same, but for rows that follow each other: a core that reads these alone foresees them.
  template <class Row>
  ChosenRows<Row> next_distant_rows(const RowGrid& grid) const {
    if (grid.row_stride == shape_.head_dim) return {};
    return next_rows<Row>(grid);
  }
  template <class Row, class Grid>
  ChosenRows<Row> rows_at(const Grid& grid, int64_t head, const KeyList& keys) const {
    return {static_cast<const typename Row::Element*>(grid.row(batch_, head, 0, shape_.type)),
            grid.row_stride, keys.index, keys.count, shape_.head_dim};
  }

  void read_queries(float* target, const RowGrid& source) const {
    for (int64_t q = 0; q < shape_.queries; ++q) {
      read_row(target + q * padded_head_dim_, row_of(source, q), shape_.type, shape_.head_dim);
    }
  }
  void clear_sums() {
    memset(own_rows(sums_), 0, max_few_queries * padded_head_dim_ * sizeof(float));
  }

  // Products of queries and rows, 0 behind the last up to a whole vector; asks for other rows.
  template <class Row>
  void multiply(const ChosenRows<Row>& rows, const float* queries, float* products, int64_t stride,
                const ChosenRows<Row>& expected) const {
    for (int64_t first = 0; first < rows.count; first += 4) {
      for (int64_t i = 0; i < 4; ++i) expected.expect(first + i);
      for_pairs(shape_.queries, [&](int64_t q, auto count) {
        multiply_four<Row, decltype(count)::value>(rows, first, queries + q * padded_head_dim_,
                                                   padded_head_dim_, products + q * stride,
                                                   stride);
      });
    }
    for (int64_t q = 0; q < shape_.queries; ++q) {
      for (int64_t i = rows.count; i % lanes != 0; ++i) products[q * stride + i] = 0;
    }
  }

  // Sums of rows times the factors of each query, added to the head's; asks for other rows.
  template <class Row>
  void add_rows(const ChosenRows<Row>& rows, const float* factors, int64_t stride,
                const ChosenRows<Row>& expected) {
    for_pairs(shape_.queries, [&](int64_t q, auto count) {
      constexpr int queries = decltype(count)::value;
      float* sums = own_rows(sums_) + q * padded_head_dim_;
      add_all<8 / queries>(rows, 0, [&](int64_t column, auto vectors, auto read) {
        add_columns<Row, queries, decltype(vectors)::value>(
            rows, column, factors + q * stride, stride, sums, padded_head_dim_, read,
            column == 0 ? expected : ChosenRows<Row>{});
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

  void begin_backward(const AttentionBackward& problem) {
    read_queries(own_rows(queries_), problem.query);
    read_queries(own_rows(grads_), problem.grad_output);
    clear_sums();
    for (int64_t q = 0; q < max_few_queries; ++q) {
      bool exists = q < shape_.queries;
      deltas_[slot_][q] = exists ? dot_of_rows(row_of(problem.grad_output, q),
                                               row_of(problem.output, q), shape_.type,
                                               shape_.head_dim)
                                 : 0;
      float log_sum = exists ? problem.log_sum_exp[first_query_place() + q] : -infinity;
      exponent_offsets_[slot_][q] = log_sum == -infinity ? -infinity : -log_sum * log2_e;
    }
  }

  // Probabilities in `products_`, gradients of scores in the first of `scores_`, and those of
  // weights; asks for other rows.
  template <class Row>
  void find_score_gradients(const AttentionBackward& problem, const KeyList& keys,
                            float* head_grads, const ChosenRows<Row>& expected,
                            const ChosenRows<Row>& also_expected) {
    multiply(rows_of<Row>(problem.key, keys), own_rows(queries_), scores_, key_block, expected);
    multiply(rows_of<Row>(problem.value, keys), own_rows(grads_), products_, key_block,
             also_expected);
    int64_t num_rows = round_up(shape_.queries, 2);
    if (num_rows > shape_.queries) {
      memset(scores_ + shape_.queries * key_block, 0, key_block * sizeof(float));
      memset(products_ + shape_.queries * key_block, 0, key_block * sizeof(float));
    }
    float weight_sums[key_block] = {};
    ScoreGradients<Float32Math> known{{products_, scores_, nullptr, key_block},
                                      exponent_offsets_[slot_],
                                      deltas_[slot_],
                                      0,
                                      keys.scaled_weight,
                                      keys.exponent,
                                      keys.index,
                                      weight_sums,
                                      shape_.scale * log2_e};
    ScoreGradientEpilogue<Float32Math, true, true, false> epilogue{known};
    for (int64_t i = 0; i < keys.count; i += lanes) {
      epilogue.at(0, i).take_rows(num_rows, scores_ + i, products_ + i, key_block);
    }
    if (head_grads == nullptr) return;
    float* own_grads = head_grads + slot_ * shape_.length;
    for (int64_t i = 0; i < keys.count; ++i) own_grads[keys.index[i]] = weight_sums[i];
  }

  // A head's sums, times a factor for each query.
  template <class Row>
  void write_sums(const ResultGrid& target, const float* factors) const {
    for (int64_t q = 0; q < shape_.queries; ++q) {
      write_row_as<Row>(row_of(target, q), own_rows(sums_) + q * padded_head_dim_, factors[q],
                        shape_.head_dim);
    }
  }

  // A row of a result: the queries' rows times a factor each.
  template <class Row>
  void write_products(void* target, const float* factors, const float* rows, float scale) const {
    auto* elements = static_cast<typename Row::Element*>(target);
    auto product_at = [&](int64_t column) {
      Vec sum = zero();
      for (int64_t q = 0; q < shape_.queries; ++q) {
        Vec factor = broadcast(factors[q * key_block] * scale);
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

  int64_t stride_;  // of scores, where they are of all keys
  Buffer<float> queries_, grads_, sums_;  // a row for each head and query
  Buffer<float> scores_, products_;       // of all keys of all heads, or of a block of one
  float deltas_[HeadGroups::max_heads][max_few_queries];
  float exponent_offsets_[HeadGroups::max_heads][max_few_queries];
  int64_t slot_ = 0;  // of the head in its group
  int64_t next_head_ = 0;
  KeyList next_keys_{};
};

}  // namespace tir::cpu::TIR_ARCH
