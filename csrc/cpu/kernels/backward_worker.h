// The steps of attention's backward pass for one (batch, head), with the memory that they work in.
//
// Probabilities are recomputed from the forward pass's log-sum-exp, for a tile of queries and a
// block of keys at a time. Every gradient is the same additions in the same order whatever is
// wanted beside it: tiles and blocks never depend on the threads.
#pragma once

#include "epilogues.h"
#include "score_gradients.h"

namespace tir::cpu::TIR_ARCH {

// One source includes this: with internal linkage its compiler inlines what is used once.
namespace {

constexpr int64_t max_key_block = 384;

struct Wanted {
  bool query, key_value, weights;
};

// One worker's memory, and what it does for one (batch, head).
template <class Math>
class BackwardWorker : AttentionWorker {
  using Unit = typename Math::Unit;
  static constexpr bool is_paired = Math::values_per_unit == 2;
  // Tiles take a left operand's steps side by side: gradients of keys and values are summed up
  // transposed there, with the queries' channels on the left.
  static constexpr bool is_transposed = Math::row_multiple > 2;
  static constexpr int64_t tile_queries = Math::backward_queries;
  // Of these the scores that lie in memory stay in the first-level cache.
  static constexpr int64_t score_rows = Math::tile_queries;

 public:
  // Tiles may be small where there have to be many: of no sum over queries, they change no bit.
  BackwardWorker(const AttentionBackward& problem, bool has_small_tiles)
      : AttentionWorker(problem.shape, row_units<Math>(problem.shape.head_dim), max_key_block),
        problem_(problem),
        // Of causal attention too, which leaves out what no query of a tile attends to.
        tiles_(query_tiles(shape_.queries,
                           has_small_tiles || shape_.is_causal ? Math::tile_queries : tile_queries,
                           Math::row_multiple)),
        packing_space_(lanes * row_units_),
        key_columns_(packed_units(row_units_, shape_.length)),
        value_columns_(packed_units(row_units_, shape_.length)),
        key_rows_(packed_units(steps_of<Math>(shape_.length), shape_.head_dim)),
        queries_(tile_queries * row_units_),
        grads_(tile_queries * row_units_),
        query_rows_(packed_units(steps_of<Math>(tile_queries), shape_.head_dim)),
        grad_rows_(packed_units(steps_of<Math>(tile_queries), shape_.head_dim)),
        scores_(score_rows * panel_width),
        grad_probabilities_(score_rows * panel_width),
        probabilities_(tile_queries * score_stride_ / Math::values_per_unit),
        grad_scores_(tile_queries * score_stride_),
        query_sums_(tile_queries * padded_head_dim_),
        key_sums_(round_up(shape_.length, Math::column_multiple) * padded_head_dim_),
        value_sums_(round_up(shape_.length, Math::column_multiple) * padded_head_dim_),
        weight_sums_(round_up(shape_.length, Math::column_multiple)),
        query_channels_(is_transposed ? padded_head_dim_ * tile_queries / 2 : 0),
        grad_channels_(is_transposed ? padded_head_dim_ * tile_queries / 2 : 0),
        turned_keys_(is_transposed ? lanes * padded_head_dim_ : 0),
        turned_values_(is_transposed ? lanes * padded_head_dim_ : 0) {}

  int64_t num_tiles() const { return tiles_.count; }

  void choose(int64_t batch, int64_t head) {
    batch_ = batch;
    head_ = head;
  }

  // While the gradients of `num_keys` are found, over all queries.
  void expect_next(int64_t batch_head, int64_t num_keys) {
    if (!begin_to_expect(batch_head)) return;
    expect_rows(batch_head, shape_.length, problem_.key, problem_.value);
    expect_rows(batch_head, shape_.queries, problem_.query, problem_.grad_output, problem_.output,
                problem_.grad_query);
    expect_rows(batch_head, shape_.length, problem_.grad_key, problem_.grad_value);
    int64_t rows = divide_up(num_keys, max_key_block) * shape_.queries +
                   2 * tiles_.count * num_keys;
    spread_expected(2 * shape_.queries * num_keys + rows * shape_.head_dim);
  }

