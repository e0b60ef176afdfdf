// Forward pass of weighted attention: the scores of a tile of queries at a time, never L x L.
#include "attention.h"
#include "epilogues.h"
#include "few_queries.h"

namespace tir::cpu::TIR_ARCH {
namespace {

constexpr int64_t max_key_block = 640;

struct Job {
  const AttentionForward& problem;
  const KeyLists& keys;
  int64_t num_parts;  // of each (batch, head)
  int threads;
};

// One worker's memory and the steps of one (batch, head), in the order in which they run.
template <class Math>
class ForwardWorker : AttentionWorker {
  using Unit = typename Math::Unit;
  static constexpr int64_t tile_queries = Math::tile_queries;
  static constexpr int64_t num_totals = round_up(tile_queries, lanes);

 public:
  explicit ForwardWorker(const AttentionForward& problem)
      : AttentionWorker(problem.shape, row_units<Math>(problem.shape.head_dim), max_key_block),
        problem_(problem),
        key_panels_(packed_units(row_units_, shape_.length)),
        value_panels_(packed_units(steps_of<Math>(shape_.length), shape_.head_dim)),
        packing_space_(lanes * row_units_),
        query_copies_(tile_queries * row_units_),
        scores_(tile_queries * score_stride_),
        probabilities_(Math::values_per_unit == 1 ? 0 : tile_queries * score_stride_ / 2),
        sums_(tile_queries * padded_head_dim_),
        total_vectors_(has_epilogues<Math> ? tile_queries * lanes : 0) {}

  // Keys and values of a (batch, head) for all of its tiles, or of its only one.
  void pack(int64_t batch, int64_t head, const KeyList& keys, bool for_one_tile) {
    keys_ = keys;
    batch_ = batch;
    head_ = head;
    streams_keys_ = for_one_tile;
    if (!for_one_tile) pack_keys(0, keys.count);
    if (for_one_tile && has_value_rows()) {
      auto* rows = static_cast<const Unit*>(row_of(problem_.value, 0));
      values_ = {rows, panel_width, problem_.value.row_stride};
      return;
    }
    auto value_at = [&](int64_t i) { return row_of(problem_.value, keys.index[i]); };
    int64_t panel_stride = steps_of<Math>(keys.count) * panel_width;
    pack_rows<Math>(value_panels_, panel_stride, value_at, shape_.type, keys.count,
                    shape_.head_dim);
    values_ = {value_panels_, panel_stride};
  }

  // While the one that has been packed is worked on.
  void expect_next(int64_t batch_head) {
    if (!begin_to_expect(batch_head)) return;
    expect_rows(batch_head, shape_.length, problem_.key, problem_.value);
    expect_rows(batch_head, shape_.queries, problem_.query, problem_.output);
    int64_t num_blocks = divide_up(keys_.count, max_key_block);
    spread_expected(shape_.queries * (keys_.count + num_blocks * shape_.head_dim));
  }

  void attend(int64_t first_query, int64_t count) {
    first_query_ = first_query;
    count_ = count;
    queries_ = left_rows<Math>(query_copies_, problem_.query, shape_.type, batch_, head_,
                               first_query, count, shape_.head_dim);
    if constexpr (has_epilogues<Math>) {
      if (!shape_.is_causal && attend_by_reference()) return;
    }
    attend_by_maximum();
  }

 private:
  // Exponentials relative to the largest of their row, for which all scores of a block are wanted.
  void attend_by_maximum() {
    for (int64_t i = 0; i < count_; ++i) {
      maxima_[i] = -infinity;
      totals_[i] = 0;
    }
    auto find_probabilities = [&](int64_t key, int64_t num_keys) {
      with_panels(key, num_keys, [&](int64_t column, int64_t columns, Right<Math> keys) {
        multiply<Math>(count_, columns, steps_of<Math>(shape_.head_dim), queries_, keys,
                       {scores_ + column, score_stride_, false, prefetcher_});
      });
      int64_t columns = round_up(num_keys, Math::column_multiple);
      if (shape_.is_causal) {
        online_softmax_update<true>(key, columns);
      } else {
        online_softmax_update<false>(key, columns);
      }
    };
    attend_to_blocks(find_probabilities, [] { return true; });
  }

