// How the forward attention kernel is launched: warps, rows at a time, and shared memory for them.
#pragma once

#include <algorithm>

#include "cuda/heads.cuh"

namespace tir::cuda::forward {

// 16-row tiles of queries that a warp takes at a time. With two, each fragment of keys and values
// that is read from shared memory serves twice: with one, reading them would take longer than the
// products. Wider heads leave no registers for it.
template <class T, int D>
constexpr int kHeldTiles = kHasTensorCores<T> && D <= 80 ? 2 : 1;

template <class T, int D>
constexpr int kChunk = kHasTensorCores<T> && D <= 64 ? 64 : 32;  // keys taken at a time

struct Plan {
  int warps;             // of a block
  int blocks_per_head;
  int slot_rows;         // rows of keys, and of values, that have room in shared memory
  bool resident;         // all rows have: each chunk stays where it was loaded
  bool select;           // the block finds the counts itself
  bool is_aligned;
  int64_t value_bytes;   // of shared memory for values, in which counts are found before
  int64_t shared_bytes;  // of a block, these among them
};

template <class T, int D>
Plan plan(const char* name, const AttentionShape& shape, const KeyWeights& derived,
          const Device& gpu) {
  constexpr int64_t kRowBytes = kPitch<T, D> * sizeof(T);
  constexpr int kOwnRows = kHeldTiles<T, D> * kRows;
  int64_t heads = shape.batch * shape.heads;
  int length = static_cast<int>(shape.length);
  int tiles = (static_cast<int>(shape.queries) + kOwnRows - 1) / kOwnRows;
  int chunks = (length + kChunk<T, D> - 1) / kChunk<T, D>;

  Plan plan{};
  plan.select = derived.relevance != nullptr;
  auto value_bytes = [&](int warps) {
    int64_t rows = plan.slot_rows * kRowBytes;
    if (!plan.select) return rows;
    return std::max(rows, selection_scratch(length - derived.num_prefix_tokens, warps));
  };
  auto bytes = [&](int warps) {
    return chunks * kChunk<T, D> * int64_t{4} +
           warps * (kOwnRows * kRowBytes + kStaging<T, kChunk<T, D> / 8> * int64_t{sizeof(T)}) +
           plan.slot_rows * kRowBytes + value_bytes(warps);
  };
  // Fewer warps a block while the blocks would leave multiprocessors without one.
  plan.warps = std::min(tiles, 4);
  while (plan.warps > 1 &&
         heads * ((tiles + plan.warps - 1) / plan.warps) < gpu.multiprocessors) {
    --plan.warps;
  }
  // Two blocks shall fit on a multiprocessor, so that one computes while the other loads.
  plan.slot_rows = round_up(length, kRows);
  plan.resident = chunks <= 2 || bytes(plan.warps) <= gpu.shared_memory / 2;
  if (!plan.resident) plan.slot_rows = 2 * kChunk<T, D>;
  plan.warps = fitting_warps(name, plan.warps, gpu.shared_memory, bytes);
  plan.value_bytes = value_bytes(plan.warps);
  plan.shared_bytes = bytes(plan.warps);
  // A block goes through all rows where there are heads enough: keys and values are then read once.
  int64_t wanted = (2 * gpu.multiprocessors + heads - 1) / heads;
  plan.blocks_per_head =
      static_cast<int>(std::clamp<int64_t>(wanted, 1, (tiles + plan.warps - 1) / plan.warps));
  return plan;
}

}  // namespace tir::cuda::forward