  // The gradients that `keys` contribute to over the queries of some tiles.
  void run(const KeyList& keys, int64_t first_tile, int64_t end_tile, Wanted wanted) {
    keys_ = keys;
    wanted_ = wanted;
    pack_keys();
    sum_stride_ = is_transposed ? round_up(keys.count, Math::column_multiple) : padded_head_dim_;
    memset(weight_sums_, 0, round_up(keys.count, Math::column_multiple) * sizeof(float));
    writes_keys_ = has_epilogues<Math> && is_own_type<Math>(shape_.type) && wanted.key_value &&
                   keys.index[keys.count - 1] - keys.index[0] == keys.count - 1;
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      int64_t first = tile * tiles_.size;
      run_tile(first, smaller_of(tiles_.size, shape_.queries - first), tile > first_tile,
               tile + 1 == end_tile);
    }
  }

  // Key and value gradients of the rows [first, end), zero for those that are not in `keys`.
  void write_key_value(const KeyList& keys, int64_t first, int64_t end) {
    int64_t i = 0;
    for (int64_t row = first; row < end; ++row) {
      if (i < keys.count && keys.index[i] == row) {
        if (!writes_keys_) {
          write(problem_.grad_key, row, row_of_sums(key_sums_, i, turned_keys_), shape_.scale);
          write(problem_.grad_value, row, row_of_sums(value_sums_, i, turned_values_), 1.0f);
        }
        ++i;
      } else {
        write_zeros(problem_.grad_key, row);
        write_zeros(problem_.grad_value, row);
      }
    }
  }

  void write_weights(float* head_grads) {
    for (int64_t i = 0; i < keys_.count; ++i) head_grads[keys_.index[i]] = weight_sums_[i];
  }

  void write_zero_queries(int64_t first_tile, int64_t end_tile) {
    int64_t end = smaller_of(end_tile * tiles_.size, shape_.queries);
    for (int64_t i = first_tile * tiles_.size; i < end; ++i) write_zeros(problem_.grad_query, i);
  }

 private:
  void write(const ResultGrid& result, int64_t row, const float* sums, float factor) const {
    write_row(row_of(result, row), sums, factor, shape_.type, shape_.head_dim);
  }
  void write_zeros(const ResultGrid& result, int64_t row) const {
    memset(row_of(result, row), 0, shape_.head_dim * bytes_of(shape_.type));
  }

  // The channels' sums of a key side by side; keys are asked for in turn, from the first.
  const float* row_of_sums(const float* sums, int64_t key, float* turned) const {
    if constexpr (!is_transposed) {
      return sums + key * sum_stride_;
    } else {
      if (key % lanes == 0) {
        for (int64_t channel = 0; channel < padded_head_dim_; channel += lanes) {
          transpose_block(turned + channel, padded_head_dim_, sums + channel * sum_stride_ + key,
                          sum_stride_);
        }
      }
      return turned + key % lanes * padded_head_dim_;
    }
  }

  void pack_keys() {
    auto key_at = [&](int64_t i) { return row_of(problem_.key, keys_.index[i]); };
    auto value_at = [&](int64_t i) { return row_of(problem_.value, keys_.index[i]); };
    pack_columns<Math>(key_columns_, key_at, shape_.type, keys_.count, shape_.head_dim,
                       packing_space_);
    pack_columns<Math>(value_columns_, value_at, shape_.type, keys_.count, shape_.head_dim,
                       packing_space_);
    key_panel_stride_ = steps_of<Math>(keys_.count) * panel_width;
    if (wanted_.query) {
      pack_rows<Math>(key_rows_, key_panel_stride_, key_at, shape_.type, keys_.count,
                      shape_.head_dim);
    }
  }

