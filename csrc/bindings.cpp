// The module tir_kernels._C: checks sizes, hands pointers over. Pointers arrive as integers, so
// that neither this module nor its build knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "binding_arguments.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cuda/bindings.h"

namespace py = pybind11;
using namespace tir;
using namespace tir::bindings;

namespace {

// What the CPU kernels cannot do without.
void check(const AttentionForward&) {}
void check(const AttentionStatistics&) {}
void check(const AttentionBackward& arguments) {
  require(arguments.weights != nullptr || arguments.grad_weights == nullptr,
          "weights is null, and their gradient is wanted");
}
void check(const Selection& arguments) {
  require(arguments.weights != nullptr, "weights is null");
}
void check(const Relevance&) {}
void check(const PhiloxDropout&) {}
void check(const Activation&) {}

// Runs a kernel of the instruction set in use.
template <auto kKernel, class Arguments>
void run(const Arguments& arguments, int threads) {
  check(arguments);
  (cpu::architecture().kernels.*kKernel)(arguments, threads);
}

void select_tokens(const Selection& arguments, int threads) {
  check(arguments);
  cpu::select_tokens(arguments, threads);
}

void token_weights(const Relevance& relevance, const Selection& selection, int threads) {
  check(selection);
  cpu::token_weights(cpu::architecture().kernels.relevance, relevance, selection, threads);
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
  using cpu::Kernels;
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

  // Arguments: see from_python for each of these, then the number of threads.
  module.def("attention_forward",
             from_python(run<&Kernels::attention_forward, AttentionForward>), without_gil());
  module.def("attention_backward",
             from_python(run<&Kernels::attention_backward, AttentionBackward>), without_gil());
  module.def("attention_statistics",
             from_python(run<&Kernels::attention_statistics, AttentionStatistics>), without_gil());
  module.def("relevance", from_python(run<&Kernels::relevance, Relevance>), without_gil());
  module.def("select_tokens", from_python(select_tokens), without_gil());
  module.def("token_weights", from_python(token_weights), without_gil());
  module.def("look_up_weights", from_python(cpu::look_up_weights));
  module.def("philox_dropout", from_python(run<&Kernels::philox_dropout, PhiloxDropout>),
             without_gil());
  module.def("activation", from_python(run<&Kernels::activation, Activation>), without_gil());
#if defined(TIR_BUILT_CUDA)
  py::module_ cuda = module.def_submodule("cuda", "The CUDA kernels, for architectures().");
  cuda::bind(cuda);
  cuda.def("architectures", [] { return std::string(TIR_BUILT_CUDA); });
#endif
}
