// The launchers' public face: picks the kernels compiled for the element type.
#include "cuda/elements.h"

namespace tir::cuda {

namespace {

template <class Launch>
void with_element(Type type, Launch launch) {
  switch (type) {
    case Type::float32: return launch(float{});
    case Type::float16: return launch(float16{});
    case Type::bfloat16: return launch(bfloat16{});
  }
}

}  // namespace

void attention_forward(const AttentionForward& arguments, const KeyWeights& derived,
                       Stream stream) {
  with_element(arguments.shape.type, [&](auto element) {
    attention_forward_of<decltype(element)>(arguments, derived, stream);
  });
}

void attention_backward(const AttentionBackward& arguments, const KeyWeights& derived,
                        float* delta, float* partial, Stream stream) {
  with_element(arguments.shape.type, [&](auto element) {
    attention_backward_of<decltype(element)>(arguments, derived, delta, partial, stream);
  });
}

void attention_statistics(const AttentionStatistics& arguments, float* softmax, Stream stream) {
  with_element(arguments.shape.type, [&](auto element) {
    attention_statistics_of<decltype(element)>(arguments, softmax, stream);
  });
}

void relevance(const Relevance& arguments, Stream stream) {
  with_element(arguments.token_type, [&](auto element) {
    relevance_of<decltype(element)>(arguments, stream);
  });
}

}  // namespace tir::cuda
