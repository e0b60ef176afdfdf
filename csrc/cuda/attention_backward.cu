// Weighted attention, backward, without atomics, so that the same inputs give the same bits.
//
// First delta[i] = grad_output[i] . output[i]. Then one kernel in whose blocks every warp holds 16
// or 32 rows still while the others pass by: either keys, for the gradients of keys, values and weights,
// or queries, for theirs. Both need the scores and the gradients of the probabilities, with rows
// and columns exchanged. Last, where wanted, the weights' gradients are summed over the heads.
#include <algorithm>

#include "cuda/heads.cuh"

namespace tir::cuda {
namespace {

constexpr const char* kName = "weighted_attention (backward)";
constexpr float kMaxPowerOfTwo = max_exponent * log2_e;

// 16-row tiles that a warp holds: with two, what is read of the passing rows serves twice. Wider
// heads leave no registers for the sums of two.
template <class T, int D>
constexpr int kHeldTiles = kHasTensorCores<T> && D <= 64 ? 2 : 1;

// Rows that are loaded at a time, and those of them that are multiplied at a time.
template <class T, int D>
constexpr int kChunk = kHasTensorCores<T> || D <= 96 ? 32 : 16;
template <class T, int D>
constexpr int kStep = kHeldTiles<T, D> == 2 ? 16 : kChunk<T, D>;

struct BackwardPlan {
  int parts;  // blocks that hold keys, and that hold queries, of each head
  bool is_aligned;
};

// Base-2 logarithm of a row's sum, negated; -inf for rows that attend to nothing.
TIR_DEVICE float negative_log_sum(float log_sum) {
  return log_sum == -INFINITY ? -INFINITY : -log_sum * log2_e;
}

template <class T, int D, bool kHoldsKeys>
TIR_DEVICE void accumulate(const AttentionBackward& arguments, const KeyWeights& derived,
                           const float* delta, float* partial, int64_t head_index, int part,
                           bool is_aligned) {
  constexpr int kSize = kChunk<T, D>, kTiles = kStep<T, D> / 8;
  constexpr int kHeld = kHeldTiles<T, D>, kHeldRows = kHeld * kRows;
  const AttentionShape& shape = arguments.shape;
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int warp = thread / kWarp, warps = threads / kWarp, lane = thread % kWarp;
  int length = static_cast<int>(shape.length), head_dim = static_cast<int>(shape.head_dim);
  int64_t batch = head_index / shape.heads, head = head_index % shape.heads;
  int chunks = (length + kSize - 1) / kSize;
  const float* log_sums = arguments.log_sum_exp + head_index * length;
  delta += head_index * length;

  float* column_shifts = reinterpret_cast<float*>(shared_memory());
  float* column_deltas = column_shifts + chunks * kSize;
  T* held = reinterpret_cast<T*>(column_deltas + chunks * kSize);
  T* own_first = held + warp * 2 * kHeldRows * kPitch<T, D>;
  T* own_second = own_first + kHeldRows * kPitch<T, D>;
  T* passing = held + warps * 2 * kHeldRows * kPitch<T, D>;
  T* own_staging = passing + 4 * kSize * kPitch<T, D> + warp * kStaging<T, kTiles>;

  auto queries = rows_of_head<T>(arguments.query, shape, batch, head, is_aligned);
  auto grads = rows_of_head<T>(arguments.grad_output, shape, batch, head, is_aligned);
  auto keys = rows_of_head<T>(arguments.key, shape, batch, head, is_aligned);
  auto values = rows_of_head<T>(arguments.value, shape, batch, head, is_aligned);
  const int32_t* counts = stored_counts(derived, batch, length);
  auto weight_of = [&](int key) {
    return key_weight(arguments.weights, derived, counts, batch, length, key);
  };

  int first = (part * warps + warp) * kHeldRows;
  load_tile<T, D>(own_first, kHoldsKeys ? keys : queries, first, kHeldRows, lane, kWarp,
                  KeepAll());
  load_tile<T, D>(own_second, kHoldsKeys ? values : grads, first, kHeldRows, lane, kWarp,
                  KeepAll());

  // exponent = scale score + shift of the row + shift of the column: that of a key is the logarithm
  // of its weight, that of a query its negative log-sum. A column at -inf is not there.
  for (int i = thread; i < chunks * kSize; i += threads) {
    float shift = -INFINITY, difference = 0.0f;
    if (i < length) {
      if (kHoldsKeys) {
        shift = negative_log_sum(log_sums[i]);
        difference = delta[i];
      } else {
        float weight = weight_of(i);
        if (is_attended(weight)) shift = log2f(weight);
      }
    }
    column_shifts[i] = shift;
    column_deltas[i] = difference;
  }
  __syncthreads();

  float row_shift[kHeld][2], row_delta[kHeld][2], weight[kHeld][2], weight_sum[kHeld][2];
  TIR_UNROLL
  for (int m = 0; m < kHeld; ++m) {
    TIR_UNROLL
    for (int r = 0; r < 2; ++r) {
      int row = min(first + m * kRows + lane / 4 + 8 * r, length - 1);
      weight_sum[m][r] = 0.0f;
      if (kHoldsKeys) {
        weight[m][r] = weight_of(row);
        // Without attention the shift is that of weight 1: the derivative by the weight itself has
        // a limit at 0. What such a key sums up for key and value is dropped at the end.
        row_shift[m][r] = is_attended(weight[m][r]) ? log2f(weight[m][r]) : 0.0f;
        row_delta[m][r] = 0.0f;
      } else {
        row_shift[m][r] = negative_log_sum(log_sums[row]);
        row_delta[m][r] = delta[row];
      }
    }
  }

  // 0 times the NaN of a key that is not attended to would not be 0.
  auto is_kept = [&](int row) { return kHoldsKeys || column_shifts[row] != -INFINITY; };
  auto slot = [&](int chunk) { return passing + chunk % 2 * 2 * kSize * kPitch<T, D>; };
  auto load = [&](int chunk) {
    int rows = min(kSize, round_up(length - chunk * kSize, kRows));
    T* target = slot(chunk);
    load_tile<T, D>(target, kHoldsKeys ? queries : keys, chunk * kSize, rows, thread, threads,
                    is_kept);
    load_tile<T, D>(target + kSize * kPitch<T, D>, kHoldsKeys ? grads : values, chunk * kSize,
                    rows, thread, threads, is_kept);
    commit_copies();
  };
  load(0);

  constexpr bool kHold = kHeld == 1 && D <= 64;  // more would not leave registers for the sums
  LeftRows<T, D, kHold> left_first[kHeld], left_second[kHeld];
  float sum_first[kHeld][D / 8][4] = {};                    // of keys, or of queries
  float sum_second[kHeld][kHoldsKeys ? D / 8 : 1][4] = {};  // of values
  float scale = shape.scale * log2_e;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies<0>();
    __syncthreads();  // all copies are in, and the slot that is filled next is read no more
    if (chunk + 1 < chunks) load(chunk + 1);
    if (chunk == 0) {
      TIR_UNROLL
      for (int m = 0; m < kHeld; ++m) {
        left_first[m].take(own_first + m * kRows * kPitch<T, D>, lane);
        left_second[m].take(own_second + m * kRows * kPitch<T, D>, lane);
      }
    }
    int end = min(length, (chunk + 1) * kSize);
    TIR_NO_UNROLL
    for (int start = chunk * kSize; start < end; start += kStep<T, D>) {
      const T* passing_first = slot(chunk) + (start - chunk * kSize) * kPitch<T, D>;
      const T* passing_second = passing_first + kSize * kPitch<T, D>;
      int used = min(kTiles, 2 * ((end - start + 15) / 16));
      float scores[kHeld][kTiles][4] = {}, grad_scores[kHeld][kTiles][4] = {};
      multiply_transposed(scores, left_first, passing_first, used, lane);
      multiply_transposed(grad_scores, left_second, passing_second, used, lane);
      TIR_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        int column = start + 8 * j + 2 * (lane % 4);
        float2 shifts = *reinterpret_cast<const float2*>(column_shifts + column);
        float2 deltas = *reinterpret_cast<const float2*>(column_deltas + column);
        TIR_UNROLL
        for (int m = 0; m < kHeld; ++m) {
          TIR_UNROLL
          for (int e = 0; e < 4; ++e) {
            float shift = e % 2 == 0 ? shifts.x : shifts.y;
            float column_delta = e % 2 == 0 ? deltas.x : deltas.y;
            float difference = kHoldsKeys ? column_delta : row_delta[m][e / 2];
            float exponent = scores[m][j][e] * scale + (row_shift[m][e / 2] + shift);
            // The limit of a key without weight may overflow. NaN is not larger, and stays.
            if (kHoldsKeys && exponent > kMaxPowerOfTwo) exponent = kMaxPowerOfTwo;
            float probability = power_of_two(exponent);
            float grad = probability * (grad_scores[m][j][e] - difference);
            scores[m][j][e] = shift == -INFINITY ? 0.0f : probability;
            grad_scores[m][j][e] = shift == -INFINITY ? 0.0f : grad;
            weight_sum[m][e / 2] += grad_scores[m][j][e];
          }
        }
      }
      multiply<T, D>(sum_first, grad_scores, passing_first, used, own_staging, lane);
      if constexpr (kHoldsKeys) {
        multiply<T, D>(sum_second, scores, passing_second, used, own_staging, lane);
      }
    }
  }

