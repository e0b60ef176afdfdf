// Tiles of rows in shared memory, and the products of a warp's rows, 16 or several times 16, with
// them.
//
// A warp's result of 16 rows is spread over its lanes as tensor cores spread it: with g = lane / 4
// and t = lane % 4, total[j][0..1] belong to row g and total[j][2..3] to row g + 8, in two columns
// that begin at column<T>(j, t). float32 is multiplied without tensor cores, by the same shares.
#pragma once

#include "cuda/device.cuh"
#include "tir/rules.h"

namespace tir::cuda {

constexpr int kRows = 16;  // rows of one product

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of the widest access

// Rows of a tile lie 16 bytes further apart than they are long, so that the rows which a warp reads
// at once begin in different banks.
template <class T, int D>
constexpr int kPitch = D + kVector<T>;

template <class T>
constexpr bool kHasTensorCores = sizeof(T) == 2;

TIR_HOST_DEVICE constexpr int round_up(int number, int multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

// The rows of one head.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int count;
  int head_dim;
  bool is_aligned;  // every row begins on a 16-byte boundary and is a multiple of 16 bytes long
};

// Those that a result is written to, which the package lays out itself: wherever head_dim is a
// multiple of 16 bytes, every row begins on a 16-byte boundary.
template <class T>
struct ResultRows {
  T* data;
  int stride;
  int count;
  int head_dim;
};

// Begins to load `tile_rows` rows; zeros stand for rows that do not exist or are not kept, and for
// columns past head_dim. The copies still have to be committed and waited for.
template <class T, int D, class Keep>
TIR_DEVICE void load_tile(T* tile, const Rows<T>& rows, int first, int tile_rows, int thread,
                          int threads, Keep keep) {
  constexpr int kVectors = D / kVector<T>;
  if constexpr (kWarp % kVectors == 0) {
    if (rows.is_aligned) {
      // A thread keeps its column, so that addresses grow by sums alone. That of a row which does
      // not exist is not read.
      int row = thread / kVectors, column = thread % kVectors * kVector<T>;
      int existing = column < rows.head_dim ? rows.count - first : 0, step = threads / kVectors;
      const T* source = rows.data + (first + row) * rows.stride + column;
      T* target = tile + row * kPitch<T, D> + column;
      TIR_NO_UNROLL
      for (; row < tile_rows; row += step) {
        copy_async(target, source, row < existing && keep(first + row));
        source += step * rows.stride;
        target += step * kPitch<T, D>;
      }
      return;
    }
  }
  for (int i = thread; i < tile_rows * kVectors; i += threads) {
    int row = first + i / kVectors, column = i % kVectors * kVector<T>;
    T* target = tile + (i / kVectors) * kPitch<T, D> + column;
    bool exists = row < rows.count && column < rows.head_dim && keep(row);
    const T* source = exists ? rows.data + row * rows.stride + column : rows.data;
    if (rows.is_aligned) {
      copy_async(target, source, exists);
    } else {
      for (int e = 0; e < kVector<T>; ++e) {
        target[e] = exists && column + e < rows.head_dim ? source[e] : T{};
      }
    }
  }
}

struct KeepAll {
  TIR_DEVICE bool operator()(int) const { return true; }
};

// Puts zeros in the place of rows of a loaded tile that are not kept. A thread clears what it has
// loaded itself, so that its own copies are all that it must have waited for.
template <class T, int D, class Keep>
TIR_DEVICE void clear_rows(T* tile, int first, int tile_rows, int thread, int threads, Keep keep) {
  constexpr int kVectors = D / kVector<T>;
  TIR_NO_UNROLL
  for (int i = thread; i < tile_rows * kVectors; i += threads) {
    if (keep(first + i / kVectors)) continue;
    T* target = tile + i / kVectors * kPitch<T, D> + i % kVectors * kVector<T>;
    *reinterpret_cast<uint4*>(target) = uint4{0, 0, 0, 0};
  }
}

// 16 rows of a tile as the left operand of products: read again for each product, but for the first
// `kHeld` times 16 columns, which are in registers.
template <class T, int D, int kHeld>
struct LeftRows {
  static_assert(kHeld <= D / 16);
  static constexpr bool kHold = kHeld > 0 && kHasTensorCores<T>;
  const T* rows = nullptr;
  uint32_t held[kHold ? kHeld : 1][4];

