// The steps that the kernels of the attention's backward pass are made of, and how parts of a
// head's rows take them.
//
// Every warp has 16 or 32 stationary rows of its own, the others of the head are streamed past all
// warps: keys are stationary and queries streamed for the gradients of keys, values and weights,
// and the other way round for those of queries. Each of the two kinds of rows is a pair: a key with
// its value, a query with the gradient of its output. Causality, where key j is hidden from the
// queries i < j, is compiled apart.
#pragma once

#include "cuda/backward_plan.h"
#include "cuda/held_keys.cuh"
#include "cuda/values.cuh"

namespace tir::cuda {

// Base-2 logarithm of a row's sum, negated; -inf for rows that attend to nothing.
TIR_DEVICE float negative_log_sum(float log_sum) {
  return log_sum == -INFINITY ? -INFINITY : -log_sum * log2_e;
}

constexpr int kLanesPerRow = 8;

// What one lane of eight has of the product of two rows. That of an output with its gradient is
// delta, which the gradients of all probabilities of the row lose to their sum staying 1.
template <class T>
TIR_DEVICE float lane_product(const Rows<T>& left, const Rows<T>& right, int64_t row, int lane) {
  const T* one = left.data + row * left.stride;
  const T* other = right.data + row * right.stride;
  float sum = 0.0f;
  if (left.is_aligned) {
    constexpr int kSize = kVector<T>;
    for (int c = lane * kSize; c < left.head_dim; c += kLanesPerRow * kSize) {
      float a[kSize], b[kSize];
      read_vector<T>(a, one + c);
      read_vector<T>(b, other + c);
      TIR_UNROLL
      for (int e = 0; e < kSize; ++e) sum += a[e] * b[e];
    }
  } else {
    TIR_NO_UNROLL
    for (int c = lane; c < left.head_dim; c += kLanesPerRow) {
      sum += to_float(one[c]) * to_float(other[c]);
    }
  }
  return sum;
}

TIR_DEVICE float sum_of_lanes(float sum) {
  TIR_UNROLL
  for (int flip = 1; flip < kLanesPerRow; flip *= 2) sum += __shfl_xor_sync(kAllLanes, sum, flip);
  return sum;
}

// exponent = scale score + shift of the row + shift of the column: that of a key is the logarithm
// of its weight, that of a query its negative log-sum. A streamed row at -inf is not there.
template <bool kHoldsKeys, bool kCausal>
struct Differentiation {
  const float *shifts, *deltas;  // of the streamed rows; deltas if they are queries
  float scale;                   // for powers of two
  int lane;

  // Scores of the held rows from `first` on with the streamed ones from `start` on become
  // probabilities, and the gradients of these become those of the scores. delta_of(m, r, delta of
  // the streamed row) is what a gradient loses to the sum staying 1.
  template <int M, int N, class DeltaOf>
  TIR_DEVICE void operator()(float (&scores)[M][N][4], float (&grads)[M][N][4],
                             const float (&row_shifts)[M][2], int first, int start,
                             DeltaOf delta_of) const {
    TIR_UNROLL
    for (int j = 0; j < N; ++j) {
      int column = start + 8 * j + 2 * (lane % 4);
      float2 column_shifts = *reinterpret_cast<const float2*>(shifts + column);
      float2 column_deltas = *reinterpret_cast<const float2*>(deltas + column);
      TIR_UNROLL
      for (int m = 0; m < M; ++m) {
        TIR_UNROLL
        for (int e = 0; e < 4; ++e) {
          float shift = e % 2 == 0 ? column_shifts.x : column_shifts.y;
          float difference = delta_of(m, e / 2, e % 2 == 0 ? column_deltas.x : column_deltas.y);
          float exponent = scores[m][j][e] * scale + (row_shifts[m][e / 2] + shift);
          // The limit of a key without weight may overflow. NaN is not larger, and stays.
          if (kHoldsKeys && exponent > kMaxPowerOfTwo) exponent = kMaxPowerOfTwo;
          float probability = power_of_two(exponent);
          float grad = probability * (grads[m][j][e] - difference);
          scores[m][j][e] = shift == -INFINITY ? 0.0f : probability;
          grads[m][j][e] = shift == -INFINITY ? 0.0f : grad;
        }
      }
    }
    if (kCausal && (kHoldsKeys ? start < first + M * kRows : start + 8 * N > first)) {
      hide(scores, grads, first + lane / 4 - (start + 2 * (lane % 4)));
    }
  }

