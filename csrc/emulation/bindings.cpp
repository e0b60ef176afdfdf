// The CUDA kernels, run on the CPU, as a Python module for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding_arguments.h"
#include "cuda/backward_plan.h"
#include "cuda/bindings.h"
#include "cuda/forward_plan.h"

namespace py = pybind11;
using namespace tir;

namespace {

template <class T>
py::dict plan_of(const AttentionShape& shape, const cuda::KeyWeights& derived) {
  py::dict found;
  cuda::with_head_dim("weighted_attention", shape.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    auto plan = cuda::forward::plan<T, kHeadDim>("weighted_attention", shape, derived,
                                                 cuda::emulated_device);
    found["warps"] = plan.warps;
    found["resident"] = plan.resident;
    found["value_bytes"] = plan.value_bytes;
    found["shared_bytes"] = plan.shared_bytes;
    found["row_bytes"] = cuda::kPitch<T, kHeadDim> * sizeof(T);
    found["chunk"] = cuda::forward::kChunk<T, kHeadDim>;
  });
  return found;
}

// How attention_forward would run with weights that it finds itself, on the emulated device.
py::dict forward_plan(const std::array<int64_t, 4>& sizes, const std::string& type,
                      int64_t num_prefix_tokens) {
  auto [batch, heads, length, head_dim] = sizes;
  AttentionShape shape =
      bindings::attention_shape({batch, heads, length, length, head_dim}, type, 1.0f, false);
  float some_relevance = 0.0f;
  cuda::KeyWeights derived{};
  derived.relevance = &some_relevance;
  derived.num_prefix_tokens = num_prefix_tokens;
  switch (shape.type) {
    case Type::float32: return plan_of<float>(shape, derived);
    case Type::float16: return plan_of<cuda::float16>(shape, derived);
    case Type::bfloat16: return plan_of<cuda::bfloat16>(shape, derived);
  }
  return {};
}

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
  module.def("forward_plan", forward_plan, py::arg("shape"), py::arg("type"),
             py::arg("num_prefix_tokens"));
  module.def("backward_sweeps", backward_sweeps, py::arg("shape"), py::arg("type"),
             py::arg("is_causal"));
}
