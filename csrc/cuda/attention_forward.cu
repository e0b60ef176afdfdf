// Weighted attention, forward: A[i, j] = w[j] exp(s[i, j]) / sum_j w[j] exp(s[i, j]).
//
// A block serves query rows of one head, 16 or 32 a warp at a time. Keys and values stay in shared
// memory where they fit, so that they are read once; otherwise chunks of them pass through. The
// softmax is an online one over the chunks.
#include "cuda/forward_plan.h"

namespace tir::cuda {
namespace {

using forward::kChunk;
using forward::kHeldTiles;

// Scores become exponents of 2, -inf for keys that are not attended to. Lane t's biases begin at
// column 2 t.
template <int M, int N>
TIR_DEVICE void add_biases(float (&scores)[M][N][4], const float* biases, float scale) {
  TIR_UNROLL
  for (int j = 0; j < N; ++j) {
    float2 bias = *reinterpret_cast<const float2*>(biases + 8 * j);
    TIR_UNROLL
    for (int m = 0; m < M; ++m) {
      TIR_UNROLL
      for (int e = 0; e < 4; ++e) {
        float added = e % 2 == 0 ? bias.x : bias.y;
        scores[m][j][e] = added == -INFINITY ? -INFINITY : scores[m][j][e] * scale + added;
      }
    }
  }
}

// Turns exponents into powers of two relative to the largest exponent so far, adds them up, and
// brings what was summed before to the same scale.
template <int N, int O>
TIR_DEVICE void online_softmax_update(float (&exponents)[N][4], float (&maximum)[2],
                                      float (&total)[2], float (&output)[O][4]) {
  float largest[2] = {maximum[0], maximum[1]};
  TIR_UNROLL
  for (int j = 0; j < N; ++j) {
    TIR_UNROLL
    for (int e = 0; e < 4; ++e) largest[e / 2] = fmaxf(largest[e / 2], exponents[j][e]);
  }
  float shift[2], correction[2];
  TIR_UNROLL
  for (int r = 0; r < 2; ++r) {
    largest[r] = quad_max(largest[r]);
    // While nothing was attended to, -inf - -inf would be NaN where the power must be 0.
    shift[r] = largest[r] == -INFINITY ? 0.0f : largest[r];
    correction[r] = power_of_two(maximum[r] - shift[r]);
    maximum[r] = largest[r];
    total[r] *= correction[r];
  }
  TIR_UNROLL
  for (int j = 0; j < N; ++j) {
    TIR_UNROLL
    for (int e = 0; e < 4; ++e) {
      exponents[j][e] = power_of_two(exponents[j][e] - shift[e / 2]);
      total[e / 2] += exponents[j][e];
    }
  }
  if (__any_sync(kAllLanes, correction[0] != 1.0f || correction[1] != 1.0f)) {
    TIR_UNROLL
    for (int j = 0; j < O; ++j) {
      TIR_UNROLL
      for (int e = 0; e < 4; ++e) output[j][e] *= correction[e / 2];
    }
  }
}

// The query rows that a warp has at a time, and their softmax and outputs over the keys so far.
template <class T, int D>
struct QueryRows {
  static constexpr int kHeld = kHeldTiles<T, D>;

  int first, lane;
  LeftRows<T, D, D / 16> queries[kHeld];
  float output[kHeld][D / 8][4] = {};
  float maximum[kHeld][2], total[kHeld][2];

  TIR_DEVICE QueryRows(int first_row, int own_lane) : first(first_row), lane(own_lane) {
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      maximum[m][0] = maximum[m][1] = -INFINITY;
      total[m][0] = total[m][1] = 0.0f;
    }
  }

  TIR_DEVICE void take(const T* rows) {
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) queries[m].take(rows + m * kRows * kPitch<T, D>, lane);
  }

