// The module tir_kernels._C: checks sizes, hands pointers over. Pointers arrive as integers, so
// that neither this module nor its build knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "binding_arguments.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cuda/bindings.h"

namespace py = pybind11;
using namespace tir;
using namespace tir::bindings;

namespace {

void attention_forward(const std::array<int64_t, 4>& shape, const std::string& type, float scale,
                       const RowGridArgument& query, const RowGridArgument& key,
                       const RowGridArgument& value, Address weights, Address output,
                       Address log_sum_exp, int threads) {
  cpu::architecture().kernels.attention_forward(
      forward_arguments(shape, type, scale, query, key, value, weights, output, log_sum_exp),
      threads);
}

void attention_backward(const std::array<int64_t, 4>& shape, const std::string& type, float scale,
                        const RowGridArgument& grad_output, const RowGridArgument& query,
                        const RowGridArgument& key, const RowGridArgument& value, Address weights,
                        const RowGridArgument& output, Address log_sum_exp, Address grad_query,
                        Address grad_key, Address grad_value, Address grad_weights, int threads) {
  require(weights != 0 || grad_weights == 0, "weights is null, and their gradient is wanted");
  cpu::architecture().kernels.attention_backward(
      backward_arguments(shape, type, scale, grad_output, query, key, value, weights, output,
                         log_sum_exp, grad_query, grad_key, grad_value, grad_weights),
      threads);
}

void relevance(const std::array<int64_t, 7>& sizes, const std::string& token_type,
               const RowGridArgument& tokens, Address class_embeddings, bool has_norm,
               Address norm_weight, Address norm_bias, float norm_eps,
               const std::string& proj_type, Address proj, int64_t proj_row_stride,
               int64_t proj_column_stride, Address output, int threads) {
  cpu::architecture().kernels.relevance(
      relevance_arguments(sizes, token_type, tokens, class_embeddings, has_norm, norm_weight,
                          norm_bias, norm_eps, proj_type, proj, proj_row_stride,
                          proj_column_stride, output),
      threads);
}

void select_tokens(const std::array<int64_t, 4>& sizes, int64_t top_k, Address relevance,
                   Address table, Address counts, Address weights, int threads) {
  require(weights != 0, "weights is null");
  cpu::select_tokens(selection_arguments(sizes, top_k, relevance, table, counts, weights),
                     threads);
}

void philox_dropout(const std::array<int64_t, 5>& sizes, const std::string& input_type,
                     const std::string& output_type, Address rows, Address seeds, int64_t step,
                     uint32_t stream, uint32_t first_branch, uint32_t threshold, float scale,
                     Address output, int threads) {
  for (int64_t size : sizes) require(size >= 1, "dropout needs G, K, S, T, D >= 1");
  auto [groups, branches, sequences, length, width] = sizes;
  require(width <= channels_per_draw << 16, "too many channels for the random numbers' counter");
  require(stream < 256 && first_branch + branches <= 256, "streams and branches go up to 255");
  cpu::architecture().kernels.philox_dropout(
      {groups, branches, sequences, length, width, type_named(input_type),
       type_named(output_type), pointer<const void>(rows, "rows is null"),
       pointer<const int64_t>(seeds, "seeds is null"), step, stream, first_branch, threshold,
       scale, pointer<void>(output, "output is null")},
      threads);
}

void activation(const std::string& kind, int64_t rows, int64_t width, const std::string& type,
                Address hidden, const std::string& bias_type, Address bias, Address grad_output,
                Address output, int threads) {
  require(rows >= 1 && width >= 1, "activation needs rows and width >= 1");
  require(kind == "gelu" || kind == "quick_gelu", "activation is gelu or quick_gelu");
  cpu::architecture().kernels.activation(
      {kind == "gelu" ? ActivationKind::gelu : ActivationKind::quick_gelu, rows, width,
       type_named(type), pointer<const void>(hidden, "hidden is null"), type_named(bias_type),
       optional_pointer<const void>(bias), optional_pointer<const void>(grad_output),
       pointer<void>(output, "output is null")},
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
  module.def("philox_dropout", philox_dropout, without_gil(), py::arg("sizes"),
             py::arg("input_type"), py::arg("output_type"), py::arg("rows"), py::arg("seeds"),
             py::arg("step"), py::arg("stream"), py::arg("first_branch"), py::arg("threshold"),
             py::arg("scale"), py::arg("output"), py::arg("threads"));
  module.def("activation", activation, without_gil(), py::arg("kind"), py::arg("rows"),
             py::arg("width"), py::arg("type"), py::arg("hidden"), py::arg("bias_type"),
             py::arg("bias"), py::arg("grad_output"), py::arg("output"), py::arg("threads"));
#if defined(TIR_BUILT_CUDA)
  py::module_ cuda = module.def_submodule("cuda", "The CUDA kernels, for architectures().");
  cuda::bind(cuda);
  cuda.def("architectures", [] { return std::string(TIR_BUILT_CUDA); });
#endif
}
