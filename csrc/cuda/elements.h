// Element types as they lie in memory, and the launchers for one type. Each source that defines
// such launchers is compiled once for each type, which the build names in TIR_ELEMENT.
#pragma once

#include <cstdint>

#include "tir/cuda.h"

namespace tir::cuda {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class T>
void attention_forward_of(const AttentionForward& arguments, const KeyWeights& derived,
                          Stream stream);
template <>
void attention_forward_of<float>(const AttentionForward&, const KeyWeights&, Stream);
template <>
void attention_forward_of<float16>(const AttentionForward&, const KeyWeights&, Stream);
template <>
void attention_forward_of<bfloat16>(const AttentionForward&, const KeyWeights&, Stream);

template <class T>
void attention_backward_of(const AttentionBackward& arguments, const KeyWeights& derived,
                           float* delta, float* partial, Stream stream);
template <>
void attention_backward_of<float>(const AttentionBackward&, const KeyWeights&, float*, float*,
                                  Stream);
template <>
void attention_backward_of<float16>(const AttentionBackward&, const KeyWeights&, float*, float*,
                                    Stream);
template <>
void attention_backward_of<bfloat16>(const AttentionBackward&, const KeyWeights&, float*, float*,
                                     Stream);

template <class T>
void attention_statistics_of(const AttentionStatistics& arguments, float* softmax, Stream stream);
template <>
void attention_statistics_of<float>(const AttentionStatistics&, float*, Stream);
template <>
void attention_statistics_of<float16>(const AttentionStatistics&, float*, Stream);
template <>
void attention_statistics_of<bfloat16>(const AttentionStatistics&, float*, Stream);

template <class T>
void relevance_of(const Relevance& arguments, Stream stream);
template <>
void relevance_of<float>(const Relevance&, Stream);
template <>
void relevance_of<float16>(const Relevance&, Stream);
template <>
void relevance_of<bfloat16>(const Relevance&, Stream);

}  // namespace tir::cuda