  // Where a query comes before the key; `ahead` is by how much the lane's first held row lies
  // behind the first streamed one.
  template <int M, int N>
  TIR_DEVICE void hide(float (&scores)[M][N][4], float (&grads)[M][N][4], int ahead) const {
    TIR_UNROLL
    for (int j = 0; j < N; ++j) {
      TIR_UNROLL
      for (int m = 0; m < M; ++m) {
        TIR_UNROLL
        for (int e = 0; e < 4; ++e) {
          int behind = 8 * j + e % 2 - (m * kRows + 8 * (e / 2));
          if (kHoldsKeys ? ahead > behind : ahead < behind) scores[m][j][e] = grads[m][j][e] = 0.0f;
        }
      }
    }
  }
};

template <class T, int D, bool kHoldsKeys, bool kCausal>
struct BackwardBlock {
  static constexpr int kHeld = kHeldTiles<T, D>, kTiles = kStep<T, D> / 8;
  static constexpr int kOwnElements = kHeldRows<T, D> * kPitch<T, D>;
  static constexpr int kChunkElements = kChunk<T, D> * kPitch<T, D>;
  using Products = float[kHeld][kTiles][4];  // of stationary rows with streamed ones
  using Sums = float[kHeld][D / 8][4];       // [stationary row, column], spread over the lanes
  using PerRow = float[kHeld][2];            // of the stationary rows that this lane has a part in

  const AttentionShape& shape;
  int64_t head_index;
  int part;  // of the head's stationary rows
  bool is_aligned;
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int warp = thread / kWarp, warps = threads / kWarp, lane = thread % kWarp;
  int keys = static_cast<int>(shape.length), queries = static_cast<int>(shape.queries);
  int held = kHoldsKeys ? keys : queries, passing = kHoldsKeys ? queries : keys;
  int64_t batch = head_index / shape.heads, head = head_index % shape.heads;
  int chunks = (passing + kChunk<T, D> - 1) / kChunk<T, D>;
  int first_of_block = part * warps * kHeldRows<T, D>;
  int first = first_of_block + warp * kHeldRows<T, D>;  // of the warp's stationary rows

  float* shifts = reinterpret_cast<float*>(shared_memory());  // of the streamed rows
  float* deltas = shifts + chunks * kChunk<T, D>;             // of the streamed rows, if queries
  T* stationary = reinterpret_cast<T*>(deltas + chunks * kChunk<T, D>);
  T* own_first = stationary + warp * 2 * kOwnElements;
  T* own_second = own_first + kOwnElements;
  T* streamed = stationary + warps * 2 * kOwnElements;
  T* own_staging = streamed + 4 * kChunkElements + warp * kStaging<T, kTiles>;

  TIR_DEVICE Rows<T> rows_of(const RowGrid& grid, int count) const {
    return rows_of_head<T>(grid, shape, count, batch, head, is_aligned);
  }

  TIR_DEVICE int row(int m, int r) const { return first + m * kRows + lane / 4 + 8 * r; }

  TIR_DEVICE void load_stationary(const Rows<T>& first_rows, const Rows<T>& second_rows) const {
    load_tile<T, D>(own_first, first_rows, first, kHeldRows<T, D>, lane, kWarp, KeepAll());
    load_tile<T, D>(own_second, second_rows, first, kHeldRows<T, D>, lane, kWarp, KeepAll());
  }

