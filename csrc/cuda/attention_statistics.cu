// What keys receive of weighted attention and how queries spread theirs, without atomics and without
// a matrix of L x L.
//
// Two kernels. The first has stationary queries and streamed keys, and finds the softmax and the
// entropy of each query. The second has stationary keys and streamed queries: with the maxima and
// totals of the first it finds the probabilities again and adds up what each key receives. Those two
// numbers serve better than the log-sum-exp, of which a rounding step is a larger part of a
// probability the further it lies from 0.
#include <algorithm>
#include <climits>
#include <utility>

#include "cuda/heads.cuh"

namespace tir::cuda {
namespace {

constexpr const char* kName = "attention_statistics";

// 16-row tiles that a warp holds, and rows that are streamed past it at a time.
template <class T>
constexpr int kHeldTiles = kHasTensorCores<T> ? 2 : 1;
template <class T>
constexpr int kHeldRows = kHeldTiles<T> * kRows;
constexpr int kChunk = 32;

// Maximum and inverse of the total of a query that attends to nothing or does not exist: all of its
// powers 2^(exponent - maximum) are 0.
constexpr float2 kNoSoftmax{INFINITY, 0.0f};

struct StatisticsPlan {
  int stationary, streamed;  // rows of each head
  int parts;                 // blocks of each head
  bool is_aligned;
};

// The scores of one head's stationary rows, of which every warp has its own, with all streamed rows.
template <class T, int D>
struct ScoreBlock {
  static constexpr int kHeld = kHeldTiles<T>, kTiles = kChunk / 8;
  static constexpr int kOwnElements = kHeldRows<T> * kPitch<T, D>;
  static constexpr int kChunkElements = kChunk * kPitch<T, D>;
  using Scores = float[kHeld][kTiles][4];  // [stationary row, streamed row], spread over the lanes
  using PerRow = float[kHeld][2];          // of the stationary rows that this lane has a part in

  const AttentionShape& shape;
  const StatisticsPlan& plan;
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int warp = thread / kWarp, warps = threads / kWarp, lane = thread % kWarp;
  int64_t head_index = blockIdx.x / plan.parts;
  int64_t batch = head_index / shape.heads, head = head_index % shape.heads;
  int part = static_cast<int>(blockIdx.x % plan.parts);
  int chunks = (plan.streamed + kChunk - 1) / kChunk;
  int first = (part * warps + warp) * kHeldRows<T>;  // of the warp's stationary rows

  // Of the streamed rows: logarithms of weights, or maxima and the inverses of totals.
  float* column_numbers = reinterpret_cast<float*>(shared_memory());
  T* stationary = reinterpret_cast<T*>(column_numbers + 2 * chunks * kChunk);
  T* own_rows = stationary + warp * kOwnElements;
  T* streamed = stationary + warps * kOwnElements;

  TIR_DEVICE int row(int m, int r) const { return first + m * kRows + lane / 4 + 8 * r; }

  TIR_DEVICE bool is_stored(int m, int r) const {
    return lane % 4 == 0 && row(m, r) < plan.stationary;
  }

  // Where a stationary row's number lies in an array [B, H, stationary rows].
  TIR_DEVICE int64_t place(int m, int r) const { return head_index * plan.stationary + row(m, r); }

  // The base-2 logarithm of a key's weight; -inf for a key that is not attended to.
  TIR_DEVICE float log_weight(const float* weights, int key) const {
    if (weights == nullptr) return 0.0f;
    float weight = weights[batch * shape.length + key];
    return is_attended(weight) ? log2f(weight) : -INFINITY;
  }

  // The first column of tile j in this lane, in a chunk.
  TIR_DEVICE int column(int j) const { return 8 * j + 2 * (lane % 4); }

