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

// Turns a chunk's scores into powers of two relative to the largest score so far, adds them up, and
// brings what was summed before to the same scale. Lane t's biases begin at column 2 t.
template <int N, int O>
TIR_DEVICE void online_softmax_update(float (&scores)[N][4], const float* biases, float scale,
                                      float (&maximum)[2], float (&total)[2],
                                      float (&output)[O][4]) {
  float largest[2] = {maximum[0], maximum[1]};
  TIR_UNROLL
  for (int j = 0; j < N; ++j) {
    float2 bias = *reinterpret_cast<const float2*>(biases + 8 * j);
    TIR_UNROLL
    for (int e = 0; e < 4; ++e) {
      float added = e % 2 == 0 ? bias.x : bias.y;
      scores[j][e] = added == -INFINITY ? -INFINITY : scores[j][e] * scale + added;
      largest[e / 2] = fmaxf(largest[e / 2], scores[j][e]);
    }
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
      scores[j][e] = power_of_two(scores[j][e] - shift[e / 2]);
      total[e / 2] += scores[j][e];
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

template <class T, int D>
__global__ void __launch_bounds__(128, 2)
    attention_forward_kernel(AttentionForward arguments, KeyWeights derived, forward::Plan plan) {
  constexpr int kTiles = kChunk<T, D> / 8, kHeld = kHeldTiles<T, D>;
  const AttentionShape& shape = arguments.shape;
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int warp = thread / kWarp, warps = threads / kWarp, lane = thread % kWarp;
  int length = static_cast<int>(shape.length);
  int64_t head_index = blockIdx.x / plan.blocks_per_head;
  int part = static_cast<int>(blockIdx.x % plan.blocks_per_head);
  int64_t batch = head_index / shape.heads, head = head_index % shape.heads;
  int chunks = (length + kChunk<T, D> - 1) / kChunk<T, D>;

  float* biases = reinterpret_cast<float*>(shared_memory());
  T* staging = reinterpret_cast<T*>(biases + chunks * kChunk<T, D>);
  T* own_rows = staging + warp * kHeld * kRows * kPitch<T, D>;
  T* own_scores = staging + warps * kHeld * kRows * kPitch<T, D> + warp * kStaging<T, kTiles>;
  T* keys = staging + warps * (kHeld * kRows * kPitch<T, D> + kStaging<T, kTiles>);
  T* values = keys + plan.slot_rows * kPitch<T, D>;

  auto query_rows = rows_of_head<T>(arguments.query, shape, batch, head, plan.is_aligned);
  auto key_rows = rows_of_head<T>(arguments.key, shape, batch, head, plan.is_aligned);
  auto value_rows = rows_of_head<T>(arguments.value, shape, batch, head, plan.is_aligned);
  // A value that is not attended to becomes 0, since 0 times its NaN would not be. Keys need no
  // such care: their scores are replaced.
  auto is_kept = [&](int row) { return biases[row] != -INFINITY; };
  auto rows_in = [&](int chunk) {
    return min(kChunk<T, D>, round_up(length - chunk * kChunk<T, D>, kRows));
  };
  auto slot = [&](int step, int chunk) {
    return (plan.resident ? chunk : step % 2) * kChunk<T, D> * kPitch<T, D>;
  };
  auto load_keys = [&](int step, int chunk) {
    load_tile<T, D>(keys + slot(step, chunk), key_rows, chunk * kChunk<T, D>, rows_in(chunk),
                    thread, threads, KeepAll());
  };
  auto load_values = [&](int step, int chunk) {
    load_tile<T, D>(values + slot(step, chunk), value_rows, chunk * kChunk<T, D>, rows_in(chunk),
                    thread, threads, is_kept);
  };

  load_keys(0, 0);
  const int32_t* counts = stored_counts(derived, batch, length);
  if (plan.select) {
    int num_patches = length - static_cast<int>(derived.num_prefix_tokens);
    const float* relevance = derived.relevance + batch * derived.num_classes * num_patches;
    const int32_t* found = find_counts(relevance, static_cast<int>(derived.num_classes),
                                       num_patches, static_cast<int>(derived.top_k), values);
    if (head == 0 && part == 0) {
      int32_t* stored = derived.counts + batch * num_patches;
      for (int n = thread; n < num_patches; n += threads) stored[n] = found[n];
    }
    counts = found;
  }
  for (int j = thread; j < chunks * kChunk<T, D>; j += threads) {
    float weight = 0.0f;
    if (j < length) weight = key_weight(arguments.weights, derived, counts, batch, length, j);
    biases[j] = is_attended(weight) ? log2f(weight) : -INFINITY;
  }
  __syncthreads();
  load_values(0, 0);
  commit_copies();

  float scale = shape.scale * log2_e;
  int tiles = (length + kHeld * kRows - 1) / (kHeld * kRows);
  int rounds = (tiles + plan.blocks_per_head * warps - 1) / (plan.blocks_per_head * warps);
  for (int round = 0; round < rounds; ++round) {
    int first = ((round * plan.blocks_per_head + part) * warps + warp) * kHeld * kRows;
    // A warp without rows goes along, since barriers are for all; it loads and multiplies zeros.
    load_tile<T, D>(own_rows, query_rows, first, kHeld * kRows, lane, kWarp, KeepAll());
    commit_copies();
    LeftRows<T, D, true> query[kHeld];
    float output[kHeld][D / 8][4] = {};
    float maximum[kHeld][2], total[kHeld][2];
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      maximum[m][0] = maximum[m][1] = -INFINITY;
      total[m][0] = total[m][1] = 0.0f;
    }
    bool is_loading = round == 0 || !plan.resident;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int step = round * chunks + chunk;
      if (is_loading || chunk == 0) wait_for_copies<0>();
      if (is_loading) {
        // Everyone's copies are in, and everyone is done with the slot that is filled next.
        __syncthreads();
        int next = chunk + 1 < chunks ? chunk + 1 : 0;
        if (next > 0 || (!plan.resident && round + 1 < rounds)) {
          load_keys(step + 1, next);
          load_values(step + 1, next);
          commit_copies();
        }
      } else {
        __syncwarp();
      }
      if (chunk == 0) {
        TIR_UNROLL
        for (int m = 0; m < kHeld; ++m) {
          query[m].take(own_rows + m * kRows * kPitch<T, D>, lane);
        }
      }

      int used = min(kTiles, 2 * ((length - chunk * kChunk<T, D> + 15) / 16));
      float scores[kHeld][kTiles][4] = {};
      multiply_transposed(scores, query, keys + slot(step, chunk), used, lane);
      const float* chunk_biases = biases + chunk * kChunk<T, D> + 2 * (lane % 4);
      TIR_UNROLL
      for (int m = 0; m < kHeld; ++m) {
        online_softmax_update(scores[m], chunk_biases, scale, maximum[m], total[m], output[m]);
      }
      multiply<T, D>(output, scores, values + slot(step, chunk), used, own_scores, lane);
    }

    T* target = static_cast<T*>(arguments.output) + head_index * length * shape.head_dim;
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      float inverse[2];
      TIR_UNROLL
      for (int r = 0; r < 2; ++r) {
        float sum = quad_sum(total[m][r]);
        inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
        int row = first + m * kRows + lane / 4 + 8 * r;
        if (lane % 4 == 0 && row < length) {
          arguments.log_sum_exp[head_index * length + row] =
              sum == 0.0f ? -INFINITY : (maximum[m][r] + log2f(sum)) * ln_2;
        }
      }
      store_rows<T, D>(output[m], inverse[0], inverse[1], own_rows + m * kRows * kPitch<T, D>,
                       target, first + m * kRows, length, static_cast<int>(shape.head_dim), lane);
    }
  }
}

template <class T, int D>
void launch_forward(const AttentionForward& arguments, const KeyWeights& derived,
                    Stream stream) {
  constexpr const char* kName = "weighted_attention";
  const AttentionShape& shape = arguments.shape;
  forward::Plan plan = forward::plan<T, D>(kName, shape, derived, device(kName));
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
