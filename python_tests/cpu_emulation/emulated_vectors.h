// The instructions of AVX-512 BF16 that the CPU kernels use in plain C++, for machines with AVX2.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

// What the kernels ask for. The compiler's own headers must not have seen it: they would take the
// instructions for given.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512BF16__ 1

#define TIR_EMULATED static inline __attribute__((always_inline))

namespace emulated_vectors {

typedef uint16_t Shorts __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef uint16_t HalfShorts __attribute__((vector_size(32)));

template <class Target, class Source>
TIR_EMULATED Target as(const Source& source) {
  static_assert(sizeof(Target) == sizeof(Source));
  Target target;
  memcpy(&target, &source, sizeof target);
  return target;
}

template <class Half, class Whole>
TIR_EMULATED Half half_of(const Whole& whole, int index) {
  Half half;
  memcpy(&half, reinterpret_cast<const char*>(&whole) + index * sizeof half, sizeof half);
  return half;
}

template <class Whole, class Half>
TIR_EMULATED Whole joined(const Half& first, const Half& second) {
  Half halves[] = {first, second};
  return as<Whole>(halves);
}

template <class Function>
TIR_EMULATED __m512 for_each(__m512 values, Function function) {
  float elements[16];
  memcpy(elements, &values, sizeof values);
  for (int i = 0; i < 16; ++i) elements[i] = function(elements[i], i);
  return as<__m512>(elements);
}

TIR_EMULATED __m512 mm512_set1_ps(float value) { return __m512{} + value; }
TIR_EMULATED __m512i mm512_set1_epi32(int value) { return as<__m512i>(Words{} + value); }
TIR_EMULATED __m512i mm512_set1_epi16(short value) {
  return as<__m512i>(Shorts{} + static_cast<uint16_t>(value));
}
TIR_EMULATED __m512i mm512_setzero_si512() { return __m512i{}; }

TIR_EMULATED __m512 mm512_castsi512_ps(__m512i a) { return as<__m512>(a); }
TIR_EMULATED __m512i mm512_castps_si512(__m512 a) { return as<__m512i>(a); }
TIR_EMULATED __m256 mm512_castps512_ps256(__m512 a) { return half_of<__m256>(a, 0); }
TIR_EMULATED __m256i mm512_castsi512_si256(__m512i a) { return half_of<__m256i>(a, 0); }
TIR_EMULATED __m256 mm512_extractf32x8_ps(__m512 a, int index) { return half_of<__m256>(a, index); }
TIR_EMULATED __m256i mm512_extracti64x4_epi64(__m512i a, int index) {
  return half_of<__m256i>(a, index);
}
TIR_EMULATED __m512 mm512_zextps256_ps512(__m256 a) { return joined<__m512>(a, __m256{}); }

TIR_EMULATED __m512 mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  __m256 halves[2];
  for (int i : {0, 1}) {
    halves[i] = _mm256_fmadd_ps(half_of<__m256>(a, i), half_of<__m256>(b, i), half_of<__m256>(c, i));
  }
  return as<__m512>(halves);
}
// The second where either is NaN.
TIR_EMULATED __m512 mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
TIR_EMULATED __m512 mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }

// To whole numbers; ties to even ones.
TIR_EMULATED __m512 mm512_roundscale_ps(__m512 a, int) {
  return for_each(a, [](float value, int) { return __builtin_nearbyintf(value); });
}
// What rounding to multiples of 2^-digits leaves.
TIR_EMULATED __m512 mm512_reduce_ps(__m512 a, int how) {
  float unit = static_cast<float>(1 << (how >> 4));
  return for_each(a, [unit](float value, int) {
    return std::isinf(value) ? 0.0f : value - __builtin_nearbyintf(value * unit) / unit;
  });
}

TIR_EMULATED float scaled(float value, float power) {
  if (std::isnan(value) || std::isnan(power)) return value + power;
  if (power > 1000) return value * INFINITY;
  return power < -1000 ? value * 0 : std::ldexp(value, static_cast<int>(std::floor(power)));
}
TIR_EMULATED __m512 mm512_scalef_ps(__m512 a, __m512 powers) {
  return for_each(a, [&powers](float value, int i) { return scaled(value, powers[i]); });
}
TIR_EMULATED __m512 mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 powers) {
  return for_each(a, [&](float value, int i) {
    return mask >> i & 1 ? scaled(value, powers[i]) : 0.0f;
  });
}

template <int Predicate>
TIR_EMULATED __mmask16 compared(__m512 a, __m512 b) {
  static_assert(Predicate == _CMP_NLT_UQ, "no other is emulated");
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(!(a[i] < b[i])) << i;
  return static_cast<__mmask16>(mask);
}

