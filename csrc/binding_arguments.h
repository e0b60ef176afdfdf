// Functions for Python over launchers, whatever the device: pointers arrive as integers, sizes are
// checked here. What a device wants beside the launcher's own arguments (threads, a stream) follows
// them.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "tir/adapters.h"
#include "tir/attention.h"
#include "tir/relevance.h"

namespace tir::bindings {

using Address = uintptr_t;
template <size_t N>
using Sizes = std::array<int64_t, N>;
using RowGridArgument = std::tuple<Address, int64_t, int64_t, int64_t>;  // data, batch, head, row

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("tir_kernels._C: ") + what);
}

template <class T>
T* pointer(Address address, const char* name) {
  require(address != 0, name);
  return reinterpret_cast<T*>(address);
}

template <class T>
T* optional_pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Type type_named(const std::string& name) {
  if (name == "float32") return Type::float32;
  if (name == "float16") return Type::float16;
  if (name == "bfloat16") return Type::bfloat16;
  throw std::invalid_argument("tir_kernels._C: unknown type " + name);
}

inline Array array(Address data, const std::string& type) {
  return {optional_pointer<const void>(data), type_named(type)};
}

template <class Void = const void>
GridOf<Void> grid(const RowGridArgument& argument, const char* name) {
  auto [data, batch_stride, head_stride, row_stride] = argument;
  return {pointer<Void>(data, name), batch_stride, head_stride, row_stride};
}

// shape: B, H, Lq, L, d.
inline AttentionShape attention_shape(const Sizes<5>& shape, const std::string& type, float scale,
                                      bool is_causal) {
  for (int64_t size : shape) require(size >= 1, "attention needs B, H, Lq, L, d >= 1");
  return {shape[0], shape[1],         shape[2], shape[3],
          shape[4], type_named(type), scale,    is_causal};
}

// Null weights are 1 on a CPU; on a GPU they are for launchers that find weights otherwise.
template <class... Rest>
auto from_python(void (*launch)(const AttentionForward&, Rest...)) {
  return [launch](const Sizes<5>& shape, const std::string& type, float scale, bool is_causal,
                  const RowGridArgument& query, const RowGridArgument& key,
                  const RowGridArgument& value, Address weights, const RowGridArgument& output,
                  Address log_sum_exp, Rest... rest) {
    launch({attention_shape(shape, type, scale, is_causal), grid(query, "query is null"),
            grid(key, "key is null"), grid(value, "value is null"),
            optional_pointer<const float>(weights), grid<void>(output, "output is null"),
            pointer<float>(log_sum_exp, "log_sum_exp is null")},
           rest...);
  };
}

// Null weights are 1.
template <class... Rest>
auto from_python(void (*launch)(const AttentionStatistics&, Rest...)) {
  return [launch](const Sizes<5>& shape, const std::string& type, float scale, bool is_causal,
                  const RowGridArgument& query, const RowGridArgument& key, Address weights,
                  int64_t num_prefix_tokens, Address received_from_prefix,
                  Address received_from_patches, Address entropy, Address log_sum_exp,
                  Rest... rest) {
    require(num_prefix_tokens >= 0 && num_prefix_tokens <= shape[2],
            "attention statistics need 0 <= P <= Lq");
    launch({attention_shape(shape, type, scale, is_causal), grid(query, "query is null"),
            grid(key, "key is null"), optional_pointer<const float>(weights), num_prefix_tokens,
            pointer<float>(received_from_prefix, "received_from_prefix is null"),
            pointer<float>(received_from_patches, "received_from_patches is null"),
            pointer<float>(entropy, "entropy is null"),
            pointer<float>(log_sum_exp, "log_sum_exp is null")},
           rest...);
  };
}

// A null address of grad_weights leaves them out.
template <class... Rest>
auto from_python(void (*launch)(const AttentionBackward&, Rest...)) {
  return [launch](const Sizes<5>& shape, const std::string& type, float scale, bool is_causal,
                  const RowGridArgument& grad_output, const RowGridArgument& query,
                  const RowGridArgument& key, const RowGridArgument& value, Address weights,
                  const RowGridArgument& output, Address log_sum_exp,
                  const RowGridArgument& grad_query, const RowGridArgument& grad_key,
                  const RowGridArgument& grad_value, Address grad_weights, Rest... rest) {
    launch({attention_shape(shape, type, scale, is_causal),
            grid(grad_output, "grad_output is null"), grid(query, "query is null"),
            grid(key, "key is null"), grid(value, "value is null"),
            optional_pointer<const float>(weights), grid(output, "output is null"),
            pointer<const float>(log_sum_exp, "log_sum_exp is null"),
            grid<void>(grad_query, "grad_query is null"),
            grid<void>(grad_key, "grad_key is null"),
            grid<void>(grad_value, "grad_value is null"),
            optional_pointer<float>(grad_weights)},
           rest...);
  };
}

// Sizes B, L, P, D, E, G, C; type and grid of the tokens; type and address of the class embeddings;
// whether there is a norm, its type, addresses of its weight and bias, its epsilon; type, address
// and strides of rows and columns of the projection.
using RelevanceProblem =
    std::tuple<Sizes<7>, std::string, RowGridArgument, std::string, Address, bool, std::string,
               Address, Address, float, std::string, Address, int64_t, int64_t>;

