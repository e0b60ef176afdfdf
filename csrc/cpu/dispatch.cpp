// Picks the build of the kernels that this machine runs best.
#if defined(TIR_BUILT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

#include "cpu.h"

// Each is defined by the kernels' sources, compiled for that instruction set.
#define TIR_DECLARE(arch)                                      \
  namespace tir::cpu::arch {                                   \
  void attention_forward(const AttentionForward&, int threads); \
  void attention_backward(const AttentionBackward&, int threads); \
  void attention_statistics(const AttentionStatistics&, int threads); \
  void relevance(const Relevance&, int threads);               \
  void philox_dropout(const PhiloxDropout&, int threads);    \
  void activation(const Activation&, int threads);             \
  }
TIR_DECLARE(portable)
TIR_DECLARE(avx2)
TIR_DECLARE(avx512)
TIR_DECLARE(avx512_bf16)
TIR_DECLARE(amx)
#undef TIR_DECLARE

namespace tir::cpu {
namespace {

#define TIR_KERNELS(arch) \
  Kernels {                                                          \
    arch::attention_forward, arch::attention_backward, arch::attention_statistics, \
        arch::relevance, arch::philox_dropout, arch::activation     \
  }

#if defined(TIR_BUILT_AMX)
// Whether the machine multiplies tiles of bfloat16, and the kernel lets this process keep them: it
// wants to be asked, since their registers make a thread's state larger.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  constexpr int request_permission = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Architecture> built_architectures() {
  std::vector<Architecture> built{{"portable", TIR_KERNELS(portable), true}};
#if defined(TIR_BUILT_AVX2)
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  built.push_back({"avx2", TIR_KERNELS(avx2), has_avx2});
#endif
#if defined(TIR_BUILT_AVX512)
  bool has_avx512 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  built.push_back({"avx512", TIR_KERNELS(avx512), has_avx512});
#endif
#if defined(TIR_BUILT_AVX512_BF16)
  bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  built.push_back({"avx512_bf16", TIR_KERNELS(avx512_bf16), has_bf16});
#endif
#if defined(TIR_BUILT_AMX)
  built.push_back({"amx", TIR_KERNELS(amx), has_bf16 && has_amx()});
#endif
  return built;
}

const Architecture& find(const std::string& name) {
  std::string names;
  for (const Architecture& candidate : architectures()) {
    if (candidate.name == name) {
      if (!candidate.is_supported) {
        throw std::invalid_argument("this machine lacks the instruction set " + name);
      }
      return candidate;
    }
    names += std::string(names.empty() ? "" : ", ") + candidate.name;
  }
  throw std::invalid_argument("instruction set must be one of " + names + "; got " + name);
}

const Architecture& default_architecture() {
  if (const char* wanted = std::getenv("TIR_CPU_ARCH"); wanted != nullptr && *wanted != '\0') {
    return find(wanted);
  }
  const Architecture* fastest = nullptr;
  for (const Architecture& candidate : architectures()) {
    if (candidate.is_supported) fastest = &candidate;
  }
  return *fastest;
}

const Architecture* chosen = nullptr;

}  // namespace

const std::vector<Architecture>& architectures() {
  static const std::vector<Architecture> built = built_architectures();
  return built;
}

const Architecture& architecture() {
  if (chosen == nullptr) chosen = &default_architecture();
  return *chosen;
}

void use_architecture(const std::string& name) { chosen = &find(name); }

}  // namespace tir::cpu
