// Weighted attention, backward, without atomics, so that the same inputs give the same bits.
//
// Many heads of short rows in 16-bit types take a block each, see backward_head.cuh; when they do
// is told in backward_plan.h. For others, first delta[i] = grad_output[i] . output[i]. Then, side
// by side in one launch, the gradients of keys, values and weights, with stationary keys and
// streamed queries, and those of queries, with stationary queries and streamed keys: both need the
// scores and the gradients of the probabilities, with rows and columns exchanged. Last, where
// wanted, the weights' gradients are summed over the heads.
#include <algorithm>

#include "cuda/backward_block.cuh"
#include "cuda/backward_head.cuh"

namespace tir::cuda {
namespace {

constexpr const char* kName = "weighted_attention (backward)";

// Stationary keys, streamed queries. `partial` may be null.
template <class T, int D, bool kCausal>
TIR_DEVICE void grad_key_value(const AttentionBackward& arguments, const KeyWeights& derived,
                               const float* delta, float* partial,
                               const BackwardBlock<T, D, true, kCausal>& block) {
  using Block = BackwardBlock<T, D, true, kCausal>;
  int64_t first_query = block.head_index * block.queries;
  block.load_stationary(block.rows_of(arguments.key, block.keys),
                        block.rows_of(arguments.value, block.keys));
  for (int i = block.thread; i < block.chunks * kChunk<T, D>; i += block.threads) {
    bool exists = i < block.queries;
    block.shifts[i] =
        exists ? negative_log_sum(arguments.log_sum_exp[first_query + i]) : -INFINITY;
    block.deltas[i] = exists ? delta[first_query + i] : 0.0f;
  }
  __syncthreads();

  HeldKeys<Block::kHeld> held{arguments.weights, derived, static_cast<int>(block.batch),
                              block.keys, block.first, block.lane, {}, {}, 0};
  held.begin();
  typename Block::Sums grad_key = {}, grad_value = {};
  auto step = [&](typename Block::Products& scores, typename Block::Products& grads, int start,
                  const T* queries, const T* grad_outputs, int used) {
    block.differentiate(scores, grads, start, held.shifts,
                        [](int, int, float delta) { return delta; });
    held.add(grads);
    multiply<T, D>(grad_key, grads, queries, used, block.own_staging, block.lane);
    multiply<T, D>(grad_value, scores, grad_outputs, used, block.own_staging, block.lane);
  };
  block.stream(block.rows_of(arguments.query, block.queries),
               block.rows_of(arguments.grad_output, block.queries), KeepAll(), step);

  held.write(partial, block.head_index);
  held.drop_unattended(grad_key);
  held.drop_unattended(grad_value);
  block.store(grad_key, arguments.shape.scale, block.own_first, arguments.grad_key);
  block.store(grad_value, 1.0f, block.own_second, arguments.grad_value);
}

// Stationary queries, streamed keys.
template <class T, int D, bool kCausal>
TIR_DEVICE void grad_query(const AttentionBackward& arguments, const KeyWeights& derived,
                           const float* delta,
                           const BackwardBlock<T, D, false, kCausal>& block) {
  using Block = BackwardBlock<T, D, false, kCausal>;
  int64_t first_query = block.head_index * block.queries;
  block.load_stationary(block.rows_of(arguments.query, block.queries),
                        block.rows_of(arguments.grad_output, block.queries));
  const int32_t* counts = stored_counts(derived, block.batch, block.keys);
  for (int i = block.thread; i < block.chunks * kChunk<T, D>; i += block.threads) {
    float shift = -INFINITY;
    if (i < block.keys) {
      float weight = key_weight(arguments.weights, derived, counts, block.batch, block.keys, i);
      if (is_attended(weight)) shift = log2f(weight);
    }
    block.shifts[i] = shift;
  }
  __syncthreads();

  typename Block::PerRow shifts, deltas;
  TIR_UNROLL
  for (int m = 0; m < Block::kHeld; ++m) {
    TIR_UNROLL
    for (int r = 0; r < 2; ++r) {
      int64_t row = first_query + min(block.row(m, r), block.queries - 1);
      shifts[m][r] = negative_log_sum(arguments.log_sum_exp[row]);
      deltas[m][r] = delta[row];
    }
  }

  typename Block::Sums grad_query = {};
  auto step = [&](typename Block::Products& scores, typename Block::Products& grads, int start,
                  const T* keys, const T*, int used) {
    block.differentiate(scores, grads, start, shifts,
                                        [&](int m, int r, float) { return deltas[m][r]; });
    multiply<T, D>(grad_query, grads, keys, used, block.own_staging, block.lane);
  };
  // 0 times the NaN of a key that is not attended to would not be 0.
  auto is_kept = [&](int row) { return block.shifts[row] != -INFINITY; };
  block.stream(block.rows_of(arguments.key, block.keys),
               block.rows_of(arguments.value, block.keys), is_kept, step);
  block.store(grad_query, arguments.shape.scale, block.own_first, arguments.grad_query);
}

template <class T, int D, bool kCausal>
__global__ void __launch_bounds__(128, 2)
    attention_backward_kernel(AttentionBackward arguments, KeyWeights derived, const float* delta,
                              float* partial, BackwardPlan plan) {
  int parts = plan.key_parts + plan.query_parts;
  int64_t head_index = blockIdx.x / parts;
  int part = static_cast<int>(blockIdx.x % parts);
  if (part < plan.key_parts) {
    BackwardBlock<T, D, true, kCausal> block{arguments.shape, head_index, part, plan.is_aligned};
    grad_key_value(arguments, derived, delta, partial, block);
  } else {
    BackwardBlock<T, D, false, kCausal> block{arguments.shape, head_index, part - plan.key_parts,
                                              plan.is_aligned};
    grad_query(arguments, derived, delta, block);
  }
}

constexpr int kDeltaThreads = 256;

template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    delta_kernel(AttentionBackward arguments, float* delta, bool is_aligned) {
  const AttentionShape& shape = arguments.shape;
  int64_t rows = shape.batch * shape.heads * shape.queries;
  int64_t row = int64_t{blockIdx.x} * (kDeltaThreads / kLanesPerRow) + threadIdx.x / kLanesPerRow;
  int lane = static_cast<int>(threadIdx.x % kLanesPerRow);
  int queries = static_cast<int>(shape.queries);
  int64_t head_index = (row < rows ? row : rows - 1) / queries;
  int64_t batch = head_index / shape.heads, head = head_index % shape.heads;
  auto grads = rows_of_head<T>(arguments.grad_output, shape, queries, batch, head, is_aligned);
  auto outputs = rows_of_head<T>(arguments.output, shape, queries, batch, head, is_aligned);
  int64_t i = row - head_index * queries;
  float sum = sum_of_lanes(i < queries ? lane_product(grads, outputs, i, lane) : 0.0f);
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

// Calls run with causality as a type.
template <class Run>
void with_causality(const AttentionShape& shape, Run run) {
  if (shape.is_causal) {
    run(std::true_type());
  } else {
    run(std::false_type());
  }
}

// One block a head.
template <class T, int D>
void launch_heads(const AttentionBackward& arguments, const KeyWeights& derived, float* partial,
                  const BackwardPlan& plan, Stream stream) {
  auto run = [&](auto is_causal, auto sweeps) {
    constexpr bool kCausal = decltype(is_causal)::value;
    launch<&head_backward_kernel<T, D, kCausal, decltype(sweeps)::value>>(
        kName, arguments.shape.batch * arguments.shape.heads, plan.warps * kWarp,
        plan.shared_bytes, stream, arguments, derived, partial, plan.is_aligned);
  };
  with_causality(arguments.shape, [&](auto is_causal) {
    if (plan.sweeps == 2) {
      run(is_causal, std::integral_constant<int, 2>());
    } else {
      run(is_causal, std::integral_constant<int, 1>());
    }
  });
}

// Keys and queries of a head in blocks of their own.
template <class T, int D>
void launch_parts(const AttentionBackward& arguments, const KeyWeights& derived, float* delta,
                  float* partial, const BackwardPlan& plan, Stream stream) {
  const AttentionShape& shape = arguments.shape;
  int64_t heads = shape.batch * shape.heads, rows = heads * shape.queries;
  launch<&delta_kernel<T>>(kName, blocks_for(rows, kDeltaThreads / kLanesPerRow), kDeltaThreads,
                           0, stream, arguments, delta, plan.is_aligned);
  with_causality(shape, [&](auto is_causal) {
    launch<&attention_backward_kernel<T, D, decltype(is_causal)::value>>(
        kName, heads * (plan.key_parts + plan.query_parts), plan.warps * kWarp, plan.shared_bytes,
        stream, arguments, derived, static_cast<const float*>(delta), partial, plan);
  });
}

template <class T, int D>
void launch_backward(const AttentionBackward& arguments, const KeyWeights& derived, float* delta,
                     float* partial, Stream stream) {
  const AttentionShape& shape = arguments.shape;
  BackwardPlan plan = plan_backward<T, D>(kName, shape, device(kName));
  plan.is_aligned = true;
  for (const RowGrid& grid : {arguments.grad_output, arguments.query, arguments.key,
                              arguments.value, arguments.output}) {
    plan.is_aligned = plan.is_aligned && rows_are_aligned(shape, grid);
  }
  if (plan.sweeps == 0) {
    launch_parts<T, D>(arguments, derived, delta, partial, plan, stream);
  } else if constexpr (kServesHeads<T, D>) {
    launch_heads<T, D>(arguments, derived, partial, plan, stream);
  }
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
