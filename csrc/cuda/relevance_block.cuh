// The work of a block of the relevance kernel: slices of features, and their products with classes.
#pragma once

#include "cuda/float_product.cuh"
#include "cuda/relevance_plan.h"
#include "tir/rules.h"

namespace tir::cuda {

// Waits for all copies but those of the last `pending` commits, or more of them.
TIR_DEVICE void wait_but_for(int pending) {
  switch (pending) {
    case 0: return wait_for_copies<0>();
    case 1: return wait_for_copies<1>();
    case 2: return wait_for_copies<2>();
    case 3: return wait_for_copies<3>();
    default: return wait_for_copies<kMaxStages - 1>();
  }
}

template <class T, int M>
struct RelevanceBlock {
  static constexpr int kShare = kDepth<T> * kSlice / kVector<T> / kThreads;  // vectors of a step
  // features[m][j][2 half + e] belongs to token row(m, half) and feature first_column(j) + e.
  using Features = float[M][kColumns<T>][2 * kHalves];
  using Held = float[kShare][kVector<T>];

  const Relevance& arguments;
  const RelevancePlan& plan;
  int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  int token_warp = warp / kFeatureWarps<T>, feature_warp = warp % kFeatureWarps<T>;
  int model_dim = static_cast<int>(arguments.model_dim);
  int joint_dim = static_cast<int>(arguments.joint_dim);
  int num_classes = static_cast<int>(arguments.num_classes);
  BlockState<T, M>& state = *reinterpret_cast<BlockState<T, M>*>(shared_memory());
  TokenTile<T, kTokens<T, M>, kWarps> tokens{
      arguments,
      arguments.norm_weight.type,
      plan.tokens_are_aligned,
      plan.norm_is_aligned,
      plan.span,
      state.rows,
      reinterpret_cast<T*>(shared_memory() + sizeof(BlockState<T, M>)),
      warp * (kTokens<T, M> / kWarps),
      lane,
      model_dim,
      plan.span + kVector<T>};
  T* slots = tokens.at(kTokens<T, M>, 0);
  ClassRoom<T, M>& room = *reinterpret_cast<ClassRoom<T, M>*>(slots);

  // This thread's share of a step: a vector at `place` in every `line_step`-th line from `line` on,
  // where a line is contiguous: a row of the projection, or a column.
  int line_vectors = (plan.by_feature ? kDepth<T> : kSlice) / kVector<T>;
  int line = thread / line_vectors, place = thread % line_vectors * kVector<T>;
  int line_step = kThreads / line_vectors;
  int line_pitch = plan.by_feature ? kPitchByFeature<T> : kPitchByDepth;

  // The row of the tile, and the column of the slice, that an accumulator of this lane belongs to.
  TIR_DEVICE int row(int m, int half) const {
    return (token_warp * M + m) * kRows + lane / 4 + 8 * half;
  }
  TIR_DEVICE int first_column(int j) const {
    return feature_warp * kWarpFeatures<T> + 8 * j + 2 * (lane % 4);
  }

  TIR_DEVICE void find_statistics() {
    for (int column = 0; column < model_dim; column += plan.span) {
      if (column > 0) tokens.load(column);
      // Steps of the projection that were begun after the first span may still be on their way.
      wait_but_for(column > 0 || arguments.proj.data == nullptr ? 0 : plan.stages - 1);
      __syncwarp();
      tokens.merge_statistics(column);
    }
  }

  // Begins to load a step. What has to be converted is held in registers until `finish_step`: by
  // then, products have covered the time that it takes to come.
  TIR_DEVICE void begin_step(int step, int first_feature, int slot, Held& held) {
    int first_depth = step * kDepth<T>;
    int first_line = line + (plan.by_feature ? first_feature : first_depth);
    int first_place = place + (plan.by_feature ? first_depth : first_feature);
    int lines = plan.by_feature ? joint_dim : model_dim;
    int left = (plan.by_feature ? model_dim : joint_dim) - first_place;
    int existing = left > 0 ? lines - first_line : 0;
    int64_t first = first_line * plan.line_stride + first_place;
    int64_t stride = line_step * plan.line_stride;
    if (plan.proj_is_copied) {
      // The address of a line that does not exist is not read.
      const T* source = static_cast<const T*>(arguments.proj.data) + first;
      TIR_UNROLL
      for (int i = 0; i < kShare; ++i) {
        copy_async(share(slot, i), source, i * line_step < existing);
        source += stride;
      }
    } else {
      TIR_UNROLL
      for (int i = 0; i < kShare; ++i) {
        int count = i * line_step < existing ? left : 0;
        read_elements(held[i], arguments.proj, first + i * stride, count, plan.proj_is_aligned);
      }
    }
  }

  TIR_DEVICE void finish_step(int slot, const Held& held) {
    if (plan.proj_is_copied) return;
    TIR_UNROLL
    for (int i = 0; i < kShare; ++i) write_vector<T>(share(slot, i), held[i]);
  }

