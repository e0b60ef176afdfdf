// Relevance of patch tokens to classes: LayerNorm, projection and cosine in one kernel.
//
// A block takes 32, 64 or 96 patch tokens of one class group, or half as many of float32. They are
// normalised into shared memory, and stay there if they fit. The projection passes by in slices of
// 256 features, a few of its rows at a step. What a slice adds to squared norms and to products
// with classes is taken from the accumulators, so that features never leave the registers.
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
    relevance_kernel(Relevance arguments, RelevancePlan plan) {
  RelevanceBlock<T, M> block{arguments, plan};
  int part = static_cast<int>(blockIdx.x % plan.class_parts);
  int64_t tile = blockIdx.x / plan.class_parts, group = tile / plan.tiles;
  block.tokens.find_rows(group, tile % plan.tiles);
  block.tokens.load(0);
  if constexpr (kProjects) block.begin_slice(0);
  if (arguments.has_norm) block.find_statistics();
  float squares[M][kHalves] = {};
  for (int first_feature = 0; first_feature < block.joint_dim; first_feature += kSlice) {
    float features[M][kColumns<T>][4] = {};
    if constexpr (kProjects) {
      if (first_feature > 0) {
        __syncthreads();  // the projection returns to where the classes were
        block.begin_slice(first_feature);
      }
      block.project(features, first_feature);
    } else {
      block.take_tokens(features, first_feature);
    }
    block.add_squares(squares, features);
    __syncthreads();  // everyone is done with the last step
    if (first_feature + kSlice >= block.joint_dim) block.share_squares(squares);
    block.multiply_classes(features, group, part, first_feature);
  }
}

template <bool kProjects, class T, int M>
void launch_relevance(const Relevance& arguments, const Candidate<T, M>& chosen, Stream stream) {
  launch<&relevance_kernel<T, M, kProjects>>(kName, chosen.blocks, kThreads, chosen.bytes, stream,
                                             arguments, chosen.plan);
}

}  // namespace

template <>
void relevance_of<TIR_ELEMENT>(const Relevance& arguments, Stream stream) {
  using T = TIR_ELEMENT;
  Device gpu = device(kName);
  Candidate<T, 1> small(arguments, gpu);
  // Without a projection there is nothing that more tokens could share.
  if (arguments.proj.data == nullptr) return launch_relevance<false>(arguments, small, stream);
  Candidate<T, 2> medium(arguments, gpu);
  Candidate<T, 3> large(arguments, gpu);
  if (large.cost < std::min(small.cost, medium.cost)) {
    launch_relevance<true>(arguments, large, stream);
  } else if (medium.cost < small.cost) {
    launch_relevance<true>(arguments, medium, stream);
  } else {
    launch_relevance<true>(arguments, small, stream);
  }
}

}  // namespace tir::cuda