  void load_tile(int64_t first, int64_t count) {
    first_query_ = first;
    query_left_ = left_rows<Math>(queries_, problem_.query, shape_.type, batch_, head_, first,
                                  count, shape_.head_dim);
    grad_left_ = left_rows<Math>(grads_, problem_.grad_output, shape_.type, batch_, head_, first,
                                 count, shape_.head_dim);
    if (wanted_.key_value) {
      auto query_at = [&](int64_t i) { return row_of(problem_.query, first + i); };
      auto grad_at = [&](int64_t i) { return row_of(problem_.grad_output, first + i); };
      int64_t panel_stride = steps_of<Math>(count) * panel_width;
      pack_rows<Math>(query_rows_, panel_stride, query_at, shape_.type, count, shape_.head_dim);
      pack_rows<Math>(grad_rows_, panel_stride, grad_at, shape_.type, count, shape_.head_dim);
      if constexpr (is_transposed) {
        int64_t steps = steps_of<Math>(count), width = padded_head_dim_;
        turn_panels(query_channels_, tile_queries / 2, query_rows_, panel_stride, steps, width);
        turn_panels(grad_channels_, tile_queries / 2, grad_rows_, panel_stride, steps, width);
      }
    }
    int64_t place = first_query_place() + first;
    for (int64_t i = 0; i < count; ++i) {
      deltas_[i] = delta_of(first + i);
      // Minus infinity makes the probabilities of a row that attends to nothing 0.
      float log_sum = problem_.log_sum_exp[place + i];
      exponent_offsets_[i] = log_sum == -infinity ? -infinity : -log_sum * log2_e;
    }
    if (count % 2 != 0) {
      deltas_[count] = 0;
      exponent_offsets_[count] = -infinity;
    }
  }

  // How much all gradients of a row's probabilities lose to the softmax's sum staying 1.
  float delta_of(int64_t query) const {
    return dot_of_rows(row_of(problem_.grad_output, query), row_of(problem_.output, query),
                       shape_.type, shape_.head_dim);
  }

  void run_tile(int64_t first, int64_t count, bool adds, bool is_last) {
    load_tile(first, count);
    int64_t block = key_block_size(keys_.count, max_key_block);
    for (int64_t key = 0; key < keys_.count; key += block) {
      // What no query of the tile attends to; all sums begin with the first tile and block, and may
      // be written with the last.
      bool is_later = shape_.is_causal && keys_.index[key] >= first + count;
      bool is_needed = key == 0 || !adds || (is_last && writes_keys_);
      if (is_later && !is_needed) break;
      int64_t num_keys = smaller_of(block, keys_.count - key);
      differentiate(key, num_keys, count);
      if (wanted_.query) add_query(key, num_keys, count);
      if (wanted_.key_value) add_key_value(key, num_keys, count, adds, is_last);
    }
    if (wanted_.query && !writes_queries()) {
      for (int64_t i = 0; i < count; ++i) {
        write(problem_.grad_query, first + i, query_sums_ + i * padded_head_dim_, shape_.scale);
      }
    }
  }

  // Whether the gradients of queries are sums over one block of keys, written as they are found.
  bool writes_queries() const {
    return has_epilogues<Math> && is_own_type<Math>(shape_.type) && keys_.count <= max_key_block;
  }