  // Calls step(scores, first streamed row) for one chunk of streamed rows after the other, from
  // chunk `begin` to before `end`.
  template <class Step>
  TIR_DEVICE void stream(const RowGrid& own_grid, const RowGrid& streamed_grid, int begin, int end,
                         Step step) const {
    auto own = rows_of_head<T>(own_grid, shape, plan.stationary, batch, head, plan.is_aligned);
    auto others =
        rows_of_head<T>(streamed_grid, shape, plan.streamed, batch, head, plan.is_aligned);
    auto slot = [&](int chunk) { return streamed + chunk % 2 * kChunkElements; };
    auto load = [&](int passed) {
      int chunk = begin + passed, start = chunk * kChunk;
      int rows = min(kChunk, round_up(plan.streamed - start, kRows));
      load_tile<T, D>(slot(chunk), others, start, rows, thread, threads, KeepAll());
      commit_copies();
    };
    load_tile<T, D>(own_rows, own, first, kHeldRows<T>, lane, kWarp, KeepAll());
    LeftRows<T, D, D / 16> left[kHeld];
    stream_chunks(end - begin, load, [&](int passed) {
      if (passed == 0) {
        TIR_UNROLL
        for (int m = 0; m < kHeld; ++m) left[m].take(own_rows + m * kRows * kPitch<T, D>, lane);
      }
      int chunk = begin + passed, start = chunk * kChunk;
      int used = min(kTiles, 2 * ((plan.streamed - start + 15) / 16));
      Scores scores = {};
      multiply_transposed(scores, left, slot(chunk), used, lane);
      step(scores, start);
    });
  }

  // Sets exponents to -inf where the key comes after the query; `start` is the first streamed row.
  template <bool kHasStationaryKeys>
  TIR_DEVICE void hide_later_keys(Scores& exponents, int start) const {
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      TIR_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        TIR_UNROLL
        for (int e = 0; e < 4; ++e) {
          int own = row(m, e / 2), other = start + column(j) + e % 2;
          bool is_later = kHasStationaryKeys ? own > other : other > own;
          if (is_later) exponents[m][j][e] = -INFINITY;
        }
      }
    }
  }
};

// A row's softmax so far. Its entropy is log2(total) + deficit / total, two numbers that are never
// negative, so that nothing cancels where one key has nearly all.
struct RowSums {
  float maximum = -INFINITY;  // of the exponents
  float total = 0.0f;         // of the powers 2^(exponent - maximum)
  float deficit = 0.0f;       // of the powers times (maximum - exponent)

  TIR_DEVICE void raise_maximum(float largest) {
    // While nothing was attended to, -inf - -inf would be NaN where the power must be 0.
    float shift = largest == -INFINITY ? 0.0f : largest;
    float correction = power_of_two(maximum - shift);
    total *= correction;
    // What counts no more may be infinitely far below.
    deficit = correction == 0.0f ? 0.0f : deficit * correction + (shift - maximum) * total;
    maximum = largest;
  }

