// What the forward and the backward pass of attention have in common.
#pragma once

#include "../keys.h"
#include "../parallel.h"
#include "packing.h"
#include "prefetch.h"
#include "tir/attention.h"
#include "tir/rules.h"

namespace tir::cpu::TIR_ARCH {

constexpr float infinity = __builtin_inff();

// Below this many multiply-adds the work is shorter than waking threads.
constexpr double min_parallel_work = 1e6;

// Keys and values are packed, however few queries there are: that takes as long as some of these.
inline double attention_work(const AttentionShape& shape) {
  constexpr int64_t queries_of_packing = 8;
  return static_cast<double>(shape.batch) * shape.heads *
         larger_of(shape.queries, queries_of_packing) * shape.length * shape.head_dim;
}

// Keys are taken in blocks that stay in the cache: even shares of `count`, of whole panels.
inline int64_t key_block_size(int64_t count, int64_t largest) {
  int64_t num_blocks = larger_of(1, divide_up(count, largest));
  return round_up(divide_up(count, num_blocks), panel_width);
}

// Queries are taken in tiles: even shares of at most `largest`, in multiples.
struct QueryTiles {
  int64_t count, size;
};

inline QueryTiles query_tiles(int64_t queries, int64_t largest, int64_t multiple) {
  int64_t size = round_up(divide_up(queries, larger_of(1, divide_up(queries, largest))), multiple);
  return {divide_up(queries, larger_of(1, size)), size};
}

// The distance of rows of scores, for any number of attended keys: a block of fewer keys may be the
// larger one. The 16 keep the rows from competing for cache sets.
inline int64_t score_stride(int64_t length, int64_t largest_block) {
  return smaller_of(round_up(length, panel_width), largest_block) + 16;
}

// Whether one (batch, head) per item keeps `threads` threads busy most of the time.
inline bool fills_threads(const AttentionShape& shape, int threads) {
  int64_t heads = shape.batch * shape.heads;
  return 4 * heads >= 3 * round_up(heads, threads);
}

// In how many parts to cut each (batch, head), of `num_cuts` possible ones.
inline int64_t parts_per_head(const AttentionShape& shape, int threads, int64_t num_cuts) {
  return smaller_of(num_cuts, divide_up(3 * threads, shape.batch * shape.heads));
}

// Whole heads at once, or heads cut into parts along their queries or along their keys.
enum class Pass { everything, queries, keys };

// Runs the workers of a `Job` whose `pass` is everything and whose heads have one part. Where there
// are fewer heads than keep the threads busy, two passes share them.
template <class Job>
void run_passes(int threads, Worker worker, int64_t tile_queries, Job& job) {
  const AttentionShape& shape = job.problem.shape;
  int64_t num_heads = shape.batch * shape.heads;
  if (fills_threads(shape, threads)) {
    run_workers(threads, num_heads, worker, &job);
    return;
  }
  constexpr Pass passes[] = {Pass::queries, Pass::keys};
  for (Pass pass : passes) {
    int64_t num_cuts = pass == Pass::queries ? divide_up(shape.queries, tile_queries)
                                             : divide_up(shape.length, panel_width);
    job.pass = pass;
    job.num_parts = parts_per_head(shape, threads, num_cuts);
    run_workers(threads, num_heads * job.num_parts, worker, &job);
  }
}

// What a worker knows of its heads: their shape, and the sizes of its memory.
class AttentionWorker {
 protected:
  AttentionWorker(const AttentionShape& shape, int64_t row_units, int64_t max_key_block)
      : shape_(shape),
        padded_head_dim_(round_up(shape.head_dim, lanes)),
        row_units_(row_units),
        score_stride_(score_stride(shape.length, max_key_block)) {}

  // The first of the (batch, head)'s rows in an array by the query, or by the key.
  int64_t first_query_place() const { return (batch_ * shape_.heads + head_) * shape_.queries; }
  int64_t first_key_place() const { return (batch_ * shape_.heads + head_) * shape_.length; }

