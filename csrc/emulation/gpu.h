// Runs CUDA kernels on a CPU, for tests: slow, and strict where a GPU is lenient.
//
// Every thread of a block is a fiber. A fiber runs until it has to wait for others: at a barrier of
// the block, or where the lanes of a warp exchange values. Which one runs next is a matter of
// `set_thread_order`, so that a kernel that lacks a barrier gives another result. Shared memory
// starts as NaN, and an asynchronous copy lands as late as it may, or at random.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

// The words of the language that a C++ compiler does not know.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace tir::emulation {

enum class Exchange : int { synchronize, shuffle, vote, reduce, load_matrix, multiply };

struct Lane {
  dim3 thread, block, block_size, grid_size;
  unsigned lane;
};
extern Lane current;

// Waits for the whole block.
void block_barrier();

// Hands `bytes` to the other lanes of the warp, waits for all 32, and returns theirs: lane l's
// begin at 64 l. They stay until the next exchange but one.
const unsigned char* exchange(Exchange kind, const void* own, int bytes);

void copy_async(void* shared, const void* global, bool exists);
void commit_copies();
void wait_for_copies(int pending);

unsigned char* shared_memory();

// Runs `thread` for every thread of every block.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         const std::function<void()>& thread);

// 0: threads run in order. 1: in reverse. Others: at random, with this seed.
void set_thread_order(uint64_t order);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
uint16_t float_to_bfloat(float value);

// An operand of tensor cores; NaN where bits are set that these do not read.
inline float tf32(uint32_t bits) {
  if (bits & 0x1fffu) return NAN;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// total + the sum of products as tensor cores find it: terms lose what lies below the last bit but
// one of the largest, and the sum is cut off towards 0.
float add_products(float total, const double* products, int count);

template <class T>
T exchanged(const unsigned char* lanes, int lane) {
  T value;
  memcpy(&value, lanes + 64 * lane, sizeof value);
  return value;
}

}  // namespace tir::emulation

#define threadIdx (::tir::emulation::current.thread)
#define blockIdx (::tir::emulation::current.block)
#define blockDim (::tir::emulation::current.block_size)
#define gridDim (::tir::emulation::current.grid_size)

inline void __syncthreads() { tir::emulation::block_barrier(); }
inline void __syncwarp() {
  tir::emulation::exchange(tir::emulation::Exchange::synchronize, nullptr, 0);
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  using namespace tir::emulation;
  return exchanged<T>(exchange(Exchange::shuffle, &value, sizeof value), source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
  return __shfl_sync(mask, value, static_cast<int>(tir::emulation::current.lane) ^ flip);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  using namespace tir::emulation;
  const unsigned char* lanes = exchange(Exchange::vote, &predicate, sizeof predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (exchanged<int>(lanes, lane) != 0 ? 1u : 0u) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  using namespace tir::emulation;
  const unsigned char* lanes = exchange(Exchange::reduce, &value, sizeof value);
  unsigned total = 0;
  for (int lane = 0; lane < 32; ++lane) total += exchanged<unsigned>(lanes, lane);
  return total;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  using namespace tir::emulation;
  const unsigned char* lanes = exchange(Exchange::reduce, &value, sizeof value);
  unsigned largest = 0;
  for (int lane = 0; lane < 32; ++lane) {
    unsigned other = exchanged<unsigned>(lanes, lane);
    if (other > largest) largest = other;
  }
  return largest;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return ~__reduce_max_sync(mask, ~value);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int atomicAdd(int* address, int value) {
  int old = *address;
  *address += value;
  return old;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline int min(int left, int right) { return left < right ? left : right; }

namespace tir::cuda {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }
inline int anew(int number) { return number; }

inline void copy_async(void* shared, const void* global, bool exists) {
  emulation::copy_async(shared, global, exists);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int Pending>
void wait_for_copies() {
  emulation::wait_for_copies(Pending);
}
inline float power_of_two(float exponent) { return std::exp2(exponent); }

inline float to_float(float value) { return value; }
inline float to_float(float16 value) { return emulation::half_to_float(value.bits); }
inline float to_float(bfloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}
template <class T>
T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, float16>) {
    return {emulation::float_to_half(value)};
  } else {
    return {emulation::float_to_bfloat(value)};
  }
}
template <class T>
uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  const unsigned char* lanes =
      emulation::exchange(emulation::Exchange::load_matrix, row, 16);
  int lane = static_cast<int>(emulation::current.lane);
  for (int matrix = 0; matrix < 4; ++matrix) {
    memcpy(&matrices[matrix], lanes + 64 * (8 * matrix + lane / 4) + 4 * (lane % 4), 4);
  }
}
inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  const unsigned char* lanes =
      emulation::exchange(emulation::Exchange::load_matrix, row, 16);
  int lane = static_cast<int>(emulation::current.lane);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      memcpy(&pair[i], lanes + 64 * (8 * matrix + 2 * (lane % 4) + i) + 2 * (lane / 4), 2);
    }
    memcpy(&matrices[matrix], pair, 4);
  }
}

