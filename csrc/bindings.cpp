// The module tir_kernels._C: checks sizes, hands pointers over. Pointers arrive as integers, so
// that neither this module nor its build knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cpu/cpu.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using namespace tir;

namespace {

using Address = uintptr_t;
using RowGridArgument = std::tuple<Address, int64_t, int64_t, int64_t>;  // data, batch, head, row

void require(bool holds, const char* what) {
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

Type type_named(const std::string& name) {
  if (name == "float32") return Type::float32;
  if (name == "float16") return Type::float16;
  if (name == "bfloat16") return Type::bfloat16;
  throw std::invalid_argument("tir_kernels._C: unknown type " + name);
}

RowGrid grid(const RowGridArgument& argument, const char* name) {
  auto [data, batch_stride, head_stride, row_stride] = argument;
  return {pointer<const void>(data, name), batch_stride, head_stride, row_stride};
}

AttentionShape attention_shape(const std::array<int64_t, 4>& shape, const std::string& type,
                               float scale) {
  for (int64_t size : shape) require(size >= 1, "attention needs B, H, L, d >= 1");
  return {shape[0], shape[1], shape[2], shape[3], type_named(type), scale};
}

void attention_forward(const std::array<int64_t, 4>& shape, const std::string& type, float scale,
                       const RowGridArgument& query, const RowGridArgument& key,
                       const RowGridArgument& value, Address weights, Address output,
                       Address log_sum_exp, int threads) {
  cpu::architecture().kernels.attention_forward(
      {attention_shape(shape, type, scale), grid(query, "query is null"),
       grid(key, "key is null"), grid(value, "value is null"),
       pointer<const float>(weights, "weights is null"), pointer<void>(output, "output is null"),
       pointer<float>(log_sum_exp, "log_sum_exp is null")},
      threads);
}

void attention_backward(const std::array<int64_t, 4>& shape, const std::string& type, float scale,
                        const RowGridArgument& grad_output, const RowGridArgument& query,
                        const RowGridArgument& key, const RowGridArgument& value, Address weights,
                        const RowGridArgument& output, Address log_sum_exp, Address grad_query,
                        Address grad_key, Address grad_value, Address grad_weights, int threads) {
  cpu::architecture().kernels.attention_backward(
      {attention_shape(shape, type, scale), grid(grad_output, "grad_output is null"),
       grid(query, "query is null"), grid(key, "key is null"), grid(value, "value is null"),
       pointer<const float>(weights, "weights is null"), grid(output, "output is null"),
       pointer<const float>(log_sum_exp, "log_sum_exp is null"),
       pointer<void>(grad_query, "grad_query is null"),
       pointer<void>(grad_key, "grad_key is null"),
       pointer<void>(grad_value, "grad_value is null"), optional_pointer<float>(grad_weights)},
      threads);
}

// sizes: B, L, P, D, E, G, C.
void relevance(const std::array<int64_t, 7>& sizes, const std::string& token_type,
               const RowGridArgument& tokens, Address class_embeddings, bool has_norm,
               Address norm_weight, Address norm_bias, float norm_eps,
               const std::string& proj_type, Address proj, int64_t proj_row_stride,
               int64_t proj_column_stride, Address output, int threads) {
  auto [batch, length, prefix, width, joint_width, groups, classes] = sizes;
  require(batch >= 1 && width >= 1 && joint_width >= 1 && classes >= 1,
          "relevance needs B, D, E, C >= 1");
  require(prefix >= 0 && prefix < length, "relevance needs 0 <= P < L");
  require(groups >= 1 && batch % groups == 0, "G must divide B");
  require(proj != 0 || joint_width == width, "without a projection E must equal D");
  require(proj == 0 || proj_row_stride == 1 || proj_column_stride == 1,
          "the rows or the columns of proj must be contiguous");
  cpu::architecture().kernels.relevance(
      {batch, length, prefix, width, joint_width, groups, classes, type_named(token_type),
       grid(tokens, "tokens is null"),
       pointer<const float>(class_embeddings, "class_embeddings is null"), has_norm,
       optional_pointer<const float>(norm_weight), optional_pointer<const float>(norm_bias),
       norm_eps, type_named(proj_type), optional_pointer<const void>(proj), proj_row_stride,
       proj_column_stride, pointer<float>(output, "output is null")},
      threads);
}

// sizes: B, C, N, P.
void select_tokens(const std::array<int64_t, 4>& sizes, int64_t top_k, Address relevance,
                   Address table, Address counts, Address weights, int threads) {
  auto [batch, classes, patches, prefix] = sizes;
  require(batch >= 1 && classes >= 1 && patches >= 1 && prefix >= 0,
          "selection needs B, C, N >= 1");
  require(top_k >= 0 && top_k <= patches, "selection needs 0 <= K <= N");
  cpu::select_tokens({batch, classes, patches, prefix, top_k,
                      pointer<const float>(relevance, "relevance is null"),
                      pointer<const float>(table, "table is null"),
                      pointer<int32_t>(counts, "counts is null"),
                      pointer<float>(weights, "weights is null")},
                     threads);
}

std::vector<std::pair<std::string, bool>> architectures() {
  std::vector<std::pair<std::string, bool>> result;
  for (const cpu::Architecture& architecture : cpu::architectures()) {
    result.emplace_back(architecture.name, architecture.is_supported);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using without_gil = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Compiled kernels over raw pointers; use the functions of tir_kernels instead.";

  module.def("architectures", architectures,
             "(name, whether this machine runs it) of every instruction set built");
  module.def("architecture", [] { return std::string(cpu::architecture().name); },
             "the instruction set in use");
  module.def("use_architecture", cpu::use_architecture, py::arg("name"));
  module.def("use_openmp", cpu::use_openmp, py::arg("gomp_parallel"), py::arg("omp_in_parallel"),
             "run threads on the OpenMP runtime with these functions; 0 for plain threads");
  module.def("thread_source", cpu::thread_source);

  module.def("attention_forward", attention_forward, without_gil(), py::arg("shape"),
             py::arg("type"), py::arg("scale"), py::arg("query"), py::arg("key"),
             py::arg("value"), py::arg("weights"), py::arg("output"), py::arg("log_sum_exp"),
             py::arg("threads"));
  module.def("attention_backward", attention_backward, without_gil(), py::arg("shape"),
             py::arg("type"), py::arg("scale"), py::arg("grad_output"), py::arg("query"),
             py::arg("key"), py::arg("value"), py::arg("weights"), py::arg("output"),
             py::arg("log_sum_exp"), py::arg("grad_query"), py::arg("grad_key"),
             py::arg("grad_value"), py::arg("grad_weights"), py::arg("threads"));
  module.def("relevance", relevance, without_gil(), py::arg("sizes"), py::arg("token_type"),
             py::arg("tokens"), py::arg("class_embeddings"), py::arg("has_norm"),
             py::arg("norm_weight"), py::arg("norm_bias"), py::arg("norm_eps"),
             py::arg("proj_type"), py::arg("proj"), py::arg("proj_row_stride"),
             py::arg("proj_column_stride"), py::arg("output"), py::arg("threads"));
  module.def("select_tokens", select_tokens, without_gil(), py::arg("sizes"), py::arg("top_k"),
             py::arg("relevance"), py::arg("table"), py::arg("counts"), py::arg("weights"),
             py::arg("threads"));
}