  template <class Void>
  Void* row_of(const GridOf<Void>& grid, int64_t row) const {
    return grid.row(batch_, head_, row, shape_.type);
  }

  // Whether there is a (batch, head) that this worker probably takes next, to be asked for.
  bool begin_to_expect(int64_t batch_head) {
    prefetcher_.clear();
    return batch_head < shape_.batch * shape_.heads;
  }
  template <class... Grids>
  void expect_rows(int64_t batch_head, int64_t num_rows, const Grids&... grids) {
    int64_t batch = batch_head / shape_.heads, head = batch_head % shape_.heads;
    (prefetcher_.add(grids.row(batch, head, 0, shape_.type),
                     grids.row_stride * bytes_of(shape_.type), num_rows),
     ...);
  }
  // Spread over what products sum up until then.
  void spread_expected(int64_t num_sums) {
    prefetcher_.spread(shape_.head_dim * bytes_of(shape_.type), num_sums / lanes);
  }

  const AttentionShape& shape_;
  int64_t padded_head_dim_, row_units_, score_stride_;
  int64_t batch_ = 0, head_ = 0;
  Prefetcher prefetcher_;
};

// Some keys of a list.
TIR_INLINE KeyList slice_of(const KeyList& keys, int64_t first, int64_t count) {
  return {count, keys.index + first, keys.scaled_weight + first, keys.log2_weight + first,
          keys.exponent == nullptr ? nullptr : keys.exponent + first};
}

// The keys of one part: whole panels, and the rows up to those of the next part.
struct KeyPart {
  KeyList keys;
  int64_t first_row, end_row;
};

inline KeyPart part_of(const KeyList& keys, int64_t part, int64_t num_parts, int64_t length) {
  int64_t num_panels = divide_up(keys.count, panel_width);
  int64_t first = smaller_of(num_panels * part / num_parts * panel_width, keys.count);
  int64_t end = smaller_of(num_panels * (part + 1) / num_parts * panel_width, keys.count);
  auto row_of = [&](int64_t key) { return key < keys.count ? keys.index[key] : length; };
  return {slice_of(keys, first, end - first), part == 0 ? 0 : row_of(first),
          part == num_parts - 1 ? length : row_of(end)};
}

// Exponents of a vector of keys, -inf for those that come after the query.
TIR_INLINE Vec without_later_keys(Vec exponents, const int32_t* key_index, int64_t query) {
  IntVec last = IntVec{} + static_cast<int32_t>(query);
  return load_bits<IntVec>(key_index) > last ? broadcast(-infinity) : exponents;
}

// Rows as a left operand: where they lie if they are units there and no more of them are read, else
// copies, with rows of zeros up to a multiple.
template <class Math>
Left<Math> left_rows(typename Math::Unit* copies, const RowGrid& source, Type type, int64_t batch,
                     int64_t head, int64_t first, int64_t count, int64_t head_dim) {
  constexpr int64_t pair = Math::values_per_unit;
  const void* start = source.row(batch, head, first, type);
  bool are_units = bytes_of(type) * pair == sizeof(uint32_t) && source.row_stride % pair == 0 &&
                   reinterpret_cast<uintptr_t>(start) % sizeof(uint32_t) == 0 &&
                   head_dim % (pair * Math::step_multiple) == 0;
  if (are_units && count % Math::row_multiple == 0) {
    return {static_cast<const typename Math::Unit*>(start), source.row_stride / pair, 1};
  }
  int64_t stride = row_units<Math>(head_dim);
  for (int64_t i = 0; i < count; ++i) {
    Math::copy_row(copies + i * stride, source.row(batch, head, first + i, type), type, head_dim);
  }
  int64_t missing = round_up(count, Math::row_multiple) - count;
  memset(copies + count * stride, 0, missing * stride * sizeof(uint32_t));
  return {copies, stride, 1};
}

}  // namespace tir::cpu::TIR_ARCH
