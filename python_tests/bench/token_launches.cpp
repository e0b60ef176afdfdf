// Prints how the kernels of relevance, selection and statistics would be launched on a GPU that is not
// there: blocks, threads and bytes of shared memory, for lines "B L H E C" of the input. Heads are of
// width 64, tokens as wide as all of them, all in one type.
#include <iostream>

#include "cuda/heads.cuh"
#include "cuda/relevance_block.cuh"

namespace tir::cuda {

template <auto kKernel, class... Arguments>
void print_launch(const char*, int64_t blocks, int threads, size_t shared_bytes, Stream,
                  const Arguments&...) {
  std::cout << blocks << ' ' << threads << ' ' << shared_bytes << '\n';
}

}  // namespace tir::cuda

#define launch print_launch
#include "cuda/relevance.cu"
#include "cuda/selection.cu"
// Both sources use this name, each for its own operator.
#define kName kStatisticsName
#include "cuda/attention_statistics.cu"
#undef kName

using namespace tir::cuda;
using Element = TIR_ELEMENT;

int main() {
  constexpr tir::Type kType = sizeof(Element) == 4 ? tir::Type::float32 : tir::Type::bfloat16;
  emulated_device = {132, 227 * 1024};
  alignas(16) static float some[4];
  int64_t batch, length, heads, joint, classes;
  while (std::cin >> batch >> length >> heads >> joint >> classes) {
    int64_t width = 64 * heads;
    tir::Array array{some, kType};
    tir::Relevance relevance{batch, length, 1, width, joint, 1, classes, kType};
    relevance.tokens = {some, length * width, 0, width};
    relevance.norm_weight = relevance.norm_bias = relevance.proj = array;
    relevance.proj_row_stride = joint, relevance.proj_column_stride = 1;
    relevance_of<Element>(relevance, nullptr);
    select_tokens({batch, classes, length - 1, 1, 0}, nullptr);
    tir::AttentionStatistics statistics{};
    statistics.shape = {batch, heads, length, length, 64, kType, 0.125f, false};
    attention_statistics_of<Element>(statistics, some, nullptr);
  }
}
