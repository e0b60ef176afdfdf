// How the backward attention kernels are launched: what a warp holds, and what a block serves.
#pragma once

#include <algorithm>

#include "cuda/heads.cuh"
#include "cuda/makespan.h"

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
constexpr int kHeadTiles = 2, kHeadRows = kHeadTiles * kRows;  // of keys, that a warp has of it
constexpr int kMaxHeadRows = 384;  // queries, and keys
constexpr int kBlocksAtOnce = 2;   // of parts, on a multiprocessor

// Gradients of scores lie key by key, those of two rounds side by side.
template <class T>
constexpr int kGradPitch = 2 * kHeadChunk + kVector<T>;

// Warps of a block that serves a whole head, by how often the queries pass it: as many as the
// registers last for. In one sweep a thread needs 255, most of them for the sums of its keys'
// gradients and of its values'; with a sweep for either, 168.
template <int kSweeps>
constexpr int kMaxHeadWarps = kSweeps == 1 ? 8 : 12;

// Which types and widths have such blocks. Of heads wider than 80 a warp could hold 16 keys, and so
// a block fewer than the towers of such heads have, which are 256 and more.
template <class T, int D>
constexpr bool kServesHeads = kHasTensorCores<T> && D <= 80;

// How often the queries would pass a block that serves a whole head, 0 if none can.
template <class T, int D>
int head_sweeps(const AttentionShape& shape) {
  if (!kServesHeads<T, D> || shape.queries > kMaxHeadRows) return 0;
  if (shape.length <= kMaxHeadWarps<1> * kHeadRows) return 1;
  return shape.length <= kMaxHeadRows ? 2 : 0;
}

// What blocks of parts and of whole heads are compared by: cycles of shared memory, which bounds
// all of them, for 16 queries with 16 keys, as counted in bfloat16 (bench/sass). Of parts it is the
// mean of both kinds.
template <int D>
constexpr int64_t kPartsCost = D <= 64 ? 62 : 92;
template <int D>
int64_t head_cost(int sweeps) {
  if (D <= 64) return sweeps == 1 ? 78 : 87;
  return sweeps == 1 ? 108 : 127;
}
// Whole heads save a launch, but more of them wait for their first rows; in units of `makespan`.
constexpr int64_t kLaunchCost = 200000;

// Blocks of parts are two launches and seven products, those of whole heads one and five or six.
// The latter are taken if they fit and take no longer, and unless there are so few heads that all
// their parts are served at once (bench/model.py).
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

  int64_t heads = shape.batch * shape.heads, blocks = heads * (plan.key_parts + plan.query_parts);
  int head_warps = (keys + kHeadRows - 1) / kHeadRows;
  int64_t of_head = kMaxHeadRows * int64_t{8} + 4 * kHeadChunk * kRowBytes +
                    head_warps * kHeadRows * (2 * kRowBytes + kGradPitch<T> * sizeof(T));
  int sweeps = head_sweeps<T, D>(shape);
  if (sweeps == 0 || of_head > gpu.shared_memory ||
      blocks <= kBlocksAtOnce * gpu.multiprocessors) {
    return plan;
  }
  int64_t key_steps = round_up(keys, kRows) / kRows, query_steps = round_up(queries, kRows) / kRows;
  int64_t steps = plan.key_parts * query_steps + plan.query_parts * key_steps;
  int64_t of_parts = steps * plan.warps * kHeldTiles<T, D> * kPartsCost<D> * heads / blocks;
  int64_t of_whole = query_steps * head_warps * kHeadTiles * head_cost<D>(sweeps);
  if (makespan(heads, head_warps, of_head, of_whole, gpu) <=
      makespan(blocks, plan.warps, plan.shared_bytes, of_parts, gpu) + kLaunchCost) {
    plan.sweeps = sweeps;
    plan.warps = head_warps;
    plan.shared_bytes = of_head;
  }
  return plan;
}

}  // namespace tir::cuda