  TIR_DEVICE void take(const T* tile, int lane) {
    if constexpr (kHasTensorCores<T>) {
      rows = tile + lane % 16 * kPitch<T, D> + lane / 16 * 8;
      if constexpr (kHold) {
        TIR_UNROLL
        for (int k = 0; k < kHeld; ++k) load_matrices(held[k], rows + 16 * k);
      }
    } else {
      rows = tile + lane / 4 * kPitch<T, D>;
    }
  }

  TIR_DEVICE void fragment(int k, uint32_t (&registers)[4]) const {
    if (k < kHeld) {
      TIR_UNROLL
      for (int i = 0; i < 4; ++i) registers[i] = held[k][i];
    } else {
      load_matrices(registers, rows + 16 * k);
    }
  }
};

// The first column of total[j] in a lane.
template <class T>
TIR_DEVICE int column(int j, int t) {
  return kHasTensorCores<T> ? 8 * j + 2 * t : 16 * (j / 2) + 4 * t + 2 * (j % 2);
}

template <class T>
TIR_DEVICE void store_pair(T* target, float first, float second) {
  if constexpr (kHasTensorCores<T>) {
    *reinterpret_cast<uint32_t*>(target) = pack<T>(first, second);
  } else {
    *reinterpret_cast<float2*>(target) = {first, second};
  }
}

// total[m] (16 x 8 N) += left[m] (16 x D) tile^T, where the tile holds 8 N rows; only its first
// 8 `used` rows are read and only their columns are added to. `used` is even. What is read of the
// tile serves all M. Columns: 8 j + 2 t, whatever the type.
template <class T, int D, int M, int N, int kHeld>
TIR_DEVICE void multiply_transposed(float (&total)[M][N][4],
                                    const LeftRows<T, D, kHeld> (&left)[M], const T* tile,
                                    int used, int lane) {
  if constexpr (kHasTensorCores<T>) {
    const T* rows = tile + (lane / 16 * 8 + lane % 8) * kPitch<T, D> + lane / 8 % 2 * 8;
    TIR_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[M][4];
      TIR_UNROLL
      for (int m = 0; m < M; ++m) left[m].fragment(k, a[m]);
      TIR_UNROLL
      for (int j = 0; j < N; j += 2) {
        if (j < used) {
          uint32_t b[4];
          load_matrices(b, rows + 8 * j * kPitch<T, D> + 16 * k);
          TIR_UNROLL
          for (int m = 0; m < M; ++m) {
            multiply_add<T>(total[m][j], a[m], b[0], b[1]);
            multiply_add<T>(total[m][j + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  } else {
    static_assert(M == 1, "float32 takes 16 rows at a time");
    const T* rows = tile + 2 * (lane % 4) * kPitch<T, D>;
    for (int k = 0; k < D; k += 4) {
      float4 upper = *reinterpret_cast<const float4*>(left[0].rows + k);
      float4 lower = *reinterpret_cast<const float4*>(left[0].rows + 8 * kPitch<T, D> + k);
      TIR_UNROLL
      for (int j = 0; j < N; ++j) {
        if (j < used) {
          TIR_UNROLL
          for (int e = 0; e < 2; ++e) {
            float4 b = *reinterpret_cast<const float4*>(rows + (8 * j + e) * kPitch<T, D> + k);
            float(&sums)[4] = total[0][j];
            sums[e] += upper.x * b.x + upper.y * b.y + upper.z * b.z + upper.w * b.w;
            sums[2 + e] += lower.x * b.x + lower.y * b.y + lower.z * b.z + lower.w * b.w;
          }
        }
      }
    }
  }
}

// Elements that `multiply` needs of a warp's own shared memory.
template <class T, int N>
constexpr int kStaging = kHasTensorCores<T> ? 0 : kRows * (8 * N + 4);

// total[m] (16 x D) += left[m] (16 x 8 N) tile, where the tile holds 8 N rows of which the first
// 8 `used` count. `left` has the columns that multiply_transposed gives.
template <class T, int D, int M, int N>
TIR_DEVICE void multiply(float (&total)[M][D / 8][4], const float (&left)[M][N][4], const T* tile,
                         int used, T* staging, int lane) {
  if constexpr (kHasTensorCores<T>) {
    const T* rows = tile + lane % 16 * kPitch<T, D> + lane / 16 * 8;
    TIR_UNROLL
    for (int j = 0; j < N; j += 2) {
      if (j < used) {
        uint32_t a[M][4];
        TIR_UNROLL
        for (int m = 0; m < M; ++m) {
          a[m][0] = pack<T>(left[m][j][0], left[m][j][1]);
          a[m][1] = pack<T>(left[m][j][2], left[m][j][3]);
          a[m][2] = pack<T>(left[m][j + 1][0], left[m][j + 1][1]);
          a[m][3] = pack<T>(left[m][j + 1][2], left[m][j + 1][3]);
        }
        TIR_UNROLL
        for (int c = 0; c < D / 16; ++c) {
          uint32_t b[4];
          load_matrices_transposed(b, rows + 8 * j * kPitch<T, D> + 16 * c);
          TIR_UNROLL
          for (int m = 0; m < M; ++m) {
            multiply_add<T>(total[m][2 * c], a[m], b[0], b[1]);
            multiply_add<T>(total[m][2 * c + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  } else {
    constexpr int kPitchLeft = 8 * N + 4;
    int g = lane / 4, t = lane % 4;
    TIR_UNROLL
    for (int j = 0; j < N; ++j) {
      store_pair(staging + g * kPitchLeft + 8 * j + 2 * t, left[0][j][0], left[0][j][1]);
      store_pair(staging + (g + 8) * kPitchLeft + 8 * j + 2 * t, left[0][j][2], left[0][j][3]);
    }
    __syncwarp();
    for (int k = 0; k < 8 * used; ++k) {
      float upper = staging[g * kPitchLeft + k], lower = staging[(g + 8) * kPitchLeft + k];
      TIR_UNROLL
      for (int c = 0; c < D / 16; ++c) {
        float4 b = *reinterpret_cast<const float4*>(tile + k * kPitch<T, D> + 16 * c + 4 * t);
        float(&first)[4] = total[0][2 * c];
        float(&second)[4] = total[0][2 * c + 1];
        first[0] += upper * b.x;
        first[1] += upper * b.y;
        first[2] += lower * b.x;
        first[3] += lower * b.y;
        second[0] += upper * b.z;
        second[1] += upper * b.w;
        second[2] += lower * b.z;
        second[3] += lower * b.w;
      }
    }
    __syncwarp();  // the next product writes there
  }
}

// Writes a warp's 16 x D result, row g times factor[0] and row g + 8 times factor[1], to rows from
// `first` on. The warp's own tile serves on the way.
template <class T, int D>
TIR_DEVICE void store_rows(const float (&total)[D / 8][4], float factor_g, float factor_g8,
                           T* tile, const ResultRows<T>& rows, int first, int lane) {
  int g = lane / 4, t = lane % 4;
  __syncwarp();  // the tile may still be read
  TIR_UNROLL
  for (int j = 0; j < D / 8; ++j) {
    T* upper = tile + g * kPitch<T, D> + column<T>(j, t);
    T* lower = upper + 8 * kPitch<T, D>;
    store_pair(upper, total[j][0] * factor_g, total[j][1] * factor_g);
    store_pair(lower, total[j][2] * factor_g8, total[j][3] * factor_g8);
  }
  __syncwarp();
  constexpr int kVectors = D / kVector<T>;
  bool is_aligned = rows.head_dim % kVector<T> == 0;
  for (int i = lane; i < kRows * kVectors; i += kWarp) {
    int row = first + i / kVectors, start = i % kVectors * kVector<T>;
    if (row >= rows.count || start >= rows.head_dim) continue;
    const T* source = tile + i / kVectors * kPitch<T, D> + start;
    T* destination = rows.data + static_cast<int64_t>(row) * rows.stride + start;
    if (is_aligned) {
      *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int e = 0; e < kVector<T> && start + e < rows.head_dim; ++e) destination[e] = source[e];
    }
  }
  __syncwarp();  // the caller may write there again
}

// Sum and maximum over the four lanes that share a row.
TIR_DEVICE float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
TIR_DEVICE float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

}  // namespace tir::cuda
