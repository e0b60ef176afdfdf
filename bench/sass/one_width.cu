// The kernels of one source for one width of heads, which takes a fifth of the time of all: what
// csrc/cuda/heads.cuh chooses from at run time is settled here.
#include "cuda/heads.cuh"

namespace tir::cuda {

template <class Launch>
void with_one_head_dim(const char*, int64_t, Launch launch) {
  launch(std::integral_constant<int, TIR_HEAD_DIM>());
}

}  // namespace tir::cuda

#define with_head_dim with_one_head_dim
#include TIR_SOURCE
