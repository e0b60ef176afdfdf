// Adds the CUDA launchers to a Python module.
#pragma once

namespace pybind11 {
class module_;
}

namespace tir::cuda {

void bind(pybind11::module_& module);

}  // namespace tir::cuda