  if constexpr (kHoldsKeys) {
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      TIR_UNROLL
      for (int r = 0; r < 2; ++r) {
        int row = first + m * kRows + lane / 4 + 8 * r;
        bool has_weight = is_attended(weight[m][r]);
        if (partial != nullptr) {
          float sum = quad_sum(weight_sum[m][r]);
          if (has_weight) sum /= weight[m][r];
          if (lane % 4 == 0 && row < length) {
            partial[head_index * length + row] = weight[m][r] < 0.0f ? 0.0f : sum;
          }
        }
        if (has_weight) continue;
        TIR_UNROLL
        for (int j = 0; j < D / 8; ++j) {
          TIR_UNROLL
          for (int e = 2 * r; e < 2 * r + 2; ++e) sum_first[m][j][e] = sum_second[m][j][e] = 0.0f;
        }
      }
    }
  }
  int64_t offset = head_index * length * head_dim;
  T* target = static_cast<T*>(kHoldsKeys ? arguments.grad_key : arguments.grad_query) + offset;
  TIR_UNROLL
  for (int m = 0; m < kHeld; ++m) {
    int row = first + m * kRows, at = m * kRows * kPitch<T, D>;
    store_rows<T, D>(sum_first[m], shape.scale, shape.scale, own_first + at, target, row, length,
                     head_dim, lane);
    if constexpr (kHoldsKeys) {
      store_rows<T, D>(sum_second[m], 1.0f, 1.0f, own_second + at,
                       static_cast<T*>(arguments.grad_value) + offset, row, length, head_dim, lane);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(128, 2)
    attention_backward_kernel(AttentionBackward arguments, KeyWeights derived, const float* delta,
                              float* partial, BackwardPlan plan) {
  int64_t head_index = blockIdx.x / (2 * plan.parts);
  int part = static_cast<int>(blockIdx.x % (2 * plan.parts));
  if (part < plan.parts) {
    accumulate<T, D, true>(arguments, derived, delta, partial, head_index, part, plan.is_aligned);
  } else {
    accumulate<T, D, false>(arguments, derived, delta, nullptr, head_index, part - plan.parts,
                            plan.is_aligned);
  }
}

constexpr int kDeltaThreads = 256, kLanesPerRow = 8;

template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    delta_kernel(AttentionBackward arguments, float* delta, bool is_aligned) {
  const AttentionShape& shape = arguments.shape;
  int64_t rows = shape.batch * shape.heads * shape.length;
  int64_t row = int64_t{blockIdx.x} * (kDeltaThreads / kLanesPerRow) + threadIdx.x / kLanesPerRow;
  int lane = static_cast<int>(threadIdx.x % kLanesPerRow);
  float sum = 0.0f;
  if (row < rows) {
    int64_t head_index = row / shape.length, i = row % shape.length;
    int64_t batch = head_index / shape.heads, head = head_index % shape.heads;
    auto grads = rows_of_head<T>(arguments.grad_output, shape, batch, head, is_aligned);
    auto outputs = rows_of_head<T>(arguments.output, shape, batch, head, is_aligned);
    const T* left = grads.data + i * grads.stride;
    const T* right = outputs.data + i * outputs.stride;
    if (is_aligned) {
      constexpr int kStep = kVector<T>;
      for (int c = lane * kStep; c < grads.head_dim; c += kLanesPerRow * kStep) {
        struct alignas(16) Vector {
          T elements[kStep];
        };
        Vector a = *reinterpret_cast<const Vector*>(left + c);
        Vector b = *reinterpret_cast<const Vector*>(right + c);
        TIR_UNROLL
        for (int e = 0; e < kStep; ++e) sum += to_float(a.elements[e]) * to_float(b.elements[e]);
      }
    } else {
      for (int c = lane; c < grads.head_dim; c += kLanesPerRow) {
        sum += to_float(left[c]) * to_float(right[c]);
      }
    }
  }
  TIR_UNROLL
  for (int flip = 1; flip < kLanesPerRow; flip *= 2) sum += __shfl_xor_sync(kAllLanes, sum, flip);
  if (row < rows && lane == 0) delta[row] = sum;
}

constexpr int kSumThreads = 128;

// grad_weights [B, L] = partial [B, H, L] summed over H.
__global__ void __launch_bounds__(kSumThreads)
    sum_heads_kernel(const float* partial, float* grad_weights, int64_t batch, int64_t heads,
                     int64_t length) {
  int64_t index = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (index >= batch * length) return;
  const float* first = partial + index / length * heads * length + index % length;
  float sum = 0.0f;
  for (int64_t head = 0; head < heads; ++head) sum += first[head * length];
  grad_weights[index] = sum;
}

int64_t blocks_for(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

template <class T, int D>
void launch_backward(const AttentionBackward& arguments, const KeyWeights& derived, float* delta,
                     float* partial, Stream stream) {
  constexpr int kSize = kChunk<T, D>;
  constexpr int64_t kRowBytes = kPitch<T, D> * sizeof(T);
  const AttentionShape& shape = arguments.shape;
  int64_t heads = shape.batch * shape.heads, rows = heads * shape.length;
  bool is_aligned = rows_are_aligned(shape, arguments.grad_output);
  launch<&delta_kernel<T>>(kName, blocks_for(rows, kDeltaThreads / kLanesPerRow), kDeltaThreads,
                           0, stream, arguments, delta,
                           is_aligned && rows_are_aligned(shape, arguments.output));

  constexpr int kHeldRows = kHeldTiles<T, D> * kRows;
  int length = static_cast<int>(shape.length), tiles = (length + kHeldRows - 1) / kHeldRows;
  auto bytes = [&](int warps) {
    return round_up(length, kSize) * int64_t{8} + warps * 2 * kHeldRows * kRowBytes +
           4 * kSize * kRowBytes + warps * kStaging<T, kStep<T, D> / 8> * int64_t{sizeof(T)};
  };
  int warps = fitting_warps(kName, std::min(tiles, 4), device(kName).shared_memory, bytes);
  BackwardPlan plan;
  plan.parts = (tiles + warps - 1) / warps;
  plan.is_aligned = is_aligned && rows_are_aligned(shape, arguments.query) &&
                    rows_are_aligned(shape, arguments.key) &&
                    rows_are_aligned(shape, arguments.value);
  launch<&attention_backward_kernel<T, D>>(kName, heads * 2 * plan.parts, warps * kWarp,
                                           bytes(warps), stream, arguments, derived,
                                           static_cast<const float*>(delta), partial, plan);
  if (arguments.grad_weights != nullptr) {
    launch<&sum_heads_kernel>(kName, blocks_for(shape.batch * shape.length, kSumThreads),
                              kSumThreads, 0, stream, static_cast<const float*>(partial),
                              arguments.grad_weights, shape.batch, shape.heads, shape.length);
  }
}

}  // namespace

template <>
void attention_backward_of<TIR_ELEMENT>(const AttentionBackward& arguments,
                                        const KeyWeights& derived, float* delta, float* partial,
                                        Stream stream) {
  with_head_dim(kName, arguments.shape.head_dim, [&](auto head_dim) {
    launch_backward<TIR_ELEMENT, decltype(head_dim)::value>(arguments, derived, delta, partial,
                                                         stream);
  });
}

}  // namespace tir::cuda