  // Where vector i of this thread's share of a step lies.
  TIR_DEVICE T* share(int slot, int i) const {
    return slots + slot * plan.slot + (line + i * line_step) * line_pitch + place;
  }

  TIR_DEVICE void begin_slice(int first_feature) {
    for (int step = 0; step < plan.stages - 1; ++step) {
      Held held = {};
      begin_step(step, first_feature, step, held);
      commit_copies();
      finish_step(step, held);
    }
  }

  // features += tokens times projection, over the rows of a step.
  template <bool kByFeature>
  TIR_DEVICE void multiply_step(Features& features, const T* left, const T* right) {
    constexpr int kPitchRight = kByFeature ? kPitchByFeature<T> : kPitchByDepth;
    int first_row = token_warp * M * kRows, first = feature_warp * kWarpFeatures<T>;
    left += (first_row + lane % 16) * tokens.pitch + lane / 16 * kVector<T>;
    if constexpr (kByFeature) {
      right += (first + lane / 16 * 8 + lane % 8) * kPitchRight + lane / 8 % 2 * kVector<T>;
    } else if constexpr (kHasTensorCores<T>) {
      right += lane % 16 * kPitchRight + first + lane / 16 * 8;
    } else {
      right += lane % 4 * kPitchRight + first + lane / 4;
    }
    TIR_UNROLL
    for (int k = 0; k < kDepth<T>; k += 2 * kVector<T>) {
      uint32_t a[M][4];
      TIR_UNROLL
      for (int m = 0; m < M; ++m) load_matrices(a[m], left + m * kRows * tokens.pitch + k);
      TIR_UNROLL
      for (int j = 0; j < kColumns<T>; j += 2) {
        uint32_t b[4];
        if constexpr (kByFeature) {
          load_matrices(b, right + 8 * j * kPitchRight + k);
        } else if constexpr (kHasTensorCores<T>) {
          load_matrices_transposed(b, right + k * kPitchRight + 8 * j);
        } else {
          TIR_UNROLL
          for (int i = 0; i < 4; ++i) {
            b[i] = __float_as_uint(right[(k + 4 * (i % 2)) * kPitchRight + 8 * (j + i / 2)]);
          }
        }
        TIR_UNROLL
        for (int m = 0; m < M; ++m) {
          multiply_add<T>(features[m][j], a[m], b[0], b[1]);
          multiply_add<T>(features[m][j + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // The features of a slice whose first steps have been begun.
  TIR_DEVICE void project(Features& features, int first_feature) {
    bool has_features = first_feature + feature_warp * kWarpFeatures<T> < joint_dim;
    int steps = (model_dim + kDepth<T> - 1) / kDepth<T>, offset = 0, slot = 0;
    for (int step = 0; step < steps; ++step) {
      if (offset == plan.span) offset = 0;
      if (offset == 0) prepare_tokens(step * kDepth<T>, first_feature == 0);
      wait_but_for(plan.stages - 2);
      __syncthreads();  // the step is here, and everyone is done with the one before
      int next = step + plan.stages - 1, next_slot = (slot == 0 ? plan.stages : slot) - 1;
      Held held = {};
      // Found anew, so that products of float32 have the registers that addresses would take.
      if (next < steps) begin_step(anew(next), first_feature, next_slot, held);
      commit_copies();
      if (has_features) {
        const T* left = tokens.data + offset;
        const T* right = slots + slot * plan.slot;
        if (plan.by_feature) {
          multiply_step<true>(features, left, right);
        } else {
          multiply_step<false>(features, left, right);
        }
      }
      if (next < steps) finish_step(next_slot, held);
      offset += kDepth<T>;
      slot = slot + 1 < plan.stages ? slot + 1 : 0;
    }
  }

  TIR_DEVICE void prepare_tokens(int first_column, bool is_first_slice) {
    if (!tokens.is_whole()) {
      __syncthreads();  // everyone is done with the span before
      tokens.load(first_column);
      wait_for_copies<0>();
      __syncwarp();
    }
    if (arguments.has_norm && (is_first_slice || !tokens.is_whole())) {
      tokens.normalize(first_column);
    }
  }

  // Without a projection the features are the normalised tokens, as they are before rounding.
  TIR_DEVICE void take_tokens(Features& features, int first_feature) {
    if (!tokens.is_whole()) tokens.load(first_feature);
    wait_for_copies<0>();
    __syncthreads();
    TIR_UNROLL
    for (int j = 0; j < kColumns<T>; ++j) {
      int column = first_column(j);
      if (column >= plan.span) continue;
      float gains[2], biases[2];
      tokens.read_affine(gains, biases, first_feature + column);
      TIR_UNROLL
      for (int m = 0; m < M; ++m) {
        TIR_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          TIR_UNROLL
          for (int e = 0; e < 2; ++e) {
            float value = to_float(*tokens.at(row(m, half), column + e));
            if (arguments.has_norm) {
              value = (value - state.rows.means[row(m, half)]) * state.rows.factors[row(m, half)];
              value = value * gains[e] + biases[e];
            }
            features[m][j][2 * half + e] = value;
          }
        }
      }
    }
  }

  TIR_DEVICE void add_squares(float (&squares)[M][kHalves], const Features& features) const {
    TIR_UNROLL
    for (int m = 0; m < M; ++m) {
      TIR_UNROLL
      for (int j = 0; j < kColumns<T>; ++j) {
        TIR_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          const float* feature = &features[m][j][2 * half];
          squares[m][half] += feature[0] * feature[0];
          squares[m][half] += feature[1] * feature[1];
        }
      }
    }
  }

  TIR_DEVICE void share_squares(const float (&squares)[M][kHalves]) const {
    TIR_UNROLL
    for (int m = 0; m < M; ++m) {
      TIR_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        float sum = quad_sum(squares[m][half]);
        if (lane % 4 == 0) room.squares[feature_warp][row(m, half)] = sum;
      }
    }
  }

  TIR_DEVICE void read_class(float (&values)[kSlice / kWarp], int64_t group, int index,
                             int first_feature) {
    int64_t first = (group * num_classes + index) * joint_dim + first_feature;
    TIR_UNROLL
    for (int i = 0; i < kSlice / kWarp; ++i) {
      int feature = lane + i * kWarp;
      bool exists = index < num_classes && first_feature + feature < joint_dim;
      values[i] = exists ? read_element(arguments.class_embeddings, first + feature) : 0.0f;
    }
  }

  // Adds a slice's products with the classes to the relevance, which holds unfinished sums until
  // the last slice: any number of classes has room there.
  TIR_DEVICE void multiply_classes(const Features& features, int64_t group, int part,
                                   int first_feature) {
    bool is_last = first_feature + kSlice >= joint_dim;
    int used_warps = min(kFeatureWarps<T>, (joint_dim - first_feature + kWarpFeatures<T> - 1) /
                                            kWarpFeatures<T>);
    int64_t patches = arguments.length - arguments.num_prefix_tokens;
    int first_class = part * kMaxClasses, end = min(num_classes, first_class + kMaxClasses);
    float values[kSlice / kWarp];
    read_class(values, group, first_class + warp, first_feature);
    for (int first = first_class; first < end; first += kClasses) {
      float square = 0.0f;
      TIR_UNROLL
      for (int i = 0; i < kSlice / kWarp; ++i) {
        room.classes[warp][lane + i * kWarp] = values[i];
        square += values[i] * values[i];
      }
      square = warp_sum(square);
      if (lane == 0 && first + warp < end) {
        float& total = state.class_squares[first - first_class + warp];
        total = first_feature == 0 ? square : total + square;
      }
      __syncthreads();
      // The next classes come while these are multiplied.
      read_class(values, group, first + kClasses + warp, first_feature);
      int count = min(kClasses, end - first);
      for (int c = 0; feature_warp < used_warps && c < count; ++c) {
        float products[M][kHalves] = {};
        TIR_UNROLL
        for (int j = 0; j < kColumns<T>; ++j) {
          float2 pair = *reinterpret_cast<const float2*>(&room.classes[c][first_column(j)]);
          TIR_UNROLL
          for (int m = 0; m < M; ++m) {
            TIR_UNROLL
            for (int half = 0; half < kHalves; ++half) {
              const float* feature = &features[m][j][2 * half];
              products[m][half] += feature[0] * pair.x + feature[1] * pair.y;
            }
          }
        }
        TIR_UNROLL
        for (int m = 0; m < M; ++m) {
          TIR_UNROLL
          for (int half = 0; half < kHalves; ++half) {
            float product = quad_sum(products[m][half]);
            if (lane % 4 == 0) room.products[c][feature_warp][row(m, half)] = product;
          }
        }
      }
      __syncthreads();
      for (int i = thread; i < count * kTokens<T, M>; i += kThreads) {
        int c = i / kTokens<T, M>, row = i % kTokens<T, M>;
        int64_t offset = state.rows.output_offsets[row];
        if (offset < 0) continue;
        float* target = arguments.relevance + offset + (first + c) * patches;
        float product = first_feature == 0 ? 0.0f : *target;
        for (int w = 0; w < used_warps; ++w) product += room.products[c][w][row];
        if (is_last) {
          float squares = 0.0f;
          for (int w = 0; w < kFeatureWarps<T>; ++w) squares += room.squares[w][row];
          product /= sqrtf(squares) + cosine_eps;
          product /= sqrtf(state.class_squares[first - first_class + c]) + cosine_eps;
        }
        *target = product;
      }
    }
  }
};

}  // namespace tir::cuda