template <class Values>
TIR_EMULATED __m512i permuted(__m512i first, __m512i order, __m512i second) {
  constexpr int count = 64 / sizeof(Values{}[0]);
  auto from = as<Values>(first), places = as<Values>(order), other = as<Values>(second);
  Values result;
  for (int i = 0; i < count; ++i) {
    int place = places[i] % (2 * count);
    result[i] = place < count ? from[place] : other[place - count];
  }
  return as<__m512i>(result);
}
TIR_EMULATED __m512i mm512_permutex2var_epi32(__m512i a, __m512i order, __m512i b) {
  return permuted<Words>(a, order, b);
}
TIR_EMULATED __m512i mm512_permutex2var_epi16(__m512i a, __m512i order, __m512i b) {
  return permuted<Shorts>(a, order, b);
}
// No order of the kernels is beyond the one vector.
TIR_EMULATED __m512i mm512_permutexvar_epi16(__m512i order, __m512i a) {
  return permuted<Shorts>(a, order, a);
}

// To nearest, ties to even; numbers below the normal ones become 0.
TIR_EMULATED __m256i mm512_cvtneps_pbh(__m512 values) {
  HalfShorts result;
  for (int i = 0; i < 16; ++i) {
    uint32_t word = as<uint32_t>(static_cast<float>(values[i]));
    if (std::isnan(values[i])) {
      word |= 0x400000u;
    } else if ((word & 0x7f800000u) == 0) {
      word &= 0x80000000u;
    } else {
      word += 0x7fff + (word >> 16 & 1);
    }
    result[i] = static_cast<uint16_t>(word >> 16);
  }
  return as<__m256i>(result);
}
TIR_EMULATED __m512i mm512_cvtne2ps_pbh(__m512 second, __m512 first) {
  return joined<__m512i>(mm512_cvtneps_pbh(first), mm512_cvtneps_pbh(second));
}

// The odd products first.
TIR_EMULATED __m512 mm512_dpbf16_ps(__m512 sums, __m512bh left, __m512bh right) {
  auto a = as<Words>(left), b = as<Words>(right);
  sums = mm512_fmadd_ps(as<__m512>(a & 0xffff0000u), as<__m512>(b & 0xffff0000u), sums);
  return mm512_fmadd_ps(as<__m512>(a << 16), as<__m512>(b << 16), sums);
}
TIR_EMULATED __m256 mm256_dpbf16_ps(__m256 sums, __m256bh left, __m256bh right) {
  __m512 whole = mm512_dpbf16_ps(joined<__m512>(sums, __m256{}), joined<__m512bh>(left, __m256bh{}),
                                 joined<__m512bh>(right, __m256bh{}));
  return half_of<__m256>(whole, 0);
}

TIR_EMULATED __m512i mm512_load_si512(const void* source) {
  __m512i values;
  memcpy(&values, source, sizeof values);
  return values;
}
TIR_EMULATED void mm512_storeu_si512(void* target, __m512i values) {
  memcpy(target, &values, sizeof values);
}

// The elements whose bit in a mask is 1; those that are loaded are 0 elsewhere.
template <class Element, class Values>
TIR_EMULATED Values loaded(uint64_t mask, const void* source) {
  Element elements[sizeof(Values) / sizeof(Element)] = {};
  for (unsigned i = 0; i < sizeof(Values) / sizeof(Element); ++i) {
    if (mask >> i & 1) elements[i] = static_cast<const Element*>(source)[i];
  }
  return as<Values>(elements);
}
template <class Element, class Values>
TIR_EMULATED void stored(void* target, uint64_t mask, Values values) {
  Element elements[sizeof(Values) / sizeof(Element)];
  memcpy(elements, &values, sizeof values);
  for (unsigned i = 0; i < sizeof(Values) / sizeof(Element); ++i) {
    if (mask >> i & 1) static_cast<Element*>(target)[i] = elements[i];
  }
}
TIR_EMULATED __m512 mm512_maskz_loadu_ps(__mmask16 mask, const void* source) {
  return loaded<float, __m512>(mask, source);
}
TIR_EMULATED __m512i mm512_maskz_loadu_epi16(__mmask32 mask, const void* source) {
  return loaded<uint16_t, __m512i>(mask, source);
}
TIR_EMULATED __m256i mm256_maskz_loadu_epi16(__mmask16 mask, const void* source) {
  return loaded<uint16_t, __m256i>(mask, source);
}
TIR_EMULATED void mm512_mask_storeu_ps(void* target, __mmask16 mask, __m512 values) {
  stored<float>(target, mask, values);
}
TIR_EMULATED void mm256_mask_storeu_epi16(void* target, __mmask16 mask, __m256i values) {
  stored<uint16_t>(target, mask, values);
}

