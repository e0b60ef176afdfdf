// Attention statistics: sums over the rows and the columns of attention, never L x L.
//
// A tile of queries passes the keys once for its rows (log-sum-exp, entropy) and once for the
// columns (what the keys receive). Where a tile's scores all fit into one block the second pass
// finds their exponentials in memory. Where there are fewer (batch, head) than threads, two runs
// share them: one cut along the queries for the rows, one cut along the keys for the columns. A
// column is the same additions in the same order either way.
#include "attention.h"

namespace tir::cpu::TIR_ARCH {
namespace {

constexpr int64_t max_key_block = 640;
constexpr float max_distance = 1 - smallest_exponent;  // an exponential so far down is 0

// What the columns need of each query, [B, H, Lq]: its attention to a key is
// exp2(exponent - maximum) * inverse_total.
struct RowSums {
  float* maximum;
  float* inverse_total;
};

struct Job {
  const AttentionStatistics& problem;
  const KeyLists& keys;
  RowSums row_sums;
  Pass pass;
  int64_t num_parts;  // of each (batch, head)
};

// One worker's memory, and what it does for one (batch, head).
template <class Math>
class StatisticsWorker : AttentionWorker {
  using Unit = typename Math::Unit;
  static constexpr int64_t tile_queries = Math::tile_queries;

 public:
  StatisticsWorker(const AttentionStatistics& problem, const RowSums& row_sums)
      : AttentionWorker(problem.shape, row_units<Math>(problem.shape.head_dim), max_key_block),
        problem_(problem),
        row_sums_(row_sums),
        key_panels_(packed_units(row_units_, shape_.length)),
        packing_space_(lanes * row_units_),
        queries_(tile_queries * row_units_),
        scores_(tile_queries * score_stride_),
        prefix_sums_(2 * column_stride()),
        patch_sums_(2 * column_stride()) {}

  // Packs the keys and clears what they receive.
  void choose(int64_t batch, int64_t head, const KeyList& keys) {
    batch_ = batch;
    head_ = head;
    keys_ = keys;
    block_ = key_block_size(keys.count, max_key_block);
    auto key_at = [&](int64_t i) {
      return problem_.key.row(batch, head, keys.index[i], shape_.type);
    };
    pack_columns<Math>(key_panels_, key_at, shape_.type, keys.count, shape_.head_dim,
                       packing_space_);
    memset(prefix_sums_, 0, 2 * column_stride() * sizeof(float));
    memset(patch_sums_, 0, 2 * column_stride() * sizeof(float));
  }

  void run_tile(int64_t first_query, bool wants_rows, bool wants_columns) {
    first_query_ = first_query;
    num_queries_ = smaller_of(tile_queries, shape_.queries - first_query);
    query_rows_ = left_rows<Math>(queries_, problem_.query, shape_.type, batch_, head_, first_query,
                                  num_queries_, shape_.head_dim);
    if (wants_rows) run_rows();
    if (wants_columns) run_columns(wants_rows && keys_.count <= block_);
  }

  // What the keys with rows in [first, end) receive, 0 where they are not among the chosen.
  void write_columns(int64_t first, int64_t end) {
    float num_prefix = static_cast<float>(larger_of(1, problem_.num_prefix_tokens));
    float num_patches =
        static_cast<float>(larger_of(1, shape_.queries - problem_.num_prefix_tokens));
    int64_t i = 0;
    for (int64_t row = first; row < end; ++row) {
      bool is_attended_to = i < keys_.count && keys_.index[i] == row;
      int64_t place = first_key_place() + row;
      problem_.received_from_prefix[place] = is_attended_to ? prefix_sums_[i] / num_prefix : 0;
      problem_.received_from_patches[place] = is_attended_to ? patch_sums_[i] / num_patches : 0;
      i += is_attended_to;
    }
  }

 private:
  // Sums of columns are followed by what their additions have rounded off.
  int64_t column_stride() const { return round_up(shape_.length, panel_width); }

  void multiply_block(int64_t first_key, int64_t num_keys) {
    multiply<Math>(num_queries_, num_keys, steps_of<Math>(shape_.head_dim),
                   query_rows_,
                   {key_panels_ + first_key * row_units_, row_units_ * panel_width},
                   {scores_, score_stride_, false, prefetcher_});
  }