  // Attends to 8 N keys. `hide` may set to -inf what exponents [row, key] it will.
  template <int N, class Hide>
  TIR_DEVICE void attend(const T* keys, const T* values, const float* biases, float scale,
                         T* staging, Hide hide) {
    float scores[kHeld][N][4] = {};
    multiply_transposed(scores, queries, keys, N, lane);
    add_biases(scores, biases + 2 * (lane % 4), scale);
    hide(scores);
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      online_softmax_update(scores[m], maximum[m], total[m], output[m]);
    }
    multiply<T, D>(output, scores, values, N, staging, lane);
  }

  // Hides keys that come after a row's own query; `start` is the first of the keys.
  template <int N>
  TIR_DEVICE void hide_later(float (&exponents)[kHeld][N][4], int start) const {
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      TIR_UNROLL
      for (int j = 0; j < N; ++j) {
        TIR_UNROLL
        for (int e = 0; e < 4; ++e) {
          int key = start + 8 * j + 2 * (lane % 4) + e % 2;
          if (key > first + m * kRows + lane / 4 + 8 * (e / 2)) exponents[m][j][e] = -INFINITY;
        }
      }
    }
  }

  // Writes outputs and logarithms of sums; the warp's own tile serves on the way.
  TIR_DEVICE void store(T* tile, const ResultRows<T>& rows, float* log_sum_exp) const {
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      float inverse[2];
      TIR_UNROLL
      for (int r = 0; r < 2; ++r) {
        float sum = quad_sum(total[m][r]);
        inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
        int row = first + m * kRows + lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < rows.count) {
          log_sum_exp[row] = sum == 0.0f ? -INFINITY : (maximum[m][r] + log2f(sum)) * ln_2;
        }
      }
      store_rows<T, D>(output[m], inverse[0], inverse[1], tile + m * kRows * kPitch<T, D>, rows,
                       first + m * kRows, lane);
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(128, 2)
    attention_forward_kernel(AttentionForward arguments, KeyWeights derived, forward::Plan plan) {
  constexpr int kSize = kChunk<T, D>, kTiles = kSize / 8, kHeld = kHeldTiles<T, D>;
  constexpr int kHeldRows = kHeld * kRows;
  const AttentionShape& shape = arguments.shape;
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int warp = thread / kWarp, warps = threads / kWarp, lane = thread % kWarp;
  int length = static_cast<int>(shape.length), num_queries = static_cast<int>(shape.queries);
  int block = static_cast<int>(blockIdx.x), heads = static_cast<int>(shape.heads);
  int head_index = block / plan.blocks_per_head;
  int batch = head_index / heads, head = head_index % heads;
  // Scores and outputs leave few registers: what the loop over keys does not need is found anew.
  auto part = [&] { return anew(block) % plan.blocks_per_head; };
  int all_chunks = (length + kSize - 1) / kSize;

  float* biases = reinterpret_cast<float*>(shared_memory());
  T* staging = reinterpret_cast<T*>(biases + all_chunks * kSize);
  auto own_rows = [&] { return staging + anew(warp) * kHeldRows * kPitch<T, D>; };
  T* own_scores = staging + warps * kHeldRows * kPitch<T, D> + warp * kStaging<T, kTiles>;
  T* keys = staging + warps * (kHeldRows * kPitch<T, D> + kStaging<T, kTiles>);
  T* values = keys + plan.slot_rows * kPitch<T, D>;

  auto rows_of = [&](const RowGrid& grid, int count) {
    return rows_of_head<T>(grid, shape, count, anew(batch), anew(head), plan.is_aligned);
  };
  auto rows_in = [&](int chunk) { return min(kSize, round_up(length - chunk * kSize, kRows)); };
  // Where a chunk lies; where chunks pass through, they take turns in two places.
  auto slot = [&](int turn, int chunk) {
    return (plan.resident ? chunk : turn) * kSize * kPitch<T, D>;
  };
  auto load_keys = [&](int turn, int chunk) {
    load_tile<T, D>(keys + slot(turn, chunk), rows_of(arguments.key, length), chunk * kSize,
                    rows_in(chunk), anew(thread), threads, KeepAll());
  };
  auto load_values = [&](int turn, int chunk) {
    load_tile<T, D>(values + slot(turn, chunk), rows_of(arguments.value, length), chunk * kSize,
                    rows_in(chunk), anew(thread), threads, KeepAll());
  };
  // A value that is not attended to becomes 0, since 0 times its NaN would not be. Keys need no
  // such care: their scores are replaced.
  auto clear_values = [&](int turn, int chunk) {
    auto is_kept = [&](int row) { return biases[row] != -INFINITY; };
    int start = chunk * kSize, end = min(length, start + kSize);
    bool all_kept = true;
    for (int row = start + lane; row < end; row += kWarp) all_kept &= is_kept(row);
    if (!__any_sync(kAllLanes, !all_kept)) return;
    clear_rows<T, D>(values + slot(turn, chunk), start, rows_in(chunk), anew(thread), threads,
                     is_kept);
  };

  load_keys(0, 0);
  load_values(0, 0);
  commit_copies();
  const int32_t* counts = stored_counts(derived, batch, length);
  for (int j = thread; j < all_chunks * kSize; j += threads) {
    float weight = 0.0f;
    if (j < length) weight = key_weight(arguments.weights, derived, counts, batch, length, j);
    biases[j] = is_attended(weight) ? log2f(weight) : -INFINITY;
  }
  __syncthreads();

  float scale = shape.scale * log2_e;
  int tiles = (num_queries + kHeldRows - 1) / kHeldRows;
  int rounds = (tiles + plan.blocks_per_head * warps - 1) / (plan.blocks_per_head * warps);
  // The last rows come first: under causality they see most keys, which then are there for others.
  for (int round = rounds - 1, turn = 0; round >= 0; --round) {
    int first_tile = (round * plan.blocks_per_head + part()) * warps;
    int first = (first_tile + warp) * kHeldRows;
    // Keys that the block's rows see, then those that the warp's do: none, if it has no rows. It
    // goes along, since barriers are for all.
    int seen = length, own_seen = first < num_queries ? length : 0;
    // Of the latter, those that pass in whole chunks which all of the warp's rows see; of the last
    // chunk, rows are loaded by sixteens.
    int whole = round_up(own_seen, kRows) / kSize;
    if (shape.is_causal) {
      seen = min(length, min(num_queries, (first_tile + warps) * kHeldRows));
      own_seen = min(own_seen, first + kHeldRows);
      whole = min(whole, first / kSize);
    }
    int chunks = (seen + kSize - 1) / kSize;
    load_tile<T, D>(own_rows(), rows_of(arguments.query, num_queries), first, kHeldRows,
                    anew(lane), kWarp, KeepAll());
    commit_copies();
    QueryRows<T, D> rows(first, lane);
    bool is_loading = round == rounds - 1 || !plan.resident;
    for (int chunk = 0; chunk < chunks; ++chunk, turn ^= 1) {
      if (is_loading || chunk == 0) wait_for_copies<0>();
      if (is_loading) {
        clear_values(turn, chunk);
        // Everyone's copies are in, and everyone is done with the slot that is filled next.
        __syncthreads();
        int next = chunk + 1 < chunks ? chunk + 1 : 0;
        if (next > 0 || (!plan.resident && round > 0)) {
          load_keys(turn ^ 1, next);
          load_values(turn ^ 1, next);
          commit_copies();
        }
      } else {
        __syncwarp();
      }
      if (chunk == 0) rows.take(own_rows());

      int start = chunk * kSize, place = slot(turn, chunk);
      if (chunk < whole) {
        rows.template attend<kTiles>(keys + place, values + place, biases + start, scale,
                                     own_scores, [](auto&) {});
        continue;
      }
      // A whole chunk for a few keys would take as long as for many.
      TIR_NO_UNROLL
      for (int passed = 0; start + passed < own_seen; passed += kRows) {
        rows.template attend<kRows / 8>(
            keys + place + passed * kPitch<T, D>, values + place + passed * kPitch<T, D>,
            biases + start + passed, scale, own_scores, [&](auto& exponents) {
              if (shape.is_causal) rows.hide_later(exponents, start + passed);
            });
      }
    }
    rows.store(own_rows(),
               rows_of_head<T>(arguments.output, shape, num_queries, anew(batch), anew(head)),
               arguments.log_sum_exp + int64_t{anew(head_index)} * num_queries);
  }
}

template <class T, int D>
void launch_forward(const AttentionForward& arguments, const KeyWeights& derived,
                    Stream stream) {
  constexpr const char* kName = "weighted_attention";
  const AttentionShape& shape = arguments.shape;
  forward::Plan plan = forward::plan<T, D>(kName, shape, device(kName));
  plan.is_aligned = rows_are_aligned(shape, arguments.query) &&
                    rows_are_aligned(shape, arguments.key) &&
                    rows_are_aligned(shape, arguments.value);
  launch<&attention_forward_kernel<T, D>>(
      kName, shape.batch * shape.heads * plan.blocks_per_head, plan.warps * kWarp,
      plan.shared_bytes, stream, arguments, derived, plan);
}

}  // namespace

template <>
void attention_forward_of<TIR_ELEMENT>(const AttentionForward& arguments,
                                       const KeyWeights& derived, Stream stream) {
  with_head_dim("weighted_attention", arguments.shape.head_dim, [&](auto head_dim) {
    launch_forward<TIR_ELEMENT, decltype(head_dim)::value>(arguments, derived, stream);
  });
}

}  // namespace tir::cuda
