// Relevance of patch tokens to classes: LayerNorm, projection and cosine in one kernel.
//
// A block takes 32, 64 or 96 patch tokens of one class group. They are normalised into shared
// memory, and stay there if they fit. The projection passes by in slices of 256 features, a few of
// its rows at a step. What a slice adds to squared norms and to products with classes is taken from
// the accumulators, so that features never leave the registers.
//
// With 64 images of 196 patches, D 768 and E 512 in bfloat16, tensor cores need about as long as it
// takes to read the projection from the L2 cache once for every 96 tokens. Blocks of fewer tokens
// read it more often; they are for when there would be too few blocks for the multiprocessors.
#include <algorithm>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/relevance_block.cuh"

namespace tir::cuda {
namespace {

constexpr const char* kName = "token_relevance";

template <class T, int M, bool kProjects>
__global__ void __launch_bounds__(kThreads, kProjects ? 1 : 2)
    relevance_kernel(Relevance arguments, RelevanceTypes types, RelevancePlan plan) {
  RelevanceBlock<T, M> block{arguments, types, plan};
  int part = static_cast<int>(blockIdx.x % plan.class_parts);
  int64_t tile = blockIdx.x / plan.class_parts, group = tile / plan.tiles;
  block.tokens.find_rows(group, tile % plan.tiles);
  block.tokens.load(0);
  if constexpr (kProjects) block.begin_slice(0);
  if (arguments.has_norm) block.find_statistics();
  float squares[M][2] = {};
  for (int first_feature = 0; first_feature < block.joint_width; first_feature += kSlice) {
    float features[M][kColumns][4] = {};
    if constexpr (kProjects) {
      if (first_feature > 0) {
        __syncthreads();  // the projection returns to where the classes were
        block.begin_slice(first_feature);
      }
      block.project(features, first_feature);
    } else {
      block.take_tokens(features, first_feature);
    }
    TIR_UNROLL
    for (int i = 0; i < 4 * M * kColumns; ++i) {
      float feature = features[i / (4 * kColumns)][i / 4 % kColumns][i % 4];
      squares[i / (4 * kColumns)][i / 2 % 2] += feature * feature;
    }
    __syncthreads();  // everyone is done with the last step
    if (first_feature + kSlice >= block.joint_width) {
      TIR_UNROLL
      for (int i = 0; i < 2 * M; ++i) {
        float sum = quad_sum(squares[i / 2][i % 2]);
        if (block.lane % 4 == 0) {
          block.room.squares[block.feature_warp][block.row(i / 2, i % 2)] = sum;
        }
      }
    }
    block.multiply_classes(features, group, part, first_feature);
  }
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <class T, int M>
struct Candidate {
  RelevancePlan plan{};
  int64_t blocks, bytes, cost;

  Candidate(const Relevance& arguments, const Device& gpu) {
    bool has_proj = arguments.proj != nullptr;
    int64_t images = arguments.batch / arguments.num_groups;
    int64_t tokens = images * (arguments.length - arguments.num_prefix_tokens);
    plan.tiles = (tokens + kTokens<M> - 1) / kTokens<M>;
    plan.class_parts = static_cast<int>((arguments.num_classes + kMaxClasses - 1) / kMaxClasses);
    blocks = arguments.num_groups * plan.tiles * plan.class_parts;

    plan.by_feature = has_proj && arguments.proj_column_stride != 1;
    plan.slot = plan.by_feature ? kSlice * kPitchByFeature<T> : kDepth<T> * kPitchByDepth<T>;
    bool whole_vectors = arguments.width % kVector<T> == 0;
    const RowGrid& grid = arguments.tokens;
    plan.tokens_are_aligned = whole_vectors && is_aligned(grid.data) &&
                              grid.batch_stride % kVector<T> == 0 &&
                              grid.row_stride % kVector<T> == 0;
    plan.norm_is_aligned = whole_vectors && is_aligned(arguments.norm_weight) &&
                           is_aligned(arguments.norm_bias);
    plan.line_stride = plan.by_feature ? arguments.proj_column_stride : arguments.proj_row_stride;
    int64_t contiguous = plan.by_feature ? arguments.width : arguments.joint_width;
    plan.proj_is_aligned = is_aligned(arguments.proj) && contiguous % kVector<T> == 0 &&
                           plan.line_stride * bytes_of(arguments.proj_type) % 16 == 0;
    plan.proj_is_copied = plan.proj_is_aligned && arguments.proj_type == arguments.token_type;

    // Loading the projection has to cover its latency: the more steps are on their way, the better.
    // A step that is converted is on its way in registers.
    int64_t token_bytes = kTokens<M> * int64_t{sizeof(T)}, state = sizeof(BlockState<M>);
    int64_t all = round_up(static_cast<int>(arguments.width), kDepth<T>);
    int64_t whole = (all + kVector<T>) * token_bytes;
    int64_t slot_bytes = plan.slot * int64_t{sizeof(T)};
    int64_t stages = (gpu.shared_memory - state - whole) / slot_bytes;
    if (stages < 2) stages = 3;  // tokens have to pass through anyway
    plan.stages = plan.proj_is_copied ? static_cast<int>(std::min<int64_t>(stages, kMaxStages)) : 2;
    int64_t rest = std::max<int64_t>(has_proj ? plan.stages * slot_bytes : 0, sizeof(ClassRoom<M>));
    int64_t room = (gpu.shared_memory - state - rest) / token_bytes - kVector<T>;
    // Without a projection, a slice of features is a span of tokens.
    plan.span = static_cast<int>(has_proj ? std::min(all, room / kDepth<T> * kDepth<T>)
                                          : std::min<int64_t>(all, kSlice));
    bytes = state + (plan.span + kVector<T>) * token_bytes + rest;

    // A block takes as long as its products, and for a while that its tokens have no part in; more
    // if it has to load and normalise tokens for every slice.
    int64_t waves = (blocks + gpu.multiprocessors - 1) / gpu.multiprocessors;
    cost = waves * (kTokens<M> + 32) * (plan.span < all ? 4 : 3);
  }
};

template <bool kProjects, class T, int M>
void launch_relevance(const Relevance& arguments, const RelevanceTypes& types,
                      const Candidate<T, M>& chosen, Stream stream) {
  launch<&relevance_kernel<T, M, kProjects>>(kName, chosen.blocks, kThreads, chosen.bytes, stream,
                                             arguments, types, chosen.plan);
}

}  // namespace

template <>
void relevance_of<TIR_ELEMENT>(const Relevance& arguments, const RelevanceTypes& types,
                               Stream stream) {
  using T = TIR_ELEMENT;
  Device gpu = device(kName);
  Candidate<T, 1> small(arguments, gpu);
  // Without a projection there is nothing that more tokens could share.
  if (arguments.proj == nullptr) return launch_relevance<false>(arguments, types, small, stream);
  Candidate<T, 2> medium(arguments, gpu);
  Candidate<T, 3> large(arguments, gpu);
  if (large.cost < std::min(small.cost, medium.cost)) {
    launch_relevance<true>(arguments, types, large, stream);
  } else if (medium.cost < small.cost) {
    launch_relevance<true>(arguments, types, medium, stream);
  } else {
    launch_relevance<true>(arguments, types, small, stream);
  }
}

}  // namespace tir::cuda
