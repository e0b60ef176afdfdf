// Counts of how many classes select a token, and the weights that follow: one block an image.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/selection.cuh"

namespace tir::cuda {
namespace {

constexpr int kMaxWarps = 32;

// Bytes of shared memory in which an image's counts can be found by `warps` warps.
int64_t selection_scratch(int64_t num_patches, int warps) {
  return (warps + 1) * num_patches * 4;
}

// Finds the counts of one image in `scratch`, all threads of the block together. Ends with a
// barrier; returns the counts.
TIR_DEVICE const int32_t* find_counts(const float* relevance, int num_classes, int num_patches,
                                      int top_k, void* scratch) {
  int32_t* counts = static_cast<int32_t*>(scratch);
  int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  int warp = thread / kWarp, warps = threads / kWarp, lane = thread % kWarp;
  uint32_t* keys = static_cast<uint32_t*>(scratch) + (warp + 1) * num_patches;
  for (int n = thread; n < num_patches; n += threads) counts[n] = 0;
  __syncthreads();
  auto key_of = [&](int n) { return keys[n]; };
  for (int c = warp; c < num_classes; c += warps) {
    const float* row = relevance + static_cast<int64_t>(c) * num_patches;
    for (int n = lane; n < num_patches; n += kWarp) keys[n] = selection_key(row[n]);
    __syncwarp();
    SelectionCut cut = find_cut(key_of, num_patches, top_k, lane);
    select_by(cut, key_of, num_patches, lane, [&](int n) { atomicAdd(&counts[n], 1); });
    __syncwarp();
  }
  __syncthreads();
  return counts;
}

// Counts in global memory, for rows too long for shared memory: keys are read again for each bit,
// and come from the caches.
TIR_DEVICE void count_in_place(const float* relevance, const Selection& arguments,
                               int32_t* counts) {
  int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  int num_patches = static_cast<int>(arguments.num_patches), lane = thread % kWarp;
  for (int n = thread; n < num_patches; n += threads) counts[n] = 0;
  __syncthreads();
  for (int64_t c = thread / kWarp; c < arguments.num_classes; c += threads / kWarp) {
    const float* row = relevance + c * num_patches;
    auto key_of = [&](int n) { return selection_key(row[n]); };
    SelectionCut cut = find_cut(key_of, num_patches, static_cast<int>(arguments.top_k), lane);
    select_by(cut, key_of, num_patches, lane, [&](int n) { atomicAdd(&counts[n], 1); });
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kMaxWarps * kWarp)
    select_kernel(Selection arguments, bool has_room) {
  int64_t image = blockIdx.x;
  int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  int num_patches = static_cast<int>(arguments.num_patches);
  const float* relevance = arguments.relevance + image * arguments.num_classes * num_patches;
  int32_t* counts = arguments.counts + image * num_patches;
  if (has_room) {
    const int32_t* found =
        find_counts(relevance, static_cast<int>(arguments.num_classes), num_patches,
                    static_cast<int>(arguments.top_k), shared_memory());
    for (int n = thread; n < num_patches; n += threads) counts[n] = found[n];
    __syncthreads();
  } else {
    count_in_place(relevance, arguments, counts);
  }
  if (arguments.weights == nullptr) return;
  int64_t length = arguments.num_prefix_tokens + num_patches;
  for (int64_t token = thread; token < length; token += threads) {
    arguments.weights[image * length + token] =
        token_weight(token, arguments.num_prefix_tokens, counts, arguments.table);
  }
}

}  // namespace

void select_tokens(const Selection& arguments, Stream stream) {
  constexpr const char* kName = "token_weights";
  int64_t limit = device(kName).shared_memory;
  int most = static_cast<int>(std::min<int64_t>(arguments.num_classes, kMaxWarps)), warps = most;
  while (warps > 0 && selection_scratch(arguments.num_patches, warps) > limit) --warps;
  // A few warps with their keys at hand are worth more than many without.
  bool has_room = warps >= std::min(most, 4);
  if (!has_room) warps = most;
  launch<&select_kernel>(kName, arguments.batch, warps * kWarp,
                         has_room ? selection_scratch(arguments.num_patches, warps) : 0, stream,
                         arguments, has_room);
}

}  // namespace tir::cuda