  void add_key_value(int64_t key, int64_t num_keys, int64_t count, bool adds,
                     [[maybe_unused]] bool is_last) {
    int64_t query_steps = steps_of<Math>(count);
#if defined(__AMX_BF16__)
    if constexpr (is_transposed) {
      clear_missing_pairs(count, round_up(num_keys, Math::column_multiple));
      auto add = [&](const Unit* channels, const Unit* pairs, float* sums) {
        multiply_by_tiles(shape_.head_dim, num_keys, query_steps, {channels, tile_queries / 2},
                          {pairs, score_stride_}, panel_width,
                          {sums + key, sum_stride_, adds, prefetcher_});
      };
      add(query_channels_, grad_scores_, key_sums_);
      add(grad_channels_, probabilities_, value_sums_);
      return;
    }
#endif
    int64_t panel_stride = query_steps * panel_width;
    Right<Math> query_rows{query_rows_, panel_stride}, grad_rows{grad_rows_, panel_stride};
    float* key_sums = key_sums_ + key * sum_stride_;
    float* value_sums = value_sums_ + key * sum_stride_;
    if constexpr (has_epilogues<Math>) {
      if (is_last && writes_keys_) {
        int64_t row = keys_.index[0] + key;
        sum_up_rows(num_keys, query_steps, grad_score_columns(), query_rows,
                    row_of(problem_.grad_key, row), problem_.grad_key.row_stride, &shape_.scale,
                    adds ? key_sums : nullptr);
        constexpr float one = 1.0f;
        sum_up_rows(num_keys, query_steps, probability_columns(), grad_rows,
                    row_of(problem_.grad_value, row), problem_.grad_value.row_stride, &one,
                    adds ? value_sums : nullptr);
        return;
      }
    }
    multiply<Math>(num_keys, shape_.head_dim, query_steps, grad_score_columns(), query_rows,
                   {key_sums, sum_stride_, adds, prefetcher_});
    multiply<Math>(num_keys, shape_.head_dim, query_steps, probability_columns(), grad_rows,
                   {value_sums, sum_stride_, adds, prefetcher_});
  }

  // Products, and sums in memory before them if there are, become rows of a result.
  void sum_up_rows(int64_t rows, int64_t steps, Left<Math> left, Right<Math> right, void* result,
                   int64_t stride, const float* factor, const float* sums) {
    auto* results = static_cast<Probability<Math>*>(result);
    int64_t width = shape_.head_dim;
    auto sum_up = [&](auto epilogue) {
      multiply_into(rows, width, steps, left, right, prefetching(epilogue, prefetcher_));
    };
    if (sums == nullptr) {
      sum_up(RowEpilogue<Math, false>{results, stride, rows, width, factor, 0, nullptr, 0});
    } else {
      sum_up(RowEpilogue<Math, true>{results, stride, rows, width, factor, 0, sums, sum_stride_});
    }
  }

  void add_query(int64_t key, int64_t num_keys, int64_t count) {
    Right<Math> keys{key_rows_ + steps_of<Math>(key) * panel_width, key_panel_stride_};
    if constexpr (has_epilogues<Math>) {
      if (writes_queries()) {
        sum_up_rows(count, steps_of<Math>(num_keys), grad_score_rows(), keys,
                    row_of(problem_.grad_query, first_query_), problem_.grad_query.row_stride,
                    &shape_.scale, nullptr);
        return;
      }
    }
    multiply<Math>(count, shape_.head_dim, steps_of<Math>(num_keys), grad_score_rows(), keys,
                   {query_sums_, padded_head_dim_, key > 0, prefetcher_});
  }

  // Rows behind the last pair of queries, up to a whole step, must not add to the keys' sums.
  void clear_missing_pairs(int64_t count, int64_t columns) {
    for (int64_t pair = divide_up(count, 2); pair < steps_of<Math>(count); ++pair) {
      memset(probabilities_ + pair * score_stride_, 0, columns * sizeof(Unit));
      memset(grad_scores_ + pair * score_stride_, 0, columns * sizeof(Unit));
    }
  }

  // Probabilities and gradients of scores of a tile of queries and a block of keys.
  void differentiate(int64_t key, int64_t num_keys, int64_t count) {
    const float* exponents = keys_.exponent == nullptr ? nullptr : keys_.exponent + key;
    ScoreGradients<Math> known{{probabilities_, grad_scores_, grad_row_pairs(), score_stride_},
                               exponent_offsets_,
                               deltas_,
                               first_query_,
                               keys_.scaled_weight + key,
                               exponents,
                               keys_.index + key,
                               weight_sums_ + key,
                               shape_.scale * log2_e};
    if (shape_.is_causal) {
      differentiate(key, num_keys, count, ScoreGradientEpilogue<Math, true, true, true>{known});
    } else if (exponents != nullptr) {
      differentiate(key, num_keys, count, ScoreGradientEpilogue<Math, true, true, false>{known});
    } else if (wanted_.weights) {
      differentiate(key, num_keys, count, ScoreGradientEpilogue<Math, true, false, false>{known});
    } else {
      differentiate(key, num_keys, count, ScoreGradientEpilogue<Math, false, false, false>{known});
    }
  }