  // Adds row r, 0 or 1, of a tile's exponents.
  template <int N>
  TIR_DEVICE void add(const float (&exponents)[N][4], int r) {
    float largest = maximum;
    TIR_UNROLL
    for (int j = 0; j < N; ++j) {
      largest = fmaxf(largest, fmaxf(exponents[j][2 * r], exponents[j][2 * r + 1]));
    }
    raise_maximum(largest);
    // Sums of a chunk are added up first: a long row's would round more often.
    float shift = largest == -INFINITY ? 0.0f : largest, powers = 0.0f, deficits = 0.0f;
    TIR_UNROLL
    for (int j = 0; j < N; ++j) {
      TIR_UNROLL
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        float difference = exponents[j][e] - shift, power = power_of_two(difference);
        powers += power;
        deficits -= power == 0.0f ? 0.0f : power * difference;
      }
    }
    total += powers;
    deficit += deficits;
  }

  // Gives every lane the sums of all four that share the row.
  TIR_DEVICE void merge_lanes() {
    raise_maximum(quad_max(maximum));
    total = quad_sum(total);
    deficit = quad_sum(deficit);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(128, 3)
    row_statistics_kernel(AttentionStatistics arguments, float2* softmax, StatisticsPlan plan) {
  using Block = ScoreBlock<T, D>;
  Block block{arguments.shape, plan};
  float* log_weights = block.column_numbers;
  for (int j = block.thread; j < block.chunks * kChunk; j += block.threads) {
    log_weights[j] = j < plan.streamed ? block.log_weight(arguments.weights, j) : -INFINITY;
  }
  float scale = arguments.shape.scale * log2_e;
  bool is_causal = arguments.shape.is_causal;
  // Chunks with keys that the block's last query sees, and the keys that all of the warp's see.
  int end = block.chunks, seen_by_all = INT_MAX;
  if (is_causal) {
    int seen = (block.part + 1) * block.warps * kHeldRows<T>;
    end = min(end, (seen + kChunk - 1) / kChunk);
    seen_by_all = block.first + 1;
  }
  RowSums sums[Block::kHeld][2];
  auto step = [&](typename Block::Scores& scores, int start) {
    TIR_UNROLL
    for (int j = 0; j < Block::kTiles; ++j) {
      float2 both = *reinterpret_cast<const float2*>(log_weights + start + block.column(j));
      TIR_UNROLL
      for (int m = 0; m < Block::kHeld; ++m) {
        TIR_UNROLL
        for (int e = 0; e < 4; ++e) {
          float log_weight = e % 2 == 0 ? both.x : both.y;
          float exponent = scores[m][j][e] * scale + log_weight;
          scores[m][j][e] = log_weight == -INFINITY ? -INFINITY : exponent;
        }
      }
    }
    if (start + kChunk > seen_by_all) block.template hide_later_keys<false>(scores, start);
    TIR_UNROLL
    for (int m = 0; m < Block::kHeld; ++m) {
      TIR_UNROLL
      for (int r = 0; r < 2; ++r) sums[m][r].add(scores[m], r);
    }
  };
  block.stream(arguments.query, arguments.key, 0, end, step);

  TIR_UNROLL
  for (int m = 0; m < Block::kHeld; ++m) {
    TIR_UNROLL
    for (int r = 0; r < 2; ++r) {
      RowSums& row = sums[m][r];
      row.merge_lanes();
      if (!block.is_stored(m, r)) continue;
      int64_t index = block.place(m, r);
      bool is_empty = row.total == 0.0f;
      float log_total = log2f(row.total), inverse = 1.0f / row.total;
      arguments.log_sum_exp[index] = is_empty ? -INFINITY : (row.maximum + log_total) * ln_2;
      arguments.entropy[index] = is_empty ? 0.0f : (log_total + row.deficit * inverse) * ln_2;
      softmax[index] = is_empty ? kNoSoftmax : float2{row.maximum, inverse};
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(128, 3)
    column_statistics_kernel(AttentionStatistics arguments, const float2* softmax,
                             StatisticsPlan plan) {
  using Block = ScoreBlock<T, D>;
  Block block{arguments.shape, plan};
  float2* softmax_of = reinterpret_cast<float2*>(block.column_numbers);
  for (int i = block.thread; i < block.chunks * kChunk; i += block.threads) {
    softmax_of[i] =
        i < plan.streamed ? softmax[block.head_index * plan.streamed + i] : kNoSoftmax;
  }
  int num_prefix_tokens = static_cast<int>(arguments.num_prefix_tokens);
  typename Block::PerRow log_weights, from_prefix = {}, from_patches = {};
  TIR_UNROLL
  for (int m = 0; m < Block::kHeld; ++m) {
    TIR_UNROLL
    for (int r = 0; r < 2; ++r) {
      int key = min(block.row(m, r), plan.stationary - 1);
      log_weights[m][r] = block.log_weight(arguments.weights, key);
    }
  }
  float scale = arguments.shape.scale * log2_e;
  // The first chunk with queries that see the block's first key, or the last where none does; and
  // the first query that sees all of the warp's.
  int begin = 0, sees_all = 0;
  if (arguments.shape.is_causal) {
    begin = min(block.part * block.warps * kHeldRows<T> / kChunk, block.chunks - 1);
    sees_all = block.first + kHeldRows<T> - 1;
  }
  auto step = [&](typename Block::Scores& scores, int start) {
    typename Block::PerRow prefix = {}, patches = {};  // of a chunk, for the reason in RowSums
    TIR_UNROLL
    for (int m = 0; m < Block::kHeld; ++m) {
      TIR_UNROLL
      for (int j = 0; j < Block::kTiles; ++j) {
        TIR_UNROLL
        for (int e = 0; e < 4; ++e) {
          // Rounded as in the row's softmax, so that the largest exponent less the maximum is 0.
          scores[m][j][e] = scores[m][j][e] * scale + log_weights[m][e / 2];
        }
      }
    }
    if (start < sees_all) block.template hide_later_keys<true>(scores, start);
    TIR_UNROLL
    for (int j = 0; j < Block::kTiles; ++j) {
      int column = start + block.column(j);
      float4 both = *reinterpret_cast<const float4*>(softmax_of + column);
      TIR_UNROLL
      for (int m = 0; m < Block::kHeld; ++m) {
        TIR_UNROLL
        for (int e = 0; e < 4; ++e) {
          float maximum = e % 2 == 0 ? both.x : both.z, inverse = e % 2 == 0 ? both.y : both.w;
          float probability = power_of_two(scores[m][j][e] - maximum) * inverse;
          bool is_prefix = column + e % 2 < num_prefix_tokens;
          prefix[m][e / 2] += is_prefix ? probability : 0.0f;
          patches[m][e / 2] += is_prefix ? 0.0f : probability;
        }
      }
    }
    TIR_UNROLL
    for (int m = 0; m < Block::kHeld; ++m) {
      TIR_UNROLL
      for (int r = 0; r < 2; ++r) {
        from_prefix[m][r] += prefix[m][r];
        from_patches[m][r] += patches[m][r];
      }
    }
  };
  block.stream(arguments.key, arguments.query, begin, block.chunks, step);

  // A mean over no queries is 0.
  float prefix_queries = fmaxf(static_cast<float>(num_prefix_tokens), 1.0f);
  float patch_queries = fmaxf(static_cast<float>(plan.streamed - num_prefix_tokens), 1.0f);
  TIR_UNROLL
  for (int m = 0; m < Block::kHeld; ++m) {
    TIR_UNROLL
    for (int r = 0; r < 2; ++r) {
      float prefix = quad_sum(from_prefix[m][r]) / prefix_queries;
      float patches = quad_sum(from_patches[m][r]) / patch_queries;
      if (!block.is_stored(m, r)) continue;
      // Not even the NaN of a query gets to a key that is not attended to.
      bool is_attended_to = log_weights[m][r] != -INFINITY;
      int64_t index = block.place(m, r);
      arguments.received_from_prefix[index] = is_attended_to ? prefix : 0.0f;
      arguments.received_from_patches[index] = is_attended_to ? patches : 0.0f;
    }
  }
}

template <class T, int D, auto kKernel, class Softmax>
void launch_one(const AttentionStatistics& arguments, Softmax* softmax, StatisticsPlan plan,
                Stream stream) {
  constexpr int64_t kRowBytes = kPitch<T, D> * sizeof(T);
  int tiles = (plan.stationary + kHeldRows<T> - 1) / kHeldRows<T>;
  auto bytes = [&](int warps) {
    return round_up(plan.streamed, kChunk) * int64_t{8} +
           (warps * kHeldRows<T> + 2 * kChunk) * kRowBytes;
  };
  int warps = fitting_warps(kName, std::min(tiles, 4), device(kName).shared_memory, bytes);
  plan.parts = (tiles + warps - 1) / warps;
  launch<kKernel>(kName, arguments.shape.batch * arguments.shape.heads * plan.parts, warps * kWarp,
                  bytes(warps), stream, arguments, softmax, plan);
}

template <class T, int D>
void launch_statistics(const AttentionStatistics& arguments, float2* softmax, Stream stream) {
  const AttentionShape& shape = arguments.shape;
  StatisticsPlan plan{};
  plan.is_aligned =
      rows_are_aligned(shape, arguments.query) && rows_are_aligned(shape, arguments.key);
  plan.stationary = static_cast<int>(shape.queries);
  plan.streamed = static_cast<int>(shape.length);
  launch_one<T, D, &row_statistics_kernel<T, D>>(arguments, softmax, plan, stream);
  std::swap(plan.stationary, plan.streamed);
  launch_one<T, D, &column_statistics_kernel<T, D>>(
      arguments, static_cast<const float2*>(softmax), plan, stream);
}

}  // namespace

template <>
void attention_statistics_of<TIR_ELEMENT>(const AttentionStatistics& arguments, float* softmax,
                                          Stream stream) {
  with_head_dim(kName, arguments.shape.head_dim, [&](auto head_dim) {
    launch_statistics<TIR_ELEMENT, decltype(head_dim)::value>(
        arguments, reinterpret_cast<float2*>(softmax), stream);
  });
}

}  // namespace tir::cuda
