// A block's patch tokens in shared memory, where they go through LayerNorm.
#pragma once

#include "cuda/values.cuh"
#include "tir/cuda.h"

namespace tir::cuda {

// What stays known of a tile's rows.
template <int kTileRows>
struct TokenRows {
  int64_t token_offsets[kTileRows];   // of the first element of the token; -1 for no token
  int64_t output_offsets[kTileRows];  // of its relevance to class 0; -1 for no token
  float means[kTileRows];
  float factors[kTileRows];  // 1 / standard deviation; until that is known, squared deviations
};

// `span` columns of the tile are in shared memory at once. Every warp loads and normalises rows of
// its own, so that only the readers of all rows need a barrier of the block.
template <class T, int kTileRows, int kWarps>
struct TokenTile {
  static constexpr int kOwnRows = kTileRows / kWarps;
  static constexpr int kStride = kWarp * kVector<T>;  // columns that a warp takes at once

  const Relevance& arguments;
  Type norm_type;  // of norm_weight and norm_bias: one branch for both
  bool tokens_are_aligned, norm_is_aligned;
  int span;
  TokenRows<kTileRows>& rows;
  T* data;  // [kTileRows, pitch]
  int own, lane, model_dim, pitch;

  TIR_DEVICE bool is_whole() const { return span >= model_dim; }
  TIR_DEVICE T* at(int row, int column) const { return data + row * pitch + column; }

  // Patch tokens are counted through the images of their group.
  TIR_DEVICE void find_rows(int64_t group, int64_t tile) {
    int64_t images = arguments.batch / arguments.num_groups;
    int64_t patches = arguments.length - arguments.num_prefix_tokens;
    if (lane < kOwnRows) {
      int64_t index = tile * kTileRows + own + lane;
      bool exists = index < images * patches;
      int64_t image = group * images + index / patches, patch = index % patches;
      int64_t token = arguments.num_prefix_tokens + patch;
      int64_t token_offset =
          image * arguments.tokens.batch_stride + token * arguments.tokens.row_stride;
      rows.token_offsets[own + lane] = exists ? token_offset : -1;
      rows.output_offsets[own + lane] =
          exists ? image * arguments.num_classes * patches + patch : -1;
    }
    __syncwarp();
  }

  // Begins to load the span from `first_column` on, and commits the copies.
  TIR_DEVICE void load(int first_column) {
    auto* source = static_cast<const T*>(arguments.tokens.data) + first_column;
    int left = model_dim - first_column;
    TIR_NO_UNROLL
    for (int row = own; row < own + kOwnRows; ++row) {
      int64_t offset = rows.token_offsets[row];
      for (int column = lane * kVector<T>; column < span; column += kStride) {
        int count = offset >= 0 ? left - column : 0;
        if (tokens_are_aligned) {
          copy_async(at(row, column), count > 0 ? source + offset + column : source, count > 0);
        } else {
          for (int e = 0; e < kVector<T>; ++e) {
            *at(row, column + e) = e < count ? source[offset + column + e] : T{};
          }
        }
      }
    }
    commit_copies();
  }

  // Merges the loaded span into the rows' means and squared deviations. A span's deviations are
  // taken around its own mean: unlike a sum of squares, that loses nothing where the mean is far
  // from 0.
  TIR_DEVICE void merge_statistics(int first_column) {
    constexpr int kBatch = kOwnRows % 4 == 0 ? 4 : 2;  // rows at once: a sum over a warp takes long
    int columns = min(span, model_dim - first_column);
    float share = static_cast<float>(columns) / static_cast<float>(first_column + columns);
    for (int first = own; first < own + kOwnRows; first += kBatch) {
      float means[kBatch] = {}, deviations[kBatch] = {}, values[kVector<T>];
      for (int column = lane * kVector<T>; column < columns; column += kStride) {
        TIR_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          read_vector<T>(values, at(first + i, column));
          TIR_UNROLL
          for (int e = 0; e < kVector<T>; ++e) means[i] += values[e];
        }
      }
      TIR_UNROLL
      for (int i = 0; i < kBatch; ++i) means[i] = warp_sum(means[i]) / columns;
      for (int column = lane * kVector<T>; column < columns; column += kStride) {
        TIR_UNROLL
        for (int i = 0; i < kBatch; ++i) {
          read_vector<T>(values, at(first + i, column));
          TIR_UNROLL
          for (int e = 0; e < kVector<T>; ++e) {
            float centered = column + e < columns ? values[e] - means[i] : 0.0f;
            deviations[i] += centered * centered;
          }
        }
      }
      TIR_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        float mean = means[i], deviation = warp_sum(deviations[i]);
        if (first_column > 0) {
          float before = rows.means[first + i], shift = mean - before;
          mean = before + shift * share;
          deviation += rows.factors[first + i] +
                       shift * shift * static_cast<float>(first_column) * share;
        }
        if (first_column + columns == model_dim) {
          deviation = 1.0f / sqrtf(deviation / model_dim + arguments.norm_eps);
        }
        __syncwarp();  // all lanes have read what one writes
        if (lane == 0) rows.means[first + i] = mean, rows.factors[first + i] = deviation;
      }
    }
    __syncwarp();
  }

  // LayerNorm's gain and bias from `column` on; zeros past model_dim.
  template <int kCount>
  TIR_DEVICE void read_affine(float (&gains)[kCount], float (&biases)[kCount], int column) const {
    int count = model_dim - column;
    if (arguments.norm_weight.data != nullptr) {
      Array weight{arguments.norm_weight.data, norm_type};
      read_elements(gains, weight, column, count, norm_is_aligned);
    } else {
      TIR_UNROLL
      for (int e = 0; e < kCount; ++e) gains[e] = e < count ? 1.0f : 0.0f;
    }
    if (arguments.norm_bias.data != nullptr) {
      Array bias{arguments.norm_bias.data, norm_type};
      read_elements(biases, bias, column, count, norm_is_aligned);
    } else {
      TIR_UNROLL
      for (int e = 0; e < kCount; ++e) biases[e] = 0.0f;
    }
  }

  // Normalises the loaded span in place, rounded to the type of the tokens.
  //
  // LayerNorm could be folded into the product instead: tokens times the projection with gains in
  // it, less the mean times the sums of its columns. It would not be as accurate where the mean is
  // large. With D 768, E 512 and a mean of 3, 10 and 30 deviations, mean errors in float32 were
  // 2.3, 4.0 and 7.0 times plain PyTorch's; normalised first, 1.1, 0.9 and 1.6. In float16 they
  // were 2.8 times at 1000 deviations, against 0.4. bfloat16 bore it, with 0.4 either way at any
  // mean, but another kernel would have to put the gains in, and to launch it takes longer than
  // this pass.
  TIR_DEVICE void normalize(int first_column) {
    for (int column = lane * kVector<T>; column < span; column += kStride) {
      float gains[kVector<T>], biases[kVector<T>], values[kVector<T>];
      read_affine(gains, biases, first_column + column);
      TIR_UNROLL
      for (int i = 0; i < kOwnRows; ++i) {
        float mean = rows.means[own + i], factor = rows.factors[own + i];
        read_vector<T>(values, at(own + i, column));
        TIR_UNROLL
        for (int e = 0; e < kVector<T>; ++e) {
          values[e] = (values[e] - mean) * factor * gains[e] + biases[e];
        }
        write_vector<T>(at(own + i, column), values);
      }
    }
  }
};

}  // namespace tir::cuda