  // Logarithms to base 2 of the weighted exponentials of a row, beginning at a column of a block.
  Vec exponents(int64_t row, int64_t first_key, int64_t column) const {
    Vec all = multiply_add(load(scores_ + row * score_stride_ + column),
                           broadcast(shape_.scale * log2_e),
                           load(keys_.log2_weight + first_key + column));
    if (!shape_.is_causal) return all;
    return without_later_keys(all, keys_.index + first_key + column, first_query_ + row);
  }

  void run_rows() {
    for (int64_t i = 0; i < num_queries_; ++i) {
      maxima_[i] = -infinity;
      totals_[i] = 0;
      spreads_[i] = 0;
    }
    for (int64_t key = 0; key < keys_.count; key += block_) {
      int64_t num_keys = smaller_of(block_, keys_.count - key);
      multiply_block(key, num_keys);
      for (int64_t i = 0; i < num_queries_; ++i) add_to_row(i, key, num_keys);
    }
    for (int64_t i = 0; i < num_queries_; ++i) write_row_results(i);
  }

  // Scores become exponentials e = exp2(x), with x relative to the row's largest exponent so far.
  // Beside their total, the spread sums -e x: no term of the entropy is negative, so that none
  // cancel.
  void add_to_row(int64_t row, int64_t first_key, int64_t num_keys) {
    Vec largest = broadcast(maxima_[row]);
    for (int64_t i = 0; i < num_keys; i += lanes) {
      largest = larger(exponents(row, first_key, i), largest);
    }
    float maximum = largest_of(largest);
    float shift = maximum == -infinity ? 0.0f : maximum;
    if (totals_[row] != 0) {
      float distance = shift - maxima_[row];
      if (distance > max_distance) distance = max_distance;  // infinity times 0 would be NaN
      float fade = exp2(broadcast(-distance))[0];
      spreads_[row] = fade * (spreads_[row] + distance * totals_[row]);
      totals_[row] *= fade;
    }
    Vec total = zero(), spread = zero();
    for (int64_t i = 0; i < num_keys; i += lanes) {
      Vec distances = broadcast(shift) - exponents(row, first_key, i);
      Vec exponentials = exp2(zero() - distances);
      total = total + exponentials;
      // smaller() keeps a NaN in its second argument.
      spread = multiply_add(exponentials, smaller(broadcast(max_distance), distances), spread);
      store(scores_ + row * score_stride_ + i, exponentials);
    }
    totals_[row] += sum_of(total);
    spreads_[row] += sum_of(spread);
    maxima_[row] = maximum;
  }

  void write_row_results(int64_t row) {
    int64_t place = first_query_place() + first_query_ + row;
    float total = totals_[row];
    bool is_empty = total == 0;
    float log_total = __builtin_logf(total);
    problem_.log_sum_exp[place] = is_empty ? -infinity : maxima_[row] * ln_2 + log_total;
    problem_.entropy[place] = is_empty ? 0.0f : log_total + spreads_[row] / total * ln_2;
    row_sums_.maximum[place] = is_empty ? 0.0f : maxima_[row];
    row_sums_.inverse_total[place] = is_empty ? 0.0f : 1.0f / total;
  }

  // Adds the attention of the tile's queries to what the keys receive.
  void run_columns(bool has_exponentials) {
    int64_t num_prefix = problem_.num_prefix_tokens - first_query_;
    num_prefix = larger_of(0, smaller_of(num_prefix, num_queries_));
    for (int64_t key = 0; key < keys_.count; key += block_) {
      int64_t num_keys = smaller_of(block_, keys_.count - key);
      if (!has_exponentials) multiply_block(key, num_keys);
      for (int64_t i = 0; i < num_keys; i += lanes) {
        if (!has_exponentials) exponentiate(key, i);
        add_column(prefix_sums_ + key + i, i, 0, num_prefix);
        add_column(patch_sums_ + key + i, i, num_prefix, num_queries_);
      }
    }
  }

