// The CUDA kernels, run on the CPU, as a Python module for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding_arguments.h"
#include "cuda/backward_plan.h"
#include "cuda/bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace tir;

namespace {

// How attention_backward would run on the emulated device: how often queries pass a block that
// serves a whole head, 0 if heads are served in parts.
int backward_sweeps(const std::array<int64_t, 5>& sizes, const std::string& type, bool is_causal) {
  AttentionShape shape = bindings::attention_shape(sizes, type, 1.0f, is_causal);
  int found = 0;
  cuda::with_head_dim("weighted_attention", shape.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    auto sweeps = [&](auto element) {
      return cuda::plan_backward<decltype(element), kHeadDim>("weighted_attention", shape,
                                                              cuda::emulated_device).sweeps;
    };
    found = shape.type == Type::float32 ? sweeps(float{}) : sweeps(cuda::bfloat16{});
  });
  return found;
}

}  // namespace

PYBIND11_MODULE(tir_cuda_emulated, module) {
  cuda::bind(module);
  module.def("set_thread_order", emulation::set_thread_order, py::arg("order"),
             "0: ascending, 1: descending, else random with this seed");
  module.def("set_device", [](int multiprocessors, int shared_memory) {
    cuda::emulated_device = {multiprocessors, shared_memory};
  });
  module.def("backward_sweeps", backward_sweeps, py::arg("shape"), py::arg("type"),
             py::arg("is_causal"));
}