  // The chunks of streamed rows from the first to before the last that some row of the block, of
  // however many warps, has to do with. There is always one, since what is loaded is waited for.
  TIR_DEVICE int first_chunk() const {
    if (!kCausal || !kHoldsKeys) return 0;
    return min(first_of_block / kChunk<T, D>, chunks - 1);
  }
  TIR_DEVICE int end_chunk() const {
    if (!kCausal || kHoldsKeys) return chunks;
    return min(chunks, (first_of_block + warps * kHeldRows<T, D> - 1) / kChunk<T, D> + 1);
  }

  // Calls step(scores, grad_probabilities, start, tile of the first rows, tile of the second rows,
  // used) for kStep streamed rows at a time, of which 8 `used` count.
  template <class Keep, class Step>
  TIR_DEVICE void stream(const Rows<T>& first_rows, const Rows<T>& second_rows, Keep is_kept,
                         Step step) const {
    auto slot = [&](int chunk) { return streamed + chunk % 2 * 2 * kChunkElements; };
    auto load = [&](int chunk) {
      int start = chunk * kChunk<T, D>, rows = min(kChunk<T, D>, round_up(passing - start, kRows));
      T* target = slot(chunk);
      load_tile<T, D>(target, first_rows, start, rows, thread, threads, is_kept);
      load_tile<T, D>(target + kChunkElements, second_rows, start, rows, thread, threads, is_kept);
      commit_copies();
    };
    // More would not leave registers for the sums.
    constexpr int kOfRow = kHeld == 1 && D <= 64 ? D / 16 : 0;
    LeftRows<T, D, kOfRow> left_first[kHeld], left_second[kHeld];
    int skipped = first_chunk();
    auto load_next = [&](int index) { load(skipped + index); };
    stream_chunks(end_chunk() - skipped, load_next, [&](int index) {
      int chunk = skipped + index;
      if (index == 0) {
        TIR_UNROLL
        for (int m = 0; m < kHeld; ++m) {
          left_first[m].take(own_first + m * kRows * kPitch<T, D>, lane);
          left_second[m].take(own_second + m * kRows * kPitch<T, D>, lane);
        }
      }
      int begin = chunk * kChunk<T, D>, end = min(passing, begin + kChunk<T, D>), visible = begin;
      if (kCausal && kHoldsKeys && first > begin) {
        visible += (first - begin) / kStep<T, D> * kStep<T, D>;
      }
      if (kCausal && !kHoldsKeys) end = min(end, first + kHeldRows<T, D>);
      TIR_NO_UNROLL
      for (int start = visible; start < end; start += kStep<T, D>) {
        const T* first_tile = slot(chunk) + (start - begin) * kPitch<T, D>;
        const T* second_tile = first_tile + kChunkElements;
        // Rows are loaded by sixteens, so that a step of 16 is always full.
        int used = kStep<T, D> == kRows ? kTiles : min(kTiles, 2 * ((end - start + 15) / 16));
        Products scores = {}, grad_probabilities = {};
        multiply_transposed(scores, left_first, first_tile, used, lane);
        multiply_transposed(grad_probabilities, left_second, second_tile, used, lane);
        step(scores, grad_probabilities, start, first_tile, second_tile, used);
      }
    });
  }

  template <class DeltaOf>
  TIR_DEVICE void differentiate(Products& scores, Products& grads, int start,
                                const PerRow& row_shifts, DeltaOf delta_of) const {
    Differentiation<kHoldsKeys, kCausal> step{shifts, deltas, shape.scale * log2_e, lane};
    step(scores, grads, row_shifts, first, start, delta_of);
  }

  // Writes the sums of the stationary rows times `factor`; the warp's own tile serves on the way.
  TIR_DEVICE void store(const Sums& sums, float factor, T* own_tile,
                        const ResultGrid& gradient) const {
    ResultRows<T> rows = rows_of_head<T>(gradient, shape, held, batch, head);
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      store_rows<T, D>(sums[m], factor, factor, own_tile + m * kRows * kPitch<T, D>, rows,
                       first + m * kRows, lane);
    }
  }
};

}  // namespace tir::cuda
