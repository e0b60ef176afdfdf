// What the kernels use of a GPU, each under one name. Compiled by nvcc these are instructions;
// the tests compile the same kernels for a CPU, where csrc/emulation plays their part.
#pragma once

#include "cuda/elements.h"

namespace tir::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace tir::cuda

#if !defined(__CUDACC__)
#include "emulation/gpu.h"
#define TIR_DEVICE inline
#define TIR_UNROLL
#define TIR_NO_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define TIR_DEVICE __device__ __forceinline__
#define TIR_UNROLL _Pragma("unroll")
#define TIR_NO_UNROLL _Pragma("unroll 1")

namespace tir::cuda {

TIR_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

TIR_DEVICE float to_float(float value) { return value; }
TIR_DEVICE float to_float(float16 value) { return __half2float(__ushort_as_half(value.bits)); }
TIR_DEVICE float to_float(bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

template <class T>
TIR_DEVICE T from_float(float value);
template <>
TIR_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
TIR_DEVICE float16 from_float<float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
TIR_DEVICE bfloat16 from_float<bfloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// Two elements in one register, the first in the low half.
template <class T>
TIR_DEVICE uint32_t pack(float first, float second);
template <>
TIR_DEVICE uint32_t pack<float16>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
template <>
TIR_DEVICE uint32_t pack<bfloat16>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

// 2^x to a few units in the last place; 0 at -inf.
TIR_DEVICE float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

// The same number, of which the compiler no longer knows that: what is computed from it is computed
// where it is needed, and keeps no registers before.
TIR_DEVICE int anew(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

TIR_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Begins to copy 16 bytes to shared memory, or to write zeros where `exists` is false. Both ends
// lie on 16-byte boundaries.
TIR_DEVICE void copy_async(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

TIR_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all copies that this thread began, but for those of the last `Pending` commits, are
// done. Other threads see them after a barrier.
template <int Pending>
TIR_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane l names the row l % 8 of matrix l / 8, and
// gets of every matrix the elements 2 (l % 4) and the next of row l / 4.
TIR_DEVICE void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed on the way.
TIR_DEVICE void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// total (16 x 8) += left (16 x 16) right (16 x 8). With g = lane / 4 and t = lane % 4 a lane holds
// total: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); left: pairs at (g, 2t), (g+8, 2t), (g, 2t+8),
// (g+8, 2t+8); right: pairs down the columns at (2t, g), (2t+8, g).
template <class T>
TIR_DEVICE void multiply_add(float (&total)[4], const uint32_t (&left)[4], uint32_t right_0,
                             uint32_t right_1);

#define TIR_MULTIPLY_ADD(type, name)                                                        \
  template <>                                                                               \
  TIR_DEVICE void multiply_add<type>(float (&total)[4], const uint32_t (&left)[4],          \
                                     uint32_t right_0, uint32_t right_1) {                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                      \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
        : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])                    \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1)); \
  }
TIR_MULTIPLY_ADD(float16, "f16")
TIR_MULTIPLY_ADD(bfloat16, "bf16")
#undef TIR_MULTIPLY_ADD

// total (16 x 8) += left (16 x 8) right (8 x 8), of float32 whose last 13 bits are 0. A lane holds
// total as above; left: (g, t), (g+8, t), (g, t+4), (g+8, t+4); right: (t, g), (t+4, g).
TIR_DEVICE void multiply_add_tf32(float (&total)[4], const uint32_t (&left)[4], uint32_t right_0,
                                  uint32_t right_1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(total[0]), "+f"(total[1]), "+f"(total[2]), "+f"(total[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}

}  // namespace tir::cuda

#endif
