// The CUDA kernels, run on the CPU, as a Python module for the tests.
#include <pybind11/pybind11.h>

#include "cuda/bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;

PYBIND11_MODULE(tir_cuda_emulated, module) {
  tir::cuda::bind(module);
  module.def("set_thread_order", tir::emulation::set_thread_order, py::arg("order"),
             "0: ascending, 1: descending, else random with this seed");
  module.def("set_device", [](int multiprocessors, int shared_memory) {
    tir::cuda::emulated_device = {multiprocessors, shared_memory};
  });
}
