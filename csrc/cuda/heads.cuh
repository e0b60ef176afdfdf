// What the forward and backward attention kernels share on the host and about heads.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/elements.h"
#include "cuda/key_weights.cuh"
#include "cuda/launch.h"
#include "cuda/tile.cuh"
#include "tir/rules.h"

namespace tir::cuda {

// The `count` rows of a head: its queries or its keys.
template <class T>
TIR_DEVICE Rows<T> rows_of_head(const RowGrid& grid, const AttentionShape& shape, int count,
                                int64_t batch, int64_t head, bool is_aligned) {
  return {static_cast<const T*>(grid.data) + batch * grid.batch_stride + head * grid.head_stride,
          grid.row_stride, count, static_cast<int>(shape.head_dim), is_aligned};
}

template <class T>
TIR_DEVICE ResultRows<T> rows_of_head(const ResultGrid& grid, const AttentionShape& shape,
                                      int count, int64_t batch, int64_t head) {
  return {static_cast<T*>(grid.data) + batch * grid.batch_stride + head * grid.head_stride,
          static_cast<int>(grid.row_stride), count, static_cast<int>(shape.head_dim)};
}

// Calls step(chunk) for one chunk of streamed rows after the other. While a step is at work
// load(chunk) copies the next: it may write to all slots but that of the step.
template <class Load, class Step>
TIR_DEVICE void stream_chunks(int chunks, Load load, Step step) {
  load(0);
  TIR_NO_UNROLL
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies<0>();
    __syncthreads();  // all copies are in, and the slot that is filled next is read no more
    if (chunk + 1 < chunks) load(chunk + 1);
    step(chunk);
  }
}

inline bool rows_are_aligned(const AttentionShape& shape, const RowGrid& grid) {
  int64_t vector = 16 / bytes_of(shape.type);
  return reinterpret_cast<uintptr_t>(grid.data) % 16 == 0 && shape.head_dim % vector == 0 &&
         grid.batch_stride % vector == 0 && grid.head_stride % vector == 0 &&
         grid.row_stride % vector == 0;
}

// Calls launch with the smallest compiled head_dim that holds the given one.
template <class Launch>
void with_head_dim(const char* name, int64_t head_dim, Launch launch) {
  if (head_dim <= 64) {
    launch(std::integral_constant<int, 64>());
  } else if (head_dim <= 80) {
    launch(std::integral_constant<int, 80>());
  } else if (head_dim <= 96) {
    launch(std::integral_constant<int, 96>());
  } else if (head_dim <= 112) {
    launch(std::integral_constant<int, 112>());
  } else if (head_dim <= kMaxHeadDim) {
    launch(std::integral_constant<int, 128>());
  } else {
    throw std::runtime_error(std::string("tir_kernels ") + name + ": heads of width " +
                             std::to_string(head_dim) + " are wider than the CUDA kernels take");
  }
}

// As few warps as make the block's shared memory fit, and no more than `most`.
template <class Bytes>
int fitting_warps(const char* name, int most, int64_t limit, Bytes bytes) {
  int warps = most;
  while (warps > 1 && bytes(warps) > limit) --warps;
  if (bytes(warps) > limit) {
    throw std::runtime_error(std::string("tir_kernels ") + name +
                             ": the device has too little shared memory for rows this long");
  }
  return warps;
}

}  // namespace tir::cuda
