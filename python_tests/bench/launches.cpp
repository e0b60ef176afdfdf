// Prints how the attention kernels would be launched on a GPU that is not there: blocks, threads and
// bytes of shared memory, forward and then backward, for lines "L B H d" of the input. Of several
// kernels it is the last.
#include <iostream>
#include <sstream>

#include "cuda/heads.cuh"

namespace tir::cuda {

std::string last;

template <auto kKernel, class... Arguments>
void note_launch(const char*, int64_t blocks, int threads, size_t shared_bytes, Stream,
                  const Arguments&...) {
  std::ostringstream line;
  line << blocks << ' ' << threads << ' ' << shared_bytes << '\n';
  last = line.str();
}

}  // namespace tir::cuda

#define launch note_launch
#define TIR_ELEMENT bfloat16
// Both kernels use these names, each for its own numbers.
#define kHeldTiles kForwardHeldTiles
#define kChunk kForwardChunk
#include "cuda/attention_forward.cu"
#undef kHeldTiles
#undef kChunk
#include "cuda/attention_backward.cu"

int main() {
  tir::cuda::emulated_device = {132, 227 * 1024};
  int64_t length, batch, heads, width;
  while (std::cin >> length >> batch >> heads >> width) {
    tir::AttentionShape shape{batch, heads, length, length, width, tir::Type::bfloat16, 0.125f,
                              false};
    tir::AttentionForward forward{};
    tir::AttentionBackward backward{};
    forward.shape = backward.shape = shape;
    tir::cuda::attention_forward_of<tir::cuda::bfloat16>(forward, {}, nullptr);
    std::cout << tir::cuda::last;
    tir::cuda::attention_backward_of<tir::cuda::bfloat16>(backward, {}, nullptr, nullptr, nullptr);
    std::cout << tir::cuda::last;
  }
}
