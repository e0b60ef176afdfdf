// How the relevance kernel is launched: tokens and features of a block, and shared memory for them.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/token_tile.cuh"

namespace tir::cuda {

// Warps share a block's tokens by two and a slice's features by four, so each multiplies 16 M
// tokens by 64 features: enough products for what it reads of shared memory. float32 takes three
// times the products and twice the room, so blocks have half the tokens and all warps share those.
constexpr int kWarps = 8, kThreads = kWarps * kWarp, kSlice = 256;
template <class T>
constexpr int kTokenWarps = kHasTensorCores<T> ? 2 : 1;
template <class T>
constexpr int kFeatureWarps = kWarps / kTokenWarps<T>;
template <class T>
constexpr int kWarpFeatures = kSlice / kFeatureWarps<T>;
template <class T>
constexpr int kColumns = kWarpFeatures<T> / 8;
constexpr int kHalves = 2;  // rows of a product that a lane has a part in: g and g + 8
constexpr int kMaxStages = 5;     // steps that have room in shared memory, at most
constexpr int kClasses = kWarps;  // classes multiplied at once: each warp fetches one
constexpr int kMaxClasses = 256;  // of a block; more are shared out over blocks

template <class T, int M>
constexpr int kTokens = kTokenWarps<T> * kRows * M;  // of a block

template <class T>
constexpr int kDepth = 64 / sizeof(T);  // rows of the projection in a step

// A step lies in shared memory as in global memory: [depth, feature] or [feature, depth].
constexpr int kPitchByDepth = kSlice + 8;  // what a warp reads at once lies in different banks
template <class T>
constexpr int kPitchByFeature = kPitch<T, kDepth<T>>;

struct RelevancePlan {
  int64_t tiles;        // blocks of tokens in a group
  int class_parts;      // blocks that share a tile's classes
  int span;             // columns of tokens that have room in shared memory, a multiple of kDepth
  int stages;           // steps that have room there: one is multiplied, the others come
  int slot;             // elements of a step there
  int64_t line_stride;  // elements between the projection's rows, or columns
  bool by_feature;      // the projection's columns are contiguous, not its rows
  bool tokens_are_aligned, norm_is_aligned, proj_is_aligned;
  bool proj_is_copied;  // it is aligned and needs no conversion
};

// Shared memory: this, then the tokens, then steps of the projection or a ClassRoom.
template <class T, int M>
struct BlockState {
  TokenRows<kTokens<T, M>> rows;
  float class_squares[kMaxClasses];
};

// What products with classes need, where the projection has passed through.
template <class T, int M>
struct ClassRoom {
  float classes[kClasses][kSlice];
  float products[kClasses][kFeatureWarps<T>][kTokens<T, M>];
  float squares[kFeatureWarps<T>][kTokens<T, M>];
};

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <class T, int M>
struct Candidate {
  RelevancePlan plan{};
  int64_t blocks, bytes, cost;

  Candidate(const Relevance& arguments, const Device& gpu) {
    bool has_proj = arguments.proj.data != nullptr;
    int64_t images = arguments.batch / arguments.num_groups;
    int64_t tokens = images * (arguments.length - arguments.num_prefix_tokens);
    plan.tiles = (tokens + kTokens<T, M> - 1) / kTokens<T, M>;
    plan.class_parts = static_cast<int>((arguments.num_classes + kMaxClasses - 1) / kMaxClasses);
    blocks = arguments.num_groups * plan.tiles * plan.class_parts;

    plan.by_feature = has_proj && arguments.proj_column_stride != 1;
    plan.slot = plan.by_feature ? kSlice * kPitchByFeature<T> : kDepth<T> * kPitchByDepth;
    bool whole_vectors = arguments.model_dim % kVector<T> == 0;
    const RowGrid& grid = arguments.tokens;
    plan.tokens_are_aligned = whole_vectors && is_aligned(grid.data) &&
                              grid.batch_stride % kVector<T> == 0 &&
                              grid.row_stride % kVector<T> == 0;
    plan.norm_is_aligned = whole_vectors && is_aligned(arguments.norm_weight.data) &&
                           is_aligned(arguments.norm_bias.data);
    plan.line_stride = plan.by_feature ? arguments.proj_column_stride : arguments.proj_row_stride;
    int64_t contiguous = plan.by_feature ? arguments.model_dim : arguments.joint_dim;
    plan.proj_is_aligned = is_aligned(arguments.proj.data) && contiguous % kVector<T> == 0 &&
                           plan.line_stride * bytes_of(arguments.proj.type) % 16 == 0;
    plan.proj_is_copied = plan.proj_is_aligned && arguments.proj.type == arguments.token_type;

    // Loading the projection has to cover its latency: the more steps are on their way, the better.
    // A step that is converted is on its way in registers.
    int64_t token_bytes = kTokens<T, M> * int64_t{sizeof(T)}, state = sizeof(BlockState<T, M>);
    int64_t all = round_up(static_cast<int>(arguments.model_dim), kDepth<T>);
    int64_t whole = (all + kVector<T>) * token_bytes;
    int64_t slot_bytes = plan.slot * int64_t{sizeof(T)};
    int64_t stages = (gpu.shared_memory - state - whole) / slot_bytes;
    if (stages < 2) stages = 3;  // tokens have to pass through anyway
    plan.stages = plan.proj_is_copied ? static_cast<int>(std::min<int64_t>(stages, kMaxStages)) : 2;
    int64_t rest =
        std::max<int64_t>(has_proj ? plan.stages * slot_bytes : 0, sizeof(ClassRoom<T, M>));
    int64_t room = (gpu.shared_memory - state - rest) / token_bytes - kVector<T>;
    // Without a projection, a slice of features is a span of tokens.
    plan.span = static_cast<int>(has_proj ? std::min(all, room / kDepth<T> * kDepth<T>)
                                          : std::min<int64_t>(all, kSlice));
    bytes = state + (plan.span + kVector<T>) * token_bytes + rest;

    // A block takes as long as its products, and for a while that its tokens have no part in; more
    // if it has to load and normalise tokens for every slice.
    int64_t waves = (blocks + gpu.multiprocessors - 1) / gpu.multiprocessors;
    cost = waves * (kTokens<T, M> + 32) * (plan.span < all ? 4 : 3);
  }
};

}  // namespace tir::cuda
