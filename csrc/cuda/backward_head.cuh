// The backward pass of a whole head in one block, for 16-bit types and heads whose keys the block's
// warps can hold between them.
//
// Each warp holds 32 keys, with the sums of their gradients in registers, and the queries pass, 32
// in a round. Scores and gradients of probabilities are computed once, five products in all: the
// gradients of the scores go through shared memory, from where, once all warps have written theirs,
// some warps multiply them with all keys, each for its columns of the queries' gradients. These are
// whole then, so that nothing is added up between blocks. One barrier a round: the gradients of the
// queries follow one round behind.
//
// More warps leave each fewer registers. Then the queries pass twice, once for the sums of the
// values' gradients alone: six products, since the scores are computed again.
//
// Heads of up to 64 channels have their keys in registers too. Of wider ones, up to 80, there is
// room for some of their columns; the others are read from shared memory in each step.
//
// All registers are taken. What is needed but seldom is found `anew` each time, and none spills.
#pragma once

#include "cuda/backward_block.cuh"

namespace tir::cuda {

template <class T, int D, bool kCausal, int kSweeps>
struct HeadBlock {
  static constexpr int kHeld = kHeadTiles, kOwnRows = kHeadRows;
  // How many times 16 columns of the warp's keys are in registers, and how many while the queries
  // pass for the values' gradients alone, which leaves more room.
  static constexpr int kHeldColumns = D <= 64 ? D / 16 : kSweeps == 1 ? 2 : 1;
  static constexpr int kHeldForValues = D <= 64 ? D / 16 : 4;
  static constexpr bool kHoldsKeys = kHeldColumns == D / 16;
  using LeftValues = LeftRows<T, D, 0>;
  static constexpr int kStep = 16, kChunkElements = kHeadChunk * kPitch<T, D>;
  static constexpr int kDeltasAtOnce = 8;  // all, for as many queries as keys
  using Sums = float[kHeld][D / 8][4];

  const AttentionBackward& arguments;
  bool is_aligned;
  int head_index = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  int batch = head_index / static_cast<int>(arguments.shape.heads);
  int warps = static_cast<int>(blockDim.x) / kWarp, warp = thread / kWarp, lane = thread % kWarp;
  int keys = static_cast<int>(arguments.shape.length);
  int queries = static_cast<int>(arguments.shape.queries);
  int head_dim = static_cast<int>(arguments.shape.head_dim);
  int key_rows = round_up(keys, kOwnRows), first = warp * kOwnRows;
  int chunks = (queries + kHeadChunk - 1) / kHeadChunk;

  // What does not depend on the number of keys comes first: it needs no registers.
  float* shifts = reinterpret_cast<float*>(shared_memory());  // of the queries
  float* deltas = shifts + kMaxHeadRows;
  T* streamed = reinterpret_cast<T*>(deltas + kMaxHeadRows);  // two rounds of two tiles
  T* key_tile = streamed + 4 * kChunkElements;

  TIR_DEVICE T* value_tile() const { return key_tile + anew(key_rows) * kPitch<T, D>; }

  TIR_DEVICE int head() const {
    return static_cast<int>(blockIdx.x) - anew(batch) * static_cast<int>(arguments.shape.heads);
  }
  TIR_DEVICE Rows<T> rows_of(const RowGrid& grid, int count) const {
    // Asked for anew, as a stride is where it is used: known throughout, it would take a register.
    bool aligned = anew(is_aligned) != 0;
    return rows_of_head<T>(grid, arguments.shape, count, anew(batch), head(), aligned);
  }
  TIR_DEVICE ResultRows<T> rows_of(const ResultGrid& grid, int count) const {
    return rows_of_head<T>(grid, arguments.shape, count, anew(batch), head());
  }

  TIR_DEVICE T* slot(int chunk) const { return streamed + chunk % 2 * 2 * kChunkElements; }
  // The gradients of the scores, [key, query], of a round; those of two lie side by side.
  TIR_DEVICE T* grads_of(int chunk) const {
    return key_tile + 2 * anew(key_rows) * kPitch<T, D> + chunk % 2 * kHeadChunk;
  }

  TIR_DEVICE void load_chunk(int chunk) const {
    int start = chunk * kHeadChunk;
    load_tile<T, D>(slot(chunk), rows_of(arguments.query, queries), start, kHeadChunk,
                    anew(thread), warps * kWarp, KeepAll());
    load_tile<T, D>(slot(chunk) + kChunkElements, rows_of(arguments.grad_output, queries), start,
                    kHeadChunk, anew(thread), warps * kWarp, KeepAll());
    commit_copies();
  }

