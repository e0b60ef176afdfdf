// The kernels of an emulated instruction set, as tir_kernels._C has them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding_arguments.h"
#include "cpu/cpu.h"

namespace tir::cpu::TIR_ARCH {
void attention_forward(const AttentionForward&, int threads);
void attention_backward(const AttentionBackward&, int threads);
void attention_statistics(const AttentionStatistics&, int threads);
void relevance(const Relevance&, int threads);
void philox_dropout(const PhiloxDropout&, int threads);
void activation(const Activation&, int threads);
}  // namespace tir::cpu::TIR_ARCH

namespace {

void token_weights(const tir::Relevance& problem, const tir::Selection& selection, int threads) {
  tir::cpu::token_weights(tir::cpu::TIR_ARCH::relevance, problem, selection, threads);
}

}  // namespace

PYBIND11_MODULE(TIR_MODULE, module) {
  using tir::bindings::from_python;
  using namespace tir::cpu::TIR_ARCH;
  module.def("attention_forward", from_python(attention_forward));
  module.def("attention_backward", from_python(attention_backward));
  module.def("attention_statistics", from_python(attention_statistics));
  module.def("relevance", from_python(relevance));
  module.def("token_weights", from_python(token_weights));
  module.def("philox_dropout", from_python(philox_dropout));
  module.def("activation", from_python(activation));
}