  void exponentiate(int64_t first_key, int64_t column) {
    const float* maxima = row_sums_.maximum + first_query_place() + first_query_;
    for (int64_t row = 0; row < num_queries_; ++row) {
      Vec distances = broadcast(maxima[row]) - exponents(row, first_key, column);
      store(scores_ + row * score_stride_ + column, exp2(zero() - distances));
    }
  }

  // Adds the attention that a vector of keys receives from the tile's queries [first, end).
  void add_column(float* sums, int64_t column, int64_t first, int64_t end) {
    const float* inverse_totals = row_sums_.inverse_total + first_query_place() + first_query_;
    constexpr int chains = 4;  // short ones, which round less and need not wait for each other
    Vec parts[chains] = {};
    auto add = [&](int64_t row, Vec sum) {
      return multiply_add(load(scores_ + row * score_stride_ + column),
                          broadcast(inverse_totals[row]), sum);
    };
    int64_t row = first;
    for (; row + chains <= end; row += chains) {
      TIR_UNROLL
      for (int i = 0; i < chains; ++i) parts[i] = add(row + i, parts[i]);
    }
    for (; row < end; ++row) parts[0] = add(row, parts[0]);
    // Tiles are as many as the length has: their sum is compensated.
    float* lost = sums + column_stride();
    Vec before = load(sums);
    Vec added = ((parts[0] + parts[1]) + (parts[2] + parts[3])) - load(lost);
    Vec after = before + added;
    store(lost, (after - before) - added);
    store(sums, after);
  }

  const AttentionStatistics& problem_;
  RowSums row_sums_;
  Buffer<Unit> key_panels_, packing_space_, queries_;
  Buffer<float> scores_;                    // of a tile and a block of keys
  Buffer<float> prefix_sums_, patch_sums_;  // of the chosen keys
  float maxima_[tile_queries], totals_[tile_queries], spreads_[tile_queries];
  Left<Math> query_rows_{};
  KeyList keys_{};
  typename Math::State state_;
  int64_t block_ = 0;
  int64_t first_query_ = 0, num_queries_ = 0;
};

template <class Math>
void work(void* data, ItemQueue& items) {
  const Job& job = *static_cast<const Job*>(data);
  const AttentionShape& shape = job.problem.shape;
  StatisticsWorker<Math> worker(job.problem, job.row_sums);
  constexpr int64_t tile_queries = Math::tile_queries;
  bool wants_rows = job.pass != Pass::keys, wants_columns = job.pass != Pass::queries;
  int64_t num_tiles = divide_up(shape.queries, tile_queries);
  for (int64_t item = items.take(); item >= 0; item = items.take()) {
    int64_t part = item % job.num_parts, batch_head = item / job.num_parts;
    KeyList keys = job.keys.of(batch_head / shape.heads);
    KeyPart own = wants_rows ? part_of(keys, 0, 1, shape.length)
                             : part_of(keys, part, job.num_parts, shape.length);
    worker.choose(batch_head / shape.heads, batch_head % shape.heads, own.keys);
    int64_t tile = wants_columns ? 0 : num_tiles * part / job.num_parts;
    int64_t end = wants_columns ? num_tiles : num_tiles * (part + 1) / job.num_parts;
    for (; tile < end; ++tile) worker.run_tile(tile * tile_queries, wants_rows, wants_columns);
    if (wants_columns) worker.write_columns(own.first_row, own.end_row);
  }
}

}  // namespace

void attention_statistics(const AttentionStatistics& problem, int threads) {
  const AttentionShape& shape = problem.shape;
  if (attention_work(shape) < min_parallel_work) threads = 1;
  int64_t num_heads = shape.batch * shape.heads;
  KeyLists keys(problem.weights, shape.batch, shape.length, KeyLists::Which::positive);
  Buffer<float> maxima(num_heads * shape.queries), inverse_totals(num_heads * shape.queries);
  Job job{problem, keys, {maxima, inverse_totals}, Pass::everything, 1};
  with_math(shape.type, [&](auto math) {
    using Math = decltype(math);
    run_passes(threads, work<Math>, Math::tile_queries, job);
  });
}

}  // namespace tir::cpu::TIR_ARCH