  // Exponentials relative to a number near the largest of the first panel. False where it is too
  // far from the largest of all, as it hardly ever is: then nothing has been written.
  bool attend_by_reference() {
    ExponentialEpilogue<Math, true> first{
        probability_place(0), score_stride_, keys_.log2_weight, shape_.scale * log2_e,
        maxima_,              offsets_,      total_vectors_};
    auto find_probabilities = [&](int64_t key, int64_t num_keys) {
      auto rest = first.rest(keys_.log2_weight + key);
      with_panels(key, num_keys, [&](int64_t column, int64_t columns, Right<Math> keys) {
        int64_t steps = steps_of<Math>(shape_.head_dim);
        if (key + column == 0) {
          // One tile of columns: whatever comes after it finds its reference.
          multiply_into(count_, columns > lanes ? panel_width : columns, steps, queries_, keys,
                        prefetching(first, prefetcher_));
          column += panel_width;
          columns = larger_of(0, columns - panel_width);
          keys.data += keys.panel_stride;
        }
        multiply_into(count_, columns, steps, queries_, keys,
                      prefetching(rest.at(0, column), prefetcher_));
      });
    };
    return attend_to_blocks(find_probabilities, [&] {
      for (int64_t row = 0; row < count_; row += 2) {
        Vec totals[2] = {load(total_vectors_ + row * lanes),
                         load(total_vectors_ + (row + 1) * lanes)};
        combine_each(totals, totals_ + row, Sum());
      }
      return is_in_range();
    });
  }

  // Whether exponentials relative to the largest would have given the same but for rounding. Larger
  // totals may have infinite sums where values are large; smaller ones, or NaN, come of a reference
  // that is no integer or no number.
  bool is_in_range() const {
    const float largest = 1024.0f * static_cast<float>(keys_.count);
    bool is_known = true;
    for (int64_t i = 0; i < count_; ++i) is_known &= totals_[i] >= 0.5f && totals_[i] <= largest;
    return is_known;
  }

  // Values summed up by the probabilities of each block of keys, unless totals cannot be used.
  template <class FindProbabilities, class FinishTotals>
  bool attend_to_blocks(FindProbabilities find_probabilities, FinishTotals finish_totals) {
    int64_t block = key_block_size(keys_.count, max_key_block);
    int64_t end = first_query_ + count_;
    for (int64_t key = 0; key < keys_.count; key += block) {
      // What no query of the tile attends to; sums want a first block in any case.
      bool is_later = shape_.is_causal && keys_.index[key] >= end;
      if (is_later && key > 0) break;
      int64_t num_keys = smaller_of(block, keys_.count - key);
      find_probabilities(key, num_keys);
      Right<Math> value_rows = values_;
      value_rows.data += steps_of<Math>(key) * values_.step_stride;
      int64_t steps = steps_of<Math>(num_keys);
      if constexpr (has_epilogues<Math>) {
        if (num_keys == keys_.count && is_own_type<Math>(shape_.type)) {
          if (!finish_totals()) return false;
          find_factors();
          auto* results = static_cast<Probability<Math>*>(row_of(problem_.output, first_query_));
          int64_t stride = problem_.output.row_stride, width = shape_.head_dim;
          RowEpilogue<Math, false> rows{results, stride, count_, width, factors_, 1, nullptr, 0};
          multiply_into(count_, width, steps, probability_rows(), value_rows,
                        prefetching(rows, prefetcher_));
          return true;
        }
      }
      multiply<Math>(count_, shape_.head_dim, steps, probability_rows(), value_rows,
                     {sums_, padded_head_dim_, key > 0, prefetcher_});
    }
    if (!finish_totals()) return false;
    find_factors();
    with_row_type(shape_.type, [&](auto row_type) {
      for (int64_t i = 0; i < count_; ++i) {
        write_row_as<decltype(row_type)>(row_of(problem_.output, first_query_ + i),
                                         sums_ + i * padded_head_dim_, factors_[i],
                                         shape_.head_dim);
      }
    });
    return true;
  }

  // Columns of keys, from the first panel on.
  void pack_keys(int64_t first, int64_t count) {
    auto key_at = [&](int64_t i) { return row_of(problem_.key, keys_.index[first + i]); };
    pack_columns<Math>(key_panels_, key_at, shape_.type, count, shape_.head_dim, packing_space_);
  }

  // Whether the values lie in memory as they are multiplied.
  bool has_value_rows() const {
    return Math::values_per_unit == 1 && shape_.type == Type::float32 &&
           keys_.count == shape_.length && shape_.head_dim % lanes == 0;
  }

