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

// Addresses of table and counts; then P. None where weights are given.
using DerivedArgument = std::optional<std::tuple<Address, Address, int64_t>>;

KeyWeights derived_weights(const DerivedArgument& argument, const float* weights) {
  require(argument.has_value() != (weights != nullptr), "weights are either given or derived");
  if (!argument) return {};
  auto [table, counts, prefix] = *argument;
  return {pointer<const float>(table, "table is null"),
          pointer<const int32_t>(counts, "counts is null"), prefix};
}

Stream stream_at(Address stream) { return reinterpret_cast<Stream>(stream); }

void forward(const AttentionForward& arguments, DerivedArgument derived, Address stream) {
  attention_forward(arguments, derived_weights(derived, arguments.weights), stream_at(stream));
}

void backward(const AttentionBackward& arguments, DerivedArgument derived, Address delta,
              Address partial, Address stream) {
  require(arguments.grad_weights == nullptr || partial != 0, "partial is null");
  attention_backward(arguments, derived_weights(derived, arguments.weights),
                     pointer<float>(delta, "delta is null"), optional_pointer<float>(partial),
                     stream_at(stream));
}

void statistics(const AttentionStatistics& arguments, Address softmax, Address stream) {
  attention_statistics(arguments, pointer<float>(softmax, "softmax is null"), stream_at(stream));
}

template <auto kLaunch, class Arguments>
void on_stream(const Arguments& arguments, Address stream) {
  kLaunch(arguments, stream_at(stream));
}

}  // namespace

void bind(py::module_& module) {
  // Arguments: see from_python for each of these, then those of the functions above, last the
  // stream. A launch takes microseconds and never waits, so the lock of the interpreter is kept.
  module.def("attention_forward", from_python(forward));
  module.def("attention_backward", from_python(backward));
  module.def("attention_statistics", from_python(statistics));
  module.def("relevance", from_python(on_stream<&relevance, Relevance>));
  module.def("select_tokens", from_python(on_stream<&select_tokens, Selection>));
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