  // What is known of the queries; it is found while the keys are on their way.
  TIR_DEVICE void find_shifts() const {
    int64_t first_query = int64_t{head_index} * queries;
    for (int i = thread; i < chunks * kHeadChunk; i += warps * kWarp) {
      shifts[i] =
          i < queries ? negative_log_sum(arguments.log_sum_exp[first_query + i]) : -INFINITY;
    }
    auto grads = rows_of(arguments.grad_output, queries);
    auto outputs = rows_of(arguments.output, queries);
    constexpr int kRowsPerWarp = kWarp / kLanesPerRow;
    int row = warp * kRowsPerWarp + lane / kLanesPerRow, step = warps * kRowsPerWarp;
    for (; row < chunks * kHeadChunk; row += kDeltasAtOnce * step) {
      float products[kDeltasAtOnce] = {};
      find_products(products, grads, outputs, row, step);
      TIR_UNROLL
      for (int u = 0; u < kDeltasAtOnce; ++u) {
        float delta = sum_of_lanes(products[u]);
        int i = row + u * step;
        if (lane % kLanesPerRow == 0 && i < kMaxHeadRows) deltas[i] = delta;
      }
    }
  }

  // What the lane has of the products of several rows, all of which are on their way before the
  // first is multiplied. The last row serves for those that do not exist: nobody asks for theirs.
  TIR_DEVICE void find_products(float (&products)[kDeltasAtOnce], const Rows<T>& left,
                                const Rows<T>& right, int row, int step) const {
    constexpr int kWidth = kLanesPerRow * kVector<T>, kPasses = (D + kWidth - 1) / kWidth;
    int part = lane % kLanesPerRow;
    if (anew(is_aligned) == 0) {
      TIR_UNROLL
      for (int u = 0; u < kDeltasAtOnce; ++u) {
        products[u] = lane_product(left, right, min(row + u * step, queries - 1), part);
      }
      return;
    }
    TIR_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      int column = pass * kWidth + part * kVector<T>;
      if (column >= head_dim) continue;
      float a[kDeltasAtOnce][kVector<T>], b[kDeltasAtOnce][kVector<T>];
      TIR_UNROLL
      for (int u = 0; u < kDeltasAtOnce; ++u) {
        int64_t i = min(row + u * step, queries - 1);
        read_vector<T>(a[u], left.data + i * left.stride + column);
        read_vector<T>(b[u], right.data + i * right.stride + column);
      }
      TIR_UNROLL
      for (int u = 0; u < kDeltasAtOnce; ++u) {
        TIR_UNROLL
        for (int e = 0; e < kVector<T>; ++e) products[u] += a[u][e] * b[u][e];
      }
    }
  }

  // Gradients of queries are sums over all keys, in which 0 times the NaN of one that is not
  // attended to would not be 0. The gradients of weights need such keys as they are. Where the warp
  // has all of its own in registers, others read 0; where it has not, only keys that are not finite
  // become 0, and the gradients of their weights NaN.
  TIR_DEVICE void clear_unattended(HeldKeys<kHeld>& held) const {
    __syncwarp();
    int kept = held.attention();
    if constexpr (!kHoldsKeys) {
      TIR_NO_UNROLL
      for (int i = 0; i < 2 * kHeld; ++i) {
        const T* row = key_tile + (held.own() + 8 * i) * kPitch<T, D>;
        if ((kept >> i & 1) == 0 && is_finite(row)) kept |= 1 << i;
      }
      __syncwarp();  // all four lanes of a row have read it
    }
    TIR_UNROLL
    for (int i = 0; i < 2 * kHeld; ++i) {
      if ((kept >> i & 1) != 0) continue;
      T* row = key_tile + (held.own() + 8 * i) * kPitch<T, D>;
      for (int c = lane % 4; c < D; c += 4) row[c] = T{};
      if constexpr (!kHoldsKeys) held.shifts[i / 2][i % 2] = NAN;
    }
  }

  TIR_DEVICE static bool is_finite(const T* row) {
    bool found = true;
    TIR_NO_UNROLL
    for (int c = 0; c < D; ++c) found = found && fabsf(to_float(row[c])) < INFINITY;
    return found;
  }

