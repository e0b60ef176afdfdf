// How long a grid of blocks keeps a GPU, by which plans of attention kernels are compared.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace tir::cuda {

constexpr int kWarpsAtOnce = 8;  // on a multiprocessor, that registers leave room for
constexpr int kReserved = 1024;  // bytes of a block that are the driver's

// A multiprocessor with so many warps works at this rate; it is 20 with eight (bench/model.py).
inline int64_t rate(int64_t warps) {
  return warps <= 4 ? 3 * warps : 4 + 2 * std::min<int64_t>(warps, 8);
}

// The time until the multiprocessor with most blocks is done with them: as many as fit at a time,
// at last the rest, which leave more of it unused.
inline int64_t makespan(int64_t blocks, int warps, int64_t bytes, int64_t work, const Device& gpu) {
  constexpr int64_t kOfOne = 5040;  // a multiple of every rate
  int64_t room = (gpu.shared_memory + kReserved) / (bytes + kReserved);
  int64_t at_once = std::clamp<int64_t>(room, 1, std::max(kWarpsAtOnce / warps, 1));
  int64_t most = (blocks + gpu.multiprocessors - 1) / gpu.multiprocessors, rest = most % at_once;
  int64_t time = (most - rest) * (kOfOne / rate(at_once * warps));
  if (rest > 0) time += rest * (kOfOne / rate(rest * warps));
  return work * time;
}

}  // namespace tir::cuda
