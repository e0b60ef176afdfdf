// Launching kernels: limits of the device, checks of every call.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"
#include "tir/cuda.h"

namespace tir::cuda {

struct Device {
  int multiprocessors;
  int shared_memory;  // bytes that one block may use
};

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* name) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("tir_kernels ") + name + ": CUDA says '" +
                             cudaGetErrorString(status) + "'");
  }
}

constexpr int kMaxDevices = 64;

inline int current_device(const char* name) {
  int index = 0;
  check(cudaGetDevice(&index), name);
  if (index >= kMaxDevices) throw std::runtime_error("tir_kernels: too many CUDA devices");
  return index;
}

inline Device device(const char* name) {
  static Device known[kMaxDevices] = {};
  int index = current_device(name);
  if (known[index].multiprocessors == 0) {
    Device read;
    check(cudaDeviceGetAttribute(&read.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 index), name);
    check(cudaDeviceGetAttribute(&read.multiprocessors, cudaDevAttrMultiProcessorCount, index),
          name);
    known[index].shared_memory = read.shared_memory;
    known[index].multiprocessors = read.multiprocessors;
  }
  return known[index];
}

// Runs a kernel over a grid of `blocks` times `rows`.
template <auto kKernel, class... Arguments>
void launch(const char* name, int64_t blocks, int threads, size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string("tir_kernels ") + name +
                             ": more blocks than a CUDA grid holds; use smaller batches");
  }
  // More than 48 KiB must be asked for, once a kernel and device.
  static size_t granted[kMaxDevices] = {};
  if (shared_bytes > 48 * 1024) {
    int index = current_device(name);
    if (shared_bytes > granted[index]) {
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            name);
      granted[index] = shared_bytes;
    }
  }
  kKernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
            static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

#else

inline Device emulated_device{4, 160 * 1024};

inline Device device(const char*) { return emulated_device; }

template <auto kKernel, class... Arguments>
void launch(const char* name, int64_t blocks, int threads, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  emulation::run(name, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes,
                 [&] { kKernel(arguments...); });
}

#endif

}  // namespace tir::cuda