  // 16 queries with the warp's keys.
  template <bool kOfKeys, bool kOfValues, int kColumns>
  TIR_DEVICE void step(int start, const LeftRows<T, D, kColumns> (&left_keys)[kHeld],
                       const LeftValues (&left_values)[kHeld], HeldKeys<kHeld>& held,
                       Sums& grad_key, Sums& grad_value) const {
    int chunk = start / kHeadChunk, column = start % kHeadChunk;
    const T* query_tile = slot(chunk) + column * kPitch<T, D>;
    const T* grad_tile = query_tile + kChunkElements;
    float scores[kHeld][2][4] = {}, grads[kHeld][2][4] = {};
    multiply_transposed(scores, left_keys, query_tile, 2, lane);
    if constexpr (kOfKeys) multiply_transposed(grads, left_values, grad_tile, 2, lane);
    Differentiation<true, kCausal> differentiate{shifts, deltas, arguments.shape.scale * log2_e,
                                                 lane};
    differentiate(scores, grads, held.shifts, first, start,
                  [](int, int, float delta) { return delta; });
    T* no_staging = nullptr;
    if constexpr (kOfValues) multiply<T, D>(grad_value, scores, grad_tile, 2, no_staging, lane);
    if constexpr (!kOfKeys) return;
    held.add(grads);
    T* target = grads_of(chunk) + (first + lane / 4) * kGradPitch<T> + column + 2 * (lane % 4);
    int kept = held.attention();
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      TIR_UNROLL
      for (int r = 0; r < 2; ++r) {
        bool is_kept = (kept >> (2 * m + r) & 1) != 0;
        TIR_UNROLL
        for (int j = 0; j < 2; ++j) {
          uint32_t pair = pack<T>(grads[m][j][2 * r], grads[m][j][2 * r + 1]);
          T* place = target + (m * kRows + 8 * r) * kGradPitch<T> + 8 * j;
          *reinterpret_cast<uint32_t*>(place) = is_kept ? pair : 0;
        }
      }
    }
    multiply<T, D>(grad_key, grads, query_tile, 2, no_staging, lane);
  }

  // The gradients of a round's queries, 16 columns at a time.
  TIR_DEVICE void write_queries(int chunk) const {
    TIR_NO_UNROLL
    for (int part = anew(warp); part < D / 16; part += warps) {
      int start = chunk * kHeadChunk, column = part * 16;
      int visible = kCausal ? min(key_rows, start + kHeadChunk) : key_rows;
      int own_lane = anew(lane);
      // Lane l names a row of the matrices' elements (2 t, g), to be read as (g, 2 t).
      const T* left = grads_of(chunk) + (own_lane % 8 + own_lane / 16 * 8) * kGradPitch<T> +
                      own_lane / 8 % 2 * 8;
      const T* right = key_tile + own_lane % 16 * kPitch<T, D> + column + own_lane / 16 * 8;
      float sums[2][2][4] = {};
      TIR_NO_UNROLL
      for (int key = 0; key < visible; key += 2 * kRows) {
        TIR_UNROLL
        for (int i = 0; i < 2; ++i) {
          uint32_t a[2][4], b[4];
          load_matrices_transposed(b, right + i * kRows * kPitch<T, D>);
          TIR_UNROLL
          for (int m = 0; m < 2; ++m) {
            load_matrices_transposed(a[m], left + i * kRows * kGradPitch<T> + m * kRows);
            multiply_add<T>(sums[m][0], a[m], b[0], b[1]);
            multiply_add<T>(sums[m][1], a[m], b[2], b[3]);
          }
        }
        left += 2 * kRows * kGradPitch<T>;
        right += 2 * kRows * kPitch<T, D>;
      }
      ResultRows<T> target = rows_of(arguments.grad_query, queries);
      TIR_UNROLL
      for (int m = 0; m < 2; ++m) {
        TIR_UNROLL
        for (int r = 0; r < 2; ++r) {
          TIR_UNROLL
          for (int j = 0; j < 2; ++j) {
            write_pair(target, start + m * kRows + own_lane / 4 + 8 * r,
                       column + 8 * j + 2 * (own_lane % 4),
                       sums[m][j][2 * r] * arguments.shape.scale,
                       sums[m][j][2 * r + 1] * arguments.shape.scale);
          }
        }
      }
    }
  }

  TIR_DEVICE void write_pair(const ResultRows<T>& target, int row, int column, float one,
                             float other) const {
    if (row >= queries || column >= head_dim) return;
    // There are few rows: 32 bits hold where one begins, and 64 would take registers.
    T* place = target.data + (row * anew(target.stride) + column);
    if (head_dim % 2 == 0) {
      store_pair(place, one, other);
    } else {
      place[0] = from_float<T>(one);
      if (column + 1 < head_dim) place[1] = from_float<T>(other);
    }
  }

  // All queries pass. The gradients of keys and queries are found, those of values, or all.
  template <bool kOfKeys, bool kOfValues, int kColumns>
  TIR_DEVICE void sweep(const LeftRows<T, D, kColumns> (&left_keys)[kHeld],
                        const LeftValues (&left_values)[kHeld], HeldKeys<kHeld>& held,
                        Sums& grad_key, Sums& grad_value) const {
    TIR_NO_UNROLL
    for (int chunk = 0; chunk <= chunks; ++chunk) {  // the last one for what follows behind
      wait_for_copies<0>();
      __syncthreads();  // the round's rows are in, and the gradients of the one before
      if (chunk + 1 < chunks) load_chunk(chunk + 1);
      if (kOfKeys && chunk > 0) write_queries(chunk - 1);
      int start = chunk * kHeadChunk, end = min(queries, start + kHeadChunk);
      if (kCausal && first > start) start = end;
      TIR_NO_UNROLL
      for (; start < end; start += kStep) {
        step<kOfKeys, kOfValues>(start, left_keys, left_values, held, grad_key, grad_value);
      }
    }
  }

  // Others still read the keys; the values are the warp's own.
  TIR_DEVICE void store(const Sums& sums, float factor, const ResultGrid& gradient) const {
    T* tile = value_tile() + anew(first) * kPitch<T, D>;
    ResultRows<T> target = rows_of(gradient, keys);
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) {
      store_rows<T, D>(sums[m], factor, factor, tile + m * kRows * kPitch<T, D>, target,
                       anew(first) + m * kRows, lane);
    }
  }

  // The warp's own rows of a tile.
  template <int kColumns>
  TIR_DEVICE void take_rows(LeftRows<T, D, kColumns> (&rows)[kHeld], const T* tile) const {
    TIR_UNROLL
    for (int m = 0; m < kHeld; ++m) rows[m].take(tile + (first + m * kRows) * kPitch<T, D>, lane);
  }

  TIR_DEVICE void run(const KeyWeights& derived, float* partial) const {
    load_tile<T, D>(key_tile, rows_of(arguments.key, keys), 0, key_rows, thread, warps * kWarp,
                    KeepAll());
    load_tile<T, D>(value_tile(), rows_of(arguments.value, keys), 0, key_rows, thread,
                    warps * kWarp, KeepAll());
    load_chunk(0);
    find_shifts();
    HeldKeys<kHeld> held{arguments.weights, derived, batch, keys, first, lane, {}, {}, 0};
    held.begin();
    wait_for_copies<0>();
    __syncthreads();

    LeftRows<T, D, kHeldColumns> left_keys[kHeld];
    LeftValues left_values[kHeld];
    take_rows(left_keys, key_tile);
    take_rows(left_values, value_tile());
    clear_unattended(held);
    Sums grad_key = {}, grad_value = {};
    sweep<true, kSweeps == 1>(left_keys, left_values, held, grad_key, grad_value);
    held.write(partial, head_index);
    held.drop_unattended(grad_key);
    store(grad_key, arguments.shape.scale, arguments.grad_key);
    if constexpr (kSweeps == 2) {
      load_chunk(0);
      LeftRows<T, D, kHeldForValues> held_keys[kHeld];
      take_rows(held_keys, key_tile);
      sweep<false, true>(held_keys, left_values, held, grad_key, grad_value);
    }
    held.drop_unattended(grad_value);
    store(grad_value, 1.0f, arguments.grad_value);
  }
};

template <class T, int D, bool kCausal, int kSweeps>
__global__ void __launch_bounds__(kMaxHeadWarps<kSweeps>* kWarp, 1)
    head_backward_kernel(AttentionBackward arguments, KeyWeights derived, float* partial,
                         bool is_aligned) {
  HeadBlock<T, D, kCausal, kSweeps> block{arguments, is_aligned};
  block.run(derived, partial);
}

}  // namespace tir::cuda