TIR_EMULATED __m512i mm512_cvtepu16_epi32(__m256i values) {
  return as<__m512i>(__builtin_convertvector(as<HalfShorts>(values), Words));
}
TIR_EMULATED __m512 mm512_cvtph_ps(__m256i values) {
  auto first = half_of<__m128i>(values, 0), second = half_of<__m128i>(values, 1);
  return joined<__m512>(_mm256_cvtph_ps(first), _mm256_cvtph_ps(second));
}
TIR_EMULATED __m256i mm512_cvtps_ph(__m512 values, int) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  auto first = half_of<__m256>(values, 0), second = half_of<__m256>(values, 1);
  return joined<__m256i>(_mm256_cvtps_ph(first, how), _mm256_cvtps_ph(second, how));
}

TIR_EMULATED __m512i mm512_add_epi16(__m512i a, __m512i b) {
  return as<__m512i>(as<Shorts>(a) + as<Shorts>(b));
}
TIR_EMULATED __m512i mm512_mul_epu32(__m512i a, __m512i b) {
  return as<__m512i>((as<Longs>(a) & 0xffffffffu) * (as<Longs>(b) & 0xffffffffu));
}
TIR_EMULATED __m512i mm512_slli_epi64(__m512i a, unsigned count) {
  return as<__m512i>(as<Longs>(a) << count);
}
TIR_EMULATED __m512i mm512_srli_epi64(__m512i a, unsigned count) {
  return as<__m512i>(as<Longs>(a) >> count);
}
TIR_EMULATED __m512i mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  auto values = as<Words>(a), others = as<Words>(b);
  for (int i = 0; i < 16; ++i) values[i] = mask >> i & 1 ? others[i] : values[i];
  return as<__m512i>(values);
}

}  // namespace emulated_vectors

#undef _mm256_dpbf16_ps
#define _mm256_dpbf16_ps emulated_vectors::mm256_dpbf16_ps
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 emulated_vectors::mm256_mask_storeu_epi16
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emulated_vectors::mm256_maskz_loadu_epi16
#undef _mm512_add_epi16
#define _mm512_add_epi16 emulated_vectors::mm512_add_epi16
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emulated_vectors::mm512_castps512_ps256
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated_vectors::mm512_castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated_vectors::mm512_castsi512_ps
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 emulated_vectors::mm512_castsi512_si256
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_vectors::mm512_cvtepu16_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated_vectors::mm512_cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated_vectors::mm512_cvtneps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_vectors::mm512_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated_vectors::mm512_cvtps_ph
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated_vectors::mm512_dpbf16_ps
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated_vectors::mm512_extractf32x8_ps
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emulated_vectors::mm512_extracti64x4_epi64
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated_vectors::mm512_fmadd_ps
#undef _mm512_load_si512
#define _mm512_load_si512 emulated_vectors::mm512_load_si512
#undef _mm512_mask_blend_epi32
#define _mm512_mask_blend_epi32 emulated_vectors::mm512_mask_blend_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated_vectors::mm512_mask_storeu_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated_vectors::mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated_vectors::mm512_maskz_loadu_ps
#undef _mm512_maskz_scalef_ps
#define _mm512_maskz_scalef_ps emulated_vectors::mm512_maskz_scalef_ps
#undef _mm512_max_ps
#define _mm512_max_ps emulated_vectors::mm512_max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated_vectors::mm512_min_ps
#undef _mm512_mul_epu32
#define _mm512_mul_epu32 emulated_vectors::mm512_mul_epu32
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 emulated_vectors::mm512_permutex2var_epi16
#undef _mm512_permutex2var_epi32
#define _mm512_permutex2var_epi32 emulated_vectors::mm512_permutex2var_epi32
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 emulated_vectors::mm512_permutexvar_epi16
#undef _mm512_reduce_ps
#define _mm512_reduce_ps emulated_vectors::mm512_reduce_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated_vectors::mm512_roundscale_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated_vectors::mm512_scalef_ps
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated_vectors::mm512_set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated_vectors::mm512_set1_epi32
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated_vectors::mm512_set1_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated_vectors::mm512_setzero_si512
#undef _mm512_slli_epi64
#define _mm512_slli_epi64 emulated_vectors::mm512_slli_epi64
#undef _mm512_srli_epi64
#define _mm512_srli_epi64 emulated_vectors::mm512_srli_epi64
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated_vectors::mm512_storeu_si512
#undef _mm512_zextps256_ps512
#define _mm512_zextps256_ps512 emulated_vectors::mm512_zextps256_ps512
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) emulated_vectors::compared<predicate>(a, b)
