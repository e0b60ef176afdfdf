#include "cuda/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "binding_arguments.h"
#include "tir/cuda.h"

namespace py = pybind11;
using namespace tir::bindings;

namespace tir::cuda {
namespace {

// Addresses of table, relevance and counts; then P, C, K. None where weights are given.
using DerivedArgument = std::optional<std::tuple<Address, Address, Address, int64_t, int64_t, int64_t>>;

KeyWeights derived_weights(const DerivedArgument& argument, Address weights) {
  require(argument.has_value() != (weights != 0), "weights are either given or derived");
  if (!argument) return {};
  auto [table, relevance, counts, prefix, classes, top_k] = *argument;
  return {pointer<const float>(table, "table is null"), optional_pointer<const float>(relevance),
          pointer<int32_t>(counts, "counts is null"), prefix, classes, top_k};
}

void forward(const std::array<int64_t, 4>& shape, const std::string& type, float scale,
             const RowGridArgument& query, const RowGridArgument& key,
             const RowGridArgument& value, Address weights, const DerivedArgument& derived,
             Address output, Address log_sum_exp, Address stream) {
  attention_forward(
      forward_arguments(shape, type, scale, query, key, value, weights, output, log_sum_exp),
      derived_weights(derived, weights), reinterpret_cast<Stream>(stream));
}

void backward(const std::array<int64_t, 4>& shape, const std::string& type, float scale,
              const RowGridArgument& grad_output, const RowGridArgument& query,
              const RowGridArgument& key, const RowGridArgument& value, Address weights,
              const DerivedArgument& derived, const RowGridArgument& output, Address log_sum_exp,
              Address grad_query, Address grad_key, Address grad_value, Address grad_weights,
              Address delta, Address partial, Address stream) {
  require(grad_weights == 0 || partial != 0, "partial is null");
  attention_backward(
      backward_arguments(shape, type, scale, grad_output, query, key, value, weights, output,
                         log_sum_exp, grad_query, grad_key, grad_value, grad_weights),
      derived_weights(derived, weights), pointer<float>(delta, "delta is null"),
      optional_pointer<float>(partial), reinterpret_cast<Stream>(stream));
}

void relevance_of_tokens(const std::array<int64_t, 7>& sizes, const std::string& token_type,
                         const RowGridArgument& tokens, const std::string& class_type,
                         Address class_embeddings, bool has_norm, const std::string& norm_type,
                         Address norm_weight, Address norm_bias, float norm_eps,
                         const std::string& proj_type, Address proj, int64_t proj_row_stride,
                         int64_t proj_column_stride, Address output, Address stream) {
  relevance(relevance_arguments(sizes, token_type, tokens, class_embeddings, has_norm,
                                norm_weight, norm_bias, norm_eps, proj_type, proj,
                                proj_row_stride, proj_column_stride, output),
            {type_named(class_type), type_named(norm_type)}, reinterpret_cast<Stream>(stream));
}

void select(const std::array<int64_t, 4>& sizes, int64_t top_k, Address relevance, Address table,
            Address counts, Address weights, Address stream) {
  select_tokens(selection_arguments(sizes, top_k, relevance, table, counts, weights),
                reinterpret_cast<Stream>(stream));
}

}  // namespace

void bind(py::module_& module) {
  // A launch takes microseconds and never waits, so the lock of the interpreter is kept.
  module.def("attention_forward", forward, py::arg("shape"), py::arg("type"), py::arg("scale"),
             py::arg("query"), py::arg("key"), py::arg("value"), py::arg("weights"),
             py::arg("derived"), py::arg("output"), py::arg("log_sum_exp"), py::arg("stream"));
  module.def("attention_backward", backward, py::arg("shape"), py::arg("type"), py::arg("scale"),
             py::arg("grad_output"), py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("weights"), py::arg("derived"), py::arg("output"), py::arg("log_sum_exp"),
             py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"),
             py::arg("grad_weights"), py::arg("delta"), py::arg("partial"), py::arg("stream"));
  module.def("can_select", can_select, py::arg("num_patches"), py::arg("num_classes"),
             "whether attention_forward can find the counts itself");
  module.def("relevance", relevance_of_tokens, py::arg("sizes"), py::arg("token_type"),
             py::arg("tokens"), py::arg("class_type"), py::arg("class_embeddings"),
             py::arg("has_norm"), py::arg("norm_type"), py::arg("norm_weight"),
             py::arg("norm_bias"), py::arg("norm_eps"), py::arg("proj_type"), py::arg("proj"),
             py::arg("proj_row_stride"), py::arg("proj_column_stride"), py::arg("output"),
             py::arg("stream"));
  module.def("select_tokens", select, py::arg("sizes"), py::arg("top_k"), py::arg("relevance"),
             py::arg("table"), py::arg("counts"), py::arg("weights"), py::arg("stream"));
  module.def(
      "runtime",
      [] {
        Runtime found = runtime();
        return std::make_tuple(found.version, found.driver_version, found.error);
      },
      "version of the linked CUDA runtime, version that the driver serves, and why no devices are "
      "found or an empty string");
}

}  // namespace tir::cuda
