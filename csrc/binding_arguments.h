// What Python hands to the kernels: pointers arrive as integers, and sizes are checked here.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "tir/attention.h"
#include "tir/relevance.h"

namespace tir::bindings {

using Address = uintptr_t;
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

inline RowGrid grid(const RowGridArgument& argument, const char* name) {
  auto [data, batch_stride, head_stride, row_stride] = argument;
  return {pointer<const void>(data, name), batch_stride, head_stride, row_stride};
}

inline AttentionShape attention_shape(const std::array<int64_t, 4>& shape,
                                      const std::string& type, float scale) {
  for (int64_t size : shape) require(size >= 1, "attention needs B, H, L, d >= 1");
  return {shape[0], shape[1], shape[2], shape[3], type_named(type), scale};
}

// Null weights are 1 on a CPU; on a GPU they are for launchers that find weights otherwise.
inline AttentionForward forward_arguments(const std::array<int64_t, 4>& shape,
                                          const std::string& type, float scale,
                                          const RowGridArgument& query,
                                          const RowGridArgument& key,
                                          const RowGridArgument& value, Address weights,
                                          Address output, Address log_sum_exp) {
  return {attention_shape(shape, type, scale),
          grid(query, "query is null"),
          grid(key, "key is null"),
          grid(value, "value is null"),
          optional_pointer<const float>(weights),
          pointer<void>(output, "output is null"),
          pointer<float>(log_sum_exp, "log_sum_exp is null")};
}

inline AttentionBackward backward_arguments(
    const std::array<int64_t, 4>& shape, const std::string& type, float scale,
    const RowGridArgument& grad_output, const RowGridArgument& query, const RowGridArgument& key,
    const RowGridArgument& value, Address weights, const RowGridArgument& output,
    Address log_sum_exp, Address grad_query, Address grad_key, Address grad_value,
    Address grad_weights) {
  return {attention_shape(shape, type, scale),
          grid(grad_output, "grad_output is null"),
          grid(query, "query is null"),
          grid(key, "key is null"),
          grid(value, "value is null"),
          optional_pointer<const float>(weights),
          grid(output, "output is null"),
          pointer<const float>(log_sum_exp, "log_sum_exp is null"),
          pointer<void>(grad_query, "grad_query is null"),
          pointer<void>(grad_key, "grad_key is null"),
          pointer<void>(grad_value, "grad_value is null"),
          optional_pointer<float>(grad_weights)};
}

// sizes: B, L, P, D, E, G, C.
inline Relevance relevance_arguments(const std::array<int64_t, 7>& sizes,
                                     const std::string& token_type, const RowGridArgument& tokens,
                                     Address class_embeddings, bool has_norm, Address norm_weight,
                                     Address norm_bias, float norm_eps,
                                     const std::string& proj_type, Address proj,
                                     int64_t proj_row_stride, int64_t proj_column_stride,
                                     Address output) {
  auto [batch, length, prefix, width, joint_width, groups, classes] = sizes;
  require(batch >= 1 && width >= 1 && joint_width >= 1 && classes >= 1,
          "relevance needs B, D, E, C >= 1");
  require(prefix >= 0 && prefix < length, "relevance needs 0 <= P < L");
  require(groups >= 1 && batch % groups == 0, "G must divide B");
  require(proj != 0 || joint_width == width, "without a projection E must equal D");
  require(proj == 0 || proj_row_stride == 1 || proj_column_stride == 1,
          "the rows or the columns of proj must be contiguous");
  return {batch, length, prefix, width, joint_width, groups, classes, type_named(token_type),
          grid(tokens, "tokens is null"),
          pointer<const float>(class_embeddings, "class_embeddings is null"), has_norm,
          optional_pointer<const float>(norm_weight), optional_pointer<const float>(norm_bias),
          norm_eps, type_named(proj_type), optional_pointer<const void>(proj), proj_row_stride,
          proj_column_stride, pointer<float>(output, "output is null")};
}

// sizes: B, C, N, P. Null weights are for launchers that can leave them out.
inline Selection selection_arguments(const std::array<int64_t, 4>& sizes, int64_t top_k,
                                     Address relevance, Address table, Address counts,
                                     Address weights) {
  auto [batch, classes, patches, prefix] = sizes;
  require(batch >= 1 && classes >= 1 && patches >= 1 && prefix >= 0,
          "selection needs B, C, N >= 1");
  require(top_k >= 0 && top_k <= patches, "selection needs 0 <= K <= N");
  return {batch, classes, patches, prefix, top_k,
          pointer<const float>(relevance, "relevance is null"),
          pointer<const float>(table, "table is null"),
          pointer<int32_t>(counts, "counts is null"), optional_pointer<float>(weights)};
}

}  // namespace tir::bindings
