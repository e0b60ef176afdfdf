// The CUDA kernels, run on the CPU, as a Python module for the tests.
#include <pybind11/pybind11.h>

#include "cuda/bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace tir;

PYBIND11_MODULE(tir_cuda_emulated, module) {
  cuda::bind(module);
  module.def("set_thread_order", emulation::set_thread_order, py::arg("order"),
             "0: ascending, 1: descending, else random with this seed");
  module.def("set_device", [](int multiprocessors, int shared_memory) {
    cuda::emulated_device = {multiprocessors, shared_memory};
  });
}
