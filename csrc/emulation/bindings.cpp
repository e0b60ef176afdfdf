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

// Whether a block of attention_backward serves a whole head, on the emulated device.
bool serves_whole_heads(const std::array<int64_t, 5>& sizes, const std::string& type) {
  AttentionShape shape = bindings::attention_shape(sizes, type, 1.0f, false);
  bool found = false;
  if (shape.type == Type::float32) return false;
  cuda::with_head_dim("weighted_attention", shape.head_dim, [&](auto head_dim) {
    found = cuda::head_fits<cuda::bfloat16, decltype(head_dim)::value>(shape,
                                                                       cuda::emulated_device);
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
  module.def("serves_whole_heads", serves_whole_heads, py::arg("shape"), py::arg("type"));
}