  template <bool WantsWeights, bool MayBeScaled, bool IsCausal>
  void differentiate(
      int64_t key, int64_t num_keys, int64_t count,
      const ScoreGradientEpilogue<Math, WantsWeights, MayBeScaled, IsCausal>& epilogue) {
    int64_t steps = steps_of<Math>(shape_.head_dim), panel_stride = row_units_ * panel_width;
    Right<Math> keys{key_columns_ + key * row_units_, panel_stride};
    Right<Math> values{value_columns_ + key * row_units_, panel_stride};
    // Code for the others would be worth less than it takes.
    if constexpr (has_joint_epilogues<Math> && !MayBeScaled) {
      multiply_two_into(count, num_keys, steps,
                        TwoProducts<Math>{{query_left_, grad_left_}, {keys, values}},
                        prefetching(epilogue, prefetcher_));
      return;
    }
    int64_t columns = round_up(num_keys, Math::column_multiple);
    for (int64_t column = 0; column < columns; column += panel_width) {
      int64_t width = smaller_of(panel_width, columns - column);
      int64_t own_keys = smaller_of(width, round_up(num_keys - column, Math::written_multiple));
      for (int64_t row = 0; row < count; row += score_rows) {
        int64_t rows = smaller_of(score_rows, count - row);
        multiply<Math>(rows, own_keys, steps, query_left_.from_row(row), keys,
                       {scores_, panel_width, false, prefetcher_});
        multiply<Math>(rows, own_keys, steps, grad_left_.from_row(row), values,
                       {grad_probabilities_, panel_width, false, prefetcher_});
        for (int64_t i = 0; i < width; i += lanes) {
          epilogue.at(row, column + i)
              .take_rows(rows, scores_ + i, grad_probabilities_ + i, panel_width);
        }
      }
      keys.data += panel_stride;
      values.data += panel_stride;
    }
  }

  Unit* grad_row_pairs() const {
    return is_paired ? grad_scores_ + tile_queries * score_stride_ / 2 : nullptr;
  }

  Left<Math> grad_score_rows() const {
    if constexpr (is_paired) {
      return {grad_row_pairs(), score_stride_ / 2, 1};
    } else {
      return {grad_scores_, score_stride_, 1};
    }
  }
  Left<Math> grad_score_columns() const { return {grad_scores_, 1, score_stride_}; }
  Left<Math> probability_columns() const { return {probabilities_, 1, score_stride_}; }

  const AttentionBackward& problem_;
  QueryTiles tiles_;
  Buffer<Unit> packing_space_;
  Buffer<Unit> key_columns_, value_columns_, key_rows_;  // right operands, of all keys
  Buffer<Unit> queries_, grads_;                         // left operands, of a tile, if copied
  Buffer<Unit> query_rows_, grad_rows_;                  // right operands, of a tile
  Buffer<float> scores_, grad_probabilities_;            // of a tile and a panel of keys
  Buffer<Unit> probabilities_, grad_scores_;             // of a tile and a block of keys
  Buffer<float> query_sums_, key_sums_, value_sums_, weight_sums_;
  Buffer<Unit> query_channels_, grad_channels_;  // left operands, of a tile, where transposed
  Buffer<float> turned_keys_, turned_values_;    // of one vector of keys, where transposed
  float deltas_[tile_queries], exponent_offsets_[tile_queries];
  Left<Math> query_left_{}, grad_left_{};
  KeyList keys_{};
  Wanted wanted_{};
  bool writes_keys_ = false;  // as the last tile finds their sums
  typename Math::State state_;
  int64_t key_panel_stride_ = 0, sum_stride_ = 0, first_query_ = 0;
};

}  // namespace
}  // namespace tir::cpu::TIR_ARCH