  // Calls use(column, columns, keys) for the panels of a block, all at once or one by one.
  template <class Use>
  void with_panels(int64_t first_key, int64_t num_keys, Use use) {
    int64_t panel_stride = row_units_ * panel_width;
    int64_t columns = round_up(num_keys, Math::written_multiple);
    if (!streams_keys_) {
      return use(0, columns, Right<Math>{key_panels_ + first_key * row_units_, panel_stride});
    }
    // A panel that is multiplied once stays in the first-level cache.
    for (int64_t column = 0; column < columns; column += panel_width) {
      int64_t first = first_key + column;
      pack_keys(first, smaller_of(panel_width, keys_.count - first));
      use(column, smaller_of(panel_width, columns - column),
          Right<Math>{key_panels_, panel_stride});
    }
  }

  // Scores of a tile become exponentials, relative to the largest weighted exponential of their row
  // so far.
  template <bool IsCausal>
  void online_softmax_update(int64_t first_key, int64_t num_keys) {
    int64_t row = 0;
    for (; row + 4 <= count_; row += 4) update_rows<IsCausal, 4>(row, first_key, num_keys);
    for (; row + 2 <= count_; row += 2) update_rows<IsCausal, 2>(row, first_key, num_keys);
    for (; row < count_; ++row) update_rows<IsCausal, 1>(row, first_key, num_keys);
  }

  // Some rows at once: what one waits for, the others fill.
  template <bool IsCausal, int Rows>
  void update_rows(int64_t first_row, int64_t first_key, int64_t num_keys) {
    // Copies of members: what is written could be these, for all that a compiler knows.
    const int64_t stride = score_stride_;
    const float* scores = scores_ + first_row * stride;
    const float* log2_weights = keys_.log2_weight + first_key;
    Probability<Math>* probabilities = probability_place(first_row);
    Vec scale = broadcast(shape_.scale * log2_e);
    auto exponents = [&](int row, int64_t i, Vec log2_weight) {
      Vec all = multiply_add(load(scores + row * stride + i), scale, log2_weight);
      if (!IsCausal) return all;
      return without_later_keys(all, keys_.index + first_key + i, first_query_ + first_row + row);
    };
    Vec largest[Rows], shifts[Rows], sums[Rows];
    TIR_UNROLL
    for (int r = 0; r < Rows; ++r) largest[r] = broadcast(maxima_[first_row + r]);
    for (int64_t i = 0; i < num_keys; i += lanes) {
      Vec log2_weight = load(log2_weights + i);
      TIR_UNROLL
      for (int r = 0; r < Rows; ++r) largest[r] = larger(exponents(r, i, log2_weight), largest[r]);
    }
    float maxima[Rows], totals[Rows];
    combine_each(largest, maxima, Largest());
    TIR_UNROLL
    for (int r = 0; r < Rows; ++r) {
      shifts[r] = broadcast(maxima[r] == -infinity ? 0.0f : maxima[r]);
      sums[r] = zero();
    }
    auto exponentiate = [&](auto num_vectors, int64_t i) {
      constexpr int vectors = decltype(num_vectors)::value;
      TIR_UNROLL
      for (int r = 0; r < Rows; ++r) {
        Vec exponentials[vectors];
        TIR_UNROLL
        for (int v = 0; v < vectors; ++v) {
          int64_t key = i + v * lanes;
          exponentials[v] = Math::exp2(exponents(r, key, load(log2_weights + key)) - shifts[r]);
          sums[r] = sums[r] + exponentials[v];
        }
        write_probabilities<Math>(probabilities + r * stride + i, exponentials);
      }
    };
    int64_t key = 0;
    if constexpr (Math::values_per_unit == 2) {
      for (; key + 2 * lanes <= num_keys; key += 2 * lanes) {
        exponentiate(std::integral_constant<int, 2>(), key);
      }
    }
    for (; key < num_keys; key += lanes) exponentiate(std::integral_constant<int, 1>(), key);
    combine_each(sums, totals, Sum());
    TIR_UNROLL
    for (int r = 0; r < Rows; ++r) {
      int64_t row = first_row + r;
      if (first_key > 0) {
        Vec fade = exp2(broadcast(maxima_[row]) - shifts[r]);
        totals_[row] *= fade[0];
        float* own = sums_ + row * padded_head_dim_;
        for (int64_t i = 0; i < padded_head_dim_; i += lanes) store(own + i, load(own + i) * fade);
      }
      totals_[row] += totals[r];
      maxima_[row] = maxima[r];
    }
  }

  Probability<Math>* probability_place(int64_t row) const {
    if constexpr (Math::values_per_unit == 1) {
      return scores_ + row * score_stride_;
    } else {
      Unit* units = probabilities_;
      return reinterpret_cast<Probability<Math>*>(units) + row * score_stride_;
    }
  }

