// What the CUDA runtime that is linked into this module says of the machine.
#include "cuda/launch.h"

namespace tir::cuda {

#if defined(__CUDACC__)

Runtime runtime() {
  Runtime found{};
  cudaRuntimeGetVersion(&found.version);
  cudaDriverGetVersion(&found.driver_version);
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) found.error = cudaGetErrorString(status);
  cudaGetLastError();  // or the next launch would report it
  return found;
}

#else

Runtime runtime() { return {}; }

#endif

}  // namespace tir::cuda
