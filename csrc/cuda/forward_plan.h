// How the forward attention kernel is launched: warps, rows at a time, and shared memory for them.
#pragma once

#include <algorithm>

#include "cuda/heads.cuh"
#include "cuda/makespan.h"

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
  bool is_aligned;
  int64_t shared_bytes;  // of a block
};

// What plans are compared by, for all types and widths in units of 43 instructions, or of the time
// that a multiprocessor takes for them: as counted in bfloat16 with 64 channels (bench/sass). There
// a warp's pass over 64 keys is 16.
constexpr int64_t kStepCost = 5;   // of a warp: a step of 16 keys that do not fill a chunk
constexpr int64_t kTileCost = 17;  // of a warp: to load its queries and to store its outputs
constexpr int64_t kWarpCost = 6;   // of a warp: all that it does once
constexpr int64_t kCopyCost = 3;   // of a block: to begin the copies of 16 keys and values
constexpr int64_t kMoveCost = 16;  // of the L2 cache: 16 keys and values, or queries and outputs
constexpr int kMaxWarps = 4;       // of a block

template <class T, int D>
class Planner {
 public:
  Planner(const char* name, const AttentionShape& shape, const Device& gpu)
      : name_(name), gpu_(gpu), heads_(shape.batch * shape.heads),
        queries_(static_cast<int>(shape.queries)), length_(static_cast<int>(shape.length)) {}

  // The plan that takes least time; of equal ones that with fewest blocks, since each reads all
  // keys and values, then that with most warps.
  Plan best() const {
    int ring = std::min(round_up(length_, kRows), 2 * kSize);
    int most = fitting_warps(name_, std::min(tiles_, kMaxWarps), gpu_.shared_memory,
                             [&](int warps) { return shared_bytes(warps, ring); });
    Plan best{};
    int64_t least = -1;
    for (int warps = most; warps >= 1; --warps) {
      for (int rounds = (tiles_ + warps - 1) / warps, parts = 0; rounds >= 1; --rounds) {
        int needed = (tiles_ + warps * rounds - 1) / (warps * rounds);
        if (needed == parts) continue;
        parts = needed;
        Plan plan = with(warps, parts);
        int64_t time = makespan(heads_ * parts, warps, plan.shared_bytes, work(plan), gpu_);
        bool is_better = time < least || (time == least && parts < best.blocks_per_head);
        if (least >= 0 && !is_better) continue;
        best = plan, least = time;
      }
    }
    return best;
  }

 private:
  static constexpr int kSize = kChunk<T, D>, kOwnRows = kHeldTiles<T, D> * kRows;
  static constexpr int64_t kRowBytes = kPitch<T, D> * sizeof(T);

  int64_t shared_bytes(int warps, int slot_rows) const {
    return chunks_ * kSize * int64_t{4} +
           warps * (kOwnRows * kRowBytes + kStaging<T, kSize / 8> * int64_t{sizeof(T)}) +
           2 * slot_rows * kRowBytes;
  }

  int rounds(const Plan& plan) const {
    int at_a_time = plan.warps * plan.blocks_per_head;
    return (tiles_ + at_a_time - 1) / at_a_time;
  }

  Plan with(int warps, int parts) const {
    Plan plan{};
    plan.warps = warps;
    plan.blocks_per_head = parts;
    // Rows stay where they will be needed again, if two blocks still fit on a multiprocessor, so
    // that one computes while the other loads.
    plan.slot_rows = round_up(length_, kRows);
    plan.resident =
        chunks_ <= 2 || (rounds(plan) > 1 &&
                         shared_bytes(warps, plan.slot_rows) <= gpu_.shared_memory / 2);
    if (!plan.resident) plan.slot_rows = 2 * kSize;
    plan.shared_bytes = shared_bytes(warps, plan.slot_rows);
    return plan;
  }

  // What a block does: its instructions, or what it moves from and to the L2 cache.
  int64_t work(const Plan& plan) const {
    int64_t sixteens = round_up(length_, kRows) / kRows, in_chunk = kSize / kRows;
    int64_t passes = sixteens / in_chunk, steps = sixteens % in_chunk;
    int64_t of_tile = passes * (kSize / 4) + steps * kStepCost + kTileCost;
    int64_t loaded = sixteens * (plan.resident ? 1 : rounds(plan));
    int64_t issued = plan.warps * (rounds(plan) * of_tile + kWarpCost) + loaded * kCopyCost;
    int64_t own_sixteens = round_up(queries_, kRows) / kRows;
    return std::max(issued, (loaded + own_sixteens / plan.blocks_per_head) * kMoveCost);
  }

  const char* name_;
  const Device& gpu_;
  int64_t heads_;
  int queries_, length_;
  int tiles_ = (queries_ + kOwnRows - 1) / kOwnRows, chunks_ = (length_ + kSize - 1) / kSize;
};

template <class T, int D>
Plan plan(const char* name, const AttentionShape& shape, const Device& gpu) {
  return Planner<T, D>(name, shape, gpu).best();
}

}  // namespace tir::cuda::forward