  Left<Math> probability_rows() const {
    if constexpr (Math::values_per_unit == 1) {
      return {scores_, score_stride_, 1};
    } else {
      return {probabilities_, score_stride_ / 2, 1};
    }
  }

  // Of the sums of values, and the logarithms of the totals.
  void find_factors() {
    float* log_sum_exp = problem_.log_sum_exp + first_query_place() + first_query_;
    for (int64_t i = 0; i < count_; i += lanes) {
      Vec totals = load(totals_ + i);
      Vec logarithms = multiply_add(load(maxima_ + i), broadcast(ln_2), log(totals));
      Vec found = totals == zero() ? broadcast(-infinity) : logarithms;
      store_first(log_sum_exp + i, found, smaller_of(lanes, count_ - i));
      store(factors_ + i, totals == zero() ? zero() : broadcast(1.0f) / totals);
    }
  }

  const AttentionForward& problem_;
  Buffer<Unit> key_panels_, value_panels_, packing_space_;
  Buffer<Unit> query_copies_;  // where they are no units in memory
  Buffer<float> scores_;
  Buffer<Unit> probabilities_;  // beside the scores where they are not float32
  Buffer<float> sums_;
  Buffer<float> total_vectors_;  // a vector for each query, where scores are exponentiated at once
  float maxima_[num_totals], totals_[num_totals];
  float offsets_[num_totals], factors_[num_totals];
  KeyList keys_{};
  typename Math::State state_;
  Right<Math> values_{};
  Left<Math> queries_{};
  bool streams_keys_ = false;
  int64_t first_query_ = 0, count_ = 0;
};

void write_empty(const AttentionForward& problem, int64_t batch, int64_t head) {
  const AttentionShape& shape = problem.shape;
  int64_t place = (batch * shape.heads + head) * shape.queries;
  for (int64_t i = 0; i < shape.queries; ++i) {
    memset(problem.output.row(batch, head, i, shape.type), 0,
           shape.head_dim * bytes_of(shape.type));
    problem.log_sum_exp[place + i] = -infinity;
  }
}

template <class Math>
void work(void* data, ItemQueue& items) {
  const Job& job = *static_cast<const Job*>(data);
  const AttentionShape& shape = job.problem.shape;
  ForwardWorker<Math> worker(job.problem);
  QueryTiles tiles = query_tiles(shape.queries, Math::tile_queries, Math::row_multiple);
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    int64_t part = item % job.num_parts, batch_head = item / job.num_parts;
    int64_t batch = batch_head / shape.heads, head = batch_head % shape.heads;
    KeyList keys = job.keys.of(batch);
    if (keys.count == 0) {
      if (part == 0) write_empty(job.problem, batch, head);
      continue;
    }
    worker.pack(batch, head, keys, tiles.count == 1);
    // The queue gives the workers one each in turn.
    if (job.num_parts == 1) worker.expect_next(batch_head + job.threads);
    int64_t end = tiles.count * (part + 1) / job.num_parts;
    for (int64_t tile = tiles.count * part / job.num_parts; tile < end; ++tile) {
      int64_t first = tile * tiles.size;
      worker.attend(first, smaller_of(tiles.size, shape.queries - first));
    }
  }
}

void work_on_few_queries(void* data, ItemQueue& items) {
  const Job& job = *static_cast<const Job*>(data);
  HeadGroups groups(job.problem.shape, job.problem.key, job.threads);
  FewQueries worker(job.problem.shape);
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    HeadGroup group = groups.at(item);
    worker.attend(job.problem, group, job.keys.of(group.batch));
  }
}

}  // namespace

void attention_forward(const AttentionForward& problem, int threads) {
  const AttentionShape& shape = problem.shape;
  if (attention_work(shape) < min_parallel_work) threads = 1;
  KeyLists keys(problem.weights, shape.batch, shape.length, KeyLists::Which::positive);
  if (has_few_queries(shape)) {
    Job job{problem, keys, 1, threads};
    HeadGroups groups(shape, problem.key, threads);
    return run_workers(threads, groups.count(), work_on_few_queries, &job);
  }
  with_math(shape.type, [&](auto math) {
    using Math = decltype(math);
    int64_t num_tiles = query_tiles(shape.queries, Math::tile_queries, Math::row_multiple).count;
    Job job{problem, keys,
            fills_threads(shape, threads) ? 1 : parts_per_head(shape, threads, num_tiles), threads};
    run_workers(threads, shape.batch * shape.heads * job.num_parts, work<Math>, &job);
  });
}

}  // namespace tir::cpu::TIR_ARCH