inline Relevance relevance_of(const RelevanceProblem& problem, float* output) {
  const auto& [sizes, token_type, tokens, class_type, class_embeddings, has_norm, norm_type,
               norm_weight, norm_bias, norm_eps, proj_type, proj, proj_row_stride,
               proj_column_stride] = problem;
  auto [batch, length, prefix, model_dim, joint_dim, groups, classes] = sizes;
  require(batch >= 1 && model_dim >= 1 && joint_dim >= 1 && classes >= 1,
          "relevance needs B, D, E, C >= 1");
  require(prefix >= 0 && prefix < length, "relevance needs 0 <= P < L");
  require(groups >= 1 && batch % groups == 0, "G must divide B");
  require(class_embeddings != 0, "class_embeddings is null");
  require(proj != 0 || joint_dim == model_dim, "without a projection E must equal D");
  require(proj == 0 || proj_row_stride == 1 || proj_column_stride == 1,
          "the rows or the columns of proj must be contiguous");
  return {batch, length, prefix, model_dim, joint_dim, groups, classes,
          type_named(token_type), grid(tokens, "tokens is null"),
          array(class_embeddings, class_type), has_norm, array(norm_weight, norm_type),
          array(norm_bias, norm_type), norm_eps, array(proj, proj_type), proj_row_stride,
          proj_column_stride, output};
}

template <class... Rest>
auto from_python(void (*launch)(const Relevance&, Rest...)) {
  return [launch](const RelevanceProblem& problem, Address output, Rest... rest) {
    launch(relevance_of(problem, pointer<float>(output, "output is null")), rest...);
  };
}

inline void require_selection(int64_t batch, int64_t classes, int64_t patches, int64_t prefix,
                              int64_t top_k) {
  require(batch >= 1 && classes >= 1 && patches >= 1 && prefix >= 0,
          "selection needs B, C, N >= 1");
  require(top_k >= 0 && top_k <= patches, "selection needs 0 <= K <= N");
}

// sizes: B, C, N, P. Null weights are for launchers that can leave them out.
template <class... Rest>
auto from_python(void (*launch)(const Selection&, Rest...)) {
  return [launch](const Sizes<4>& sizes, int64_t top_k, Address relevance, Address table,
                  Address counts, Address weights, Rest... rest) {
    auto [batch, classes, patches, prefix] = sizes;
    require_selection(batch, classes, patches, prefix, top_k);
    launch({batch, classes, patches, prefix, top_k,
            pointer<const float>(relevance, "relevance is null"),
            pointer<const float>(table, "table is null"),
            pointer<int32_t>(counts, "counts is null"), optional_pointer<float>(weights)},
           rest...);
  };
}

// Both at once: the relevance in between has no address.
template <class... Rest>
auto from_python(void (*launch)(const Relevance&, const Selection&, Rest...)) {
  return [launch](const RelevanceProblem& problem, int64_t top_k, Address table, Address counts,
                  Address weights, Rest... rest) {
    Relevance relevance = relevance_of(problem, nullptr);
    int64_t patches = relevance.length - relevance.num_prefix_tokens;
    require_selection(relevance.batch, relevance.num_classes, patches,
                      relevance.num_prefix_tokens, top_k);
    launch(relevance,
           {relevance.batch, relevance.num_classes, patches, relevance.num_prefix_tokens, top_k,
            nullptr, pointer<const float>(table, "table is null"),
            pointer<int32_t>(counts, "counts is null"), optional_pointer<float>(weights)},
           rest...);
  };
}

// sizes: B, N, P.
template <class... Rest>
auto from_python(void (*launch)(const WeightLookUp&, Rest...)) {
  return [launch](const Sizes<3>& sizes, Address table, Address counts, Address weights,
                  Rest... rest) {
    for (int64_t size : sizes) require(size >= 0, "B, N, P must not be negative");
    launch({sizes[0], sizes[1], sizes[2], pointer<const float>(table, "table is null"),
            pointer<const int32_t>(counts, "counts is null"),
            pointer<float>(weights, "weights is null")},
           rest...);
  };
}

// sizes: G, K, S, T, D.
template <class... Rest>
auto from_python(void (*launch)(const PhiloxDropout&, Rest...)) {
  return [launch](const Sizes<5>& sizes, const std::string& input_type,
                  const std::string& output_type, Address rows, Address seeds, int64_t step,
                  uint32_t stream, uint32_t first_branch, uint32_t threshold, float scale,
                  Address output, Rest... rest) {
    for (int64_t size : sizes) require(size >= 1, "dropout needs G, K, S, T, D >= 1");
    auto [groups, branches, sequences, length, channels] = sizes;
    require(channels <= channels_per_draw << 16,
            "too many channels for the random numbers' counter");
    require(stream < 256 && first_branch + branches <= 256, "streams and branches go up to 255");
    require(rows != 0, "rows is null");
    launch({groups, branches, sequences, length, channels, array(rows, input_type),
            pointer<const int64_t>(seeds, "seeds is null"), step, stream, first_branch, threshold,
            scale, type_named(output_type), pointer<void>(output, "output is null")},
           rest...);
  };
}

inline ActivationKind activation_named(const std::string& name) {
  if (name == "gelu") return ActivationKind::gelu;
  if (name == "quick_gelu") return ActivationKind::quick_gelu;
  if (name == "gelu_tanh") return ActivationKind::gelu_tanh;
  throw std::invalid_argument("tir_kernels._C: unknown activation " + name);
}

// A null address of grad_output is for the forward pass.
template <class... Rest>
auto from_python(void (*launch)(const Activation&, Rest...)) {
  return [launch](const std::string& kind, int64_t rows, int64_t channels,
                  const std::string& type, Address hidden, const std::string& bias_type,
                  Address bias, Address grad_output, Address output, Rest... rest) {
    require(rows >= 1 && channels >= 1, "activation needs rows and channels >= 1");
    launch({activation_named(kind), rows, channels,
            type_named(type), pointer<const void>(hidden, "hidden is null"),
            array(bias, bias_type), optional_pointer<const void>(grad_output),
            pointer<void>(output, "output is null")},
           rest...);
  };
}

}  // namespace tir::bindings
