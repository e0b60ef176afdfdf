// Attention and its statistics by emulated tiles, as tir_kernels._C has them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding_arguments.h"

namespace tir::cpu::amx {
void attention_forward(const AttentionForward&, int threads);
void attention_backward(const AttentionBackward&, int threads);
void attention_statistics(const AttentionStatistics&, int threads);
void relevance(const Relevance&, int threads);
}  // namespace tir::cpu::amx

PYBIND11_MODULE(tir_emulated_amx, module) {
  using tir::bindings::from_python;
  module.def("attention_forward", from_python(tir::cpu::amx::attention_forward));
  module.def("attention_backward", from_python(tir::cpu::amx::attention_backward));
  module.def("attention_statistics", from_python(tir::cpu::amx::attention_statistics));
  module.def("relevance", from_python(tir::cpu::amx::relevance));
}