// A lane's share of what a warp multiplies, as numbers: each lane converts its own, once.
template <int Left, int Right>
struct Operands {
  float left[Left], right[Right];
};

template <class T>
void unpack(float* elements, const uint32_t* registers, int count) {
  for (int i = 0; i < count; ++i) {
    elements[2 * i] = to_float(T{static_cast<uint16_t>(registers[i])});
    elements[2 * i + 1] = to_float(T{static_cast<uint16_t>(registers[i] >> 16)});
  }
}

template <class T>
void multiply_add(float (&total)[4], const uint32_t (&left)[4], uint32_t right_0,
                  uint32_t right_1) {
  const uint32_t right[2] = {right_0, right_1};
  Operands<8, 4> own;
  unpack<T>(own.left, left, 4);
  unpack<T>(own.right, right, 2);
  const unsigned char* lanes = emulation::exchange(emulation::Exchange::multiply, &own, sizeof own);
  int lane = static_cast<int>(emulation::current.lane);
  for (int element = 0; element < 4; ++element) {
    int row = lane / 4 + 8 * (element / 2), column = 2 * (lane % 4) + element % 2;
    float products[16];
    for (int quarter = 0; quarter < 4; ++quarter) {
      auto a = emulation::exchanged<Operands<8, 4>>(lanes, 4 * (row % 8) + quarter);
      auto b = emulation::exchanged<Operands<8, 4>>(lanes, 4 * column + quarter);
      for (int high = 0; high < 2; ++high) {
        const float* in_left = a.left + 2 * (2 * high + row / 8);
        const float* in_right = b.right + 2 * high;
        products[8 * high + 2 * quarter] = in_left[0] * in_right[0];
        products[8 * high + 2 * quarter + 1] = in_left[1] * in_right[1];
      }
    }
    float sum = 0.0f;
    for (float product : products) sum += product;
    total[element] += sum;
  }
}

// Sums of four products at a time: of the GPUs that are served none takes fewer.
inline void multiply_add_tf32(float (&total)[4], const uint32_t (&left)[4], uint32_t right_0,
                              uint32_t right_1) {
  using emulation::tf32;
  Operands<4, 2> own{{tf32(left[0]), tf32(left[1]), tf32(left[2]), tf32(left[3])},
                     {tf32(right_0), tf32(right_1)}};
  const unsigned char* lanes = emulation::exchange(emulation::Exchange::multiply, &own, sizeof own);
  int lane = static_cast<int>(emulation::current.lane);
  for (int element = 0; element < 4; ++element) {
    int row = lane / 4 + 8 * (element / 2), column = 2 * (lane % 4) + element % 2;
    for (int high = 0; high < 2; ++high) {
      double products[4];
      for (int t = 0; t < 4; ++t) {
        auto a = emulation::exchanged<Operands<4, 2>>(lanes, 4 * (row % 8) + t);
        auto b = emulation::exchanged<Operands<4, 2>>(lanes, 4 * column + t);
        products[t] = static_cast<double>(a.left[2 * high + row / 8]) * b.right[high];
      }
      total[element] = emulation::add_products(total[element], products, 4);
    }
  }
}

}  // namespace tir::cuda
