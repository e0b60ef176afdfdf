// How the backward attention kernels are launched: what a warp holds, and what a block serves.
#pragma once

#include <algorithm>

#include "cuda/heads.cuh"

namespace tir::cuda {

// 16-row tiles that a warp holds: with two, what is read of the streamed rows serves twice. Wider
// heads leave no registers for the sums of two.
template <class T, int D>
constexpr int kHeldTiles = kHasTensorCores<T> && D <= 64 ? 2 : 1;
template <class T, int D>
constexpr int kHeldRows = kHeldTiles<T, D> * kRows;

// Rows that are loaded at a time, and those of them that are multiplied at a time.
template <class T, int D>
constexpr int kChunk = kHasTensorCores<T> || D <= 96 ? 32 : 16;
template <class T, int D>
constexpr int kStep = kHeldTiles<T, D> == 2 ? 16 : kChunk<T, D>;

struct BackwardPlan {
  int warps;                   // of a block
  int64_t shared_bytes;        // of a block
  int key_parts, query_parts;  // blocks of each head with stationary keys, and with queries
  int sweeps;                  // of the queries past a block that serves a whole head, or 0
  bool is_aligned;
};

constexpr int kHeadChunk = 32;     // queries of a round of a whole head
constexpr int kMaxHeadRows = 384;  // queries, and keys
constexpr int kBlocksAtOnce = 2;   // of parts, on a multiprocessor

// Warps of a block that serves a whole head, by how often the queries pass it: as many as the
// registers last for. In one sweep a thread needs 255, most of them for the sums of its keys'
// gradients and of its values'; with a sweep for either, 168.
template <int kSweeps>
constexpr int kMaxHeadWarps = kSweeps == 1 ? 8 : 12;

// Which types and widths have such blocks. Of wider heads a warp can hold 16 keys in registers, and
// so a block fewer than the towers of such heads have, which are 256 and more.
template <class T, int D>
constexpr bool kServesHeads = kHasTensorCores<T> && D == 64;

// How often the queries would pass a block that serves a whole head, 0 if none can. Causal rows of
// more keys than one sweep takes are of no tower here, and are left to blocks of parts.
template <class T, int D>
int head_sweeps(const AttentionShape& shape) {
  int64_t held = kHeldRows<T, D>;
  if (!kServesHeads<T, D> || shape.queries > kMaxHeadRows) return 0;
  if (shape.length <= kMaxHeadWarps<1> * held) return 1;
  return !shape.is_causal && shape.length <= kMaxHeadRows ? 2 : 0;
}

// Blocks of parts are two launches and seven products, those of whole heads one and five or six.
// They are taken if they fit, and unless there are so few heads that all their parts are served at
// once: then blocks of whole heads, which are fewer, take longer (bench/model.py).
template <class T, int D>
BackwardPlan plan_backward(const char* name, const AttentionShape& shape, const Device& gpu) {
  constexpr int kSize = kChunk<T, D>, kHeld = kHeldRows<T, D>;
  constexpr int64_t kRowBytes = kPitch<T, D> * sizeof(T);
  int keys = static_cast<int>(shape.length), queries = static_cast<int>(shape.queries);
  int key_tiles = (keys + kHeld - 1) / kHeld, query_tiles = (queries + kHeld - 1) / kHeld;
  auto bytes = [&](int warps) {
    return round_up(std::max(keys, queries), kSize) * int64_t{8} +
           warps * 2 * kHeld * kRowBytes + 4 * kSize * kRowBytes +
           warps * kStaging<T, kStep<T, D> / 8> * int64_t{sizeof(T)};
  };
  BackwardPlan plan{};
  plan.warps = fitting_warps(name, std::min(std::max(key_tiles, query_tiles), 4),
                             gpu.shared_memory, bytes);
  plan.shared_bytes = bytes(plan.warps);
  plan.key_parts = (key_tiles + plan.warps - 1) / plan.warps;
  plan.query_parts = (query_tiles + plan.warps - 1) / plan.warps;

  int64_t blocks = shape.batch * shape.heads * (plan.key_parts + plan.query_parts);
  int64_t of_head =
      kMaxHeadRows * int64_t{8} + (3 * key_tiles * kHeld + 4 * kHeadChunk) * kRowBytes;
  if (blocks > kBlocksAtOnce * gpu.multiprocessors && of_head <= gpu.shared_memory) {
    plan.sweeps = head_sweeps<T, D>(shape);
  }
  if (plan.sweeps > 0) {
    plan.warps = key_tiles;
    plan.shared_bytes = of_head;
  }
  return plan;
}

}  // namespace tir::cuda
