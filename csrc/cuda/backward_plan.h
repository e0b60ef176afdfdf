// How the backward attention kernels are launched: what a warp holds, and which heads one block
// serves whole.
#pragma once

#include "cuda/heads.cuh"

namespace tir::cuda {

// 16-row tiles that a warp holds: with two, what is read of the streamed rows serves twice. Wider
// heads leave no registers for the sums of two.
template <class T, int D>
constexpr int kHeldTiles = kHasTensorCores<T> && D <= 64 ? 2 : 1;
template <class T, int D>
constexpr int kHeldRows = kHeldTiles<T, D> * kRows;

constexpr int kHeadChunk = 32;              // queries of a round
constexpr int kMaxHeadWarps = 8;            // as many as the registers last for, 255 a thread
constexpr int kMaxHeadQueries = 288;

// Blocks of whole heads: with wider ones, a warp would hold 16 keys, and 8 or 12 warps fewer than
// most towers of such heads have.
template <class T, int D>
constexpr bool kServesHeads = kHasTensorCores<T> && D == 64;

template <class T, int D>
constexpr int64_t head_bytes(int keys) {
  int64_t key_rows = round_up(keys, kHeldRows<T, D>), row_bytes = kPitch<T, D> * sizeof(T);
  return kMaxHeadQueries * int64_t{8} + (3 * key_rows + 4 * kHeadChunk) * row_bytes;
}

template <class T, int D>
constexpr int head_warps(int keys) {
  return (keys + kHeldRows<T, D> - 1) / kHeldRows<T, D>;
}

// Whether heads are served whole: that they fit, and that there are enough of them for the GPU.
template <class T, int D>
bool head_fits(const AttentionShape& shape, const Device& gpu) {
  if (!kServesHeads<T, D> || shape.length > kMaxHeadWarps * kHeldRows<T, D> ||
      shape.queries > kMaxHeadQueries) {
    return false;
  }
  int keys = static_cast<int>(shape.length);
  return 2 * shape.batch * shape.heads >= gpu.multiprocessors &&
         head_bytes<T, D>(keys) <= gpu.shared_memory;
}

}  // namespace tir::cuda
