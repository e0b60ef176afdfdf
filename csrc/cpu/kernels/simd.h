// A vector of floats as wide as the instruction set it is compiled for.
//
// The kernels are compiled once per instruction set, TIR_ARCH names the build and its namespace.
// Nothing here may call inline functions of the standard library: the linker keeps one copy of such
// a function for the whole module, and it could be the copy with instructions a machine lacks.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(TIR_ARCH)
#error "TIR_ARCH must name the instruction set that this file is compiled for"
#endif

// Small loops over registers must disappear, or the arrays they index go to memory.
#if defined(__clang__)
#define TIR_UNROLL _Pragma("unroll")
#else
#define TIR_UNROLL _Pragma("GCC unroll 16")
#endif
#define TIR_INLINE inline __attribute__((always_inline))

namespace tir::cpu::TIR_ARCH {

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int lanes = 16;
#elif defined(__AVX2__)
using Vec = __m256;
constexpr int lanes = 8;
#else
typedef float Vec __attribute__((vector_size(16)));
constexpr int lanes = 4;
#endif
typedef int32_t IntVec __attribute__((vector_size(4 * lanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * lanes)));
typedef uint16_t HalfWidthVec __attribute__((vector_size(2 * lanes)));

template <class T>
TIR_INLINE T load_bits(const void* source) {
  T value;
  memcpy(&value, source, sizeof value);
  return value;
}

template <class T>
TIR_INLINE void store_bits(void* target, T value) {
  memcpy(target, &value, sizeof value);
}

TIR_INLINE Vec load(const float* source) { return load_bits<Vec>(source); }
TIR_INLINE void store(float* target, Vec value) { memcpy(target, &value, sizeof value); }
TIR_INLINE Vec zero() { return Vec{}; }

TIR_INLINE Vec broadcast(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return Vec{value, value, value, value};
#endif
}

// left * right + addend, rounded once wherever the machine can.
TIR_INLINE Vec multiply_add(Vec left, Vec right, Vec addend) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(left, right, addend);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(left, right, addend);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < lanes; ++i) addend[i] = __builtin_fmaf(left[i], right[i], addend[i]);
  return addend;
#else
  return left * right + addend;
#endif
}

// The larger or the smaller of each pair; `other` where either is NaN.
#if defined(__AVX512F__)
TIR_INLINE Vec larger(Vec value, Vec other) { return _mm512_max_ps(value, other); }
TIR_INLINE Vec smaller(Vec value, Vec other) { return _mm512_min_ps(value, other); }
#elif defined(__AVX2__)
TIR_INLINE Vec larger(Vec value, Vec other) { return _mm256_max_ps(value, other); }
TIR_INLINE Vec smaller(Vec value, Vec other) { return _mm256_min_ps(value, other); }
#else
TIR_INLINE Vec larger(Vec value, Vec other) { return value > other ? value : other; }
TIR_INLINE Vec smaller(Vec value, Vec other) { return value < other ? value : other; }
#endif

// Combining all lanes of a vector, or those of each of some vectors at once: the same bits, since
// halves are folded in the same order.
struct Sum {
  template <class V>
  TIR_INLINE V operator()(V a, V b) const { return a + b; }
};
struct Largest {
#if defined(__AVX2__)
  TIR_INLINE __m128 operator()(__m128 a, __m128 b) const { return _mm_max_ps(a, b); }
  TIR_INLINE __m256 operator()(__m256 a, __m256 b) const { return _mm256_max_ps(a, b); }
#endif
  TIR_INLINE float operator()(float a, float b) const { return b > a ? b : a; }
};

#if defined(__AVX2__)
#if defined(__AVX512F__)
template <class Combine>
TIR_INLINE __m256 half_of(__m512 v, Combine combine) {
  return combine(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
#else
template <class Combine>
TIR_INLINE __m256 half_of(__m256 v, Combine) { return v; }
#endif
template <class Combine>
TIR_INLINE __m128 quarter_of(Vec v, Combine combine) {
  __m256 half = half_of(v, combine);
  return combine(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <class Combine>
TIR_INLINE float combined(Vec vector, Combine combine) {
  __m128 v = quarter_of(vector, combine);
  v = combine(v, _mm_movehl_ps(v, v));
  return combine(v, _mm_movehdup_ps(v))[0];
}

template <class Combine>
TIR_INLINE void combine_each(const Vec (&vectors)[4], float* results, Combine combine) {
  __m128 quarters[4], pairs[2];
  TIR_UNROLL
  for (int i = 0; i < 4; ++i) quarters[i] = quarter_of(vectors[i], combine);
  TIR_UNROLL
  for (int i = 0; i < 2; ++i) {
    __m128 first = quarters[2 * i], second = quarters[2 * i + 1];
    pairs[i] = combine(_mm_unpacklo_ps(first, second), _mm_unpackhi_ps(first, second));
  }
  _mm_storeu_ps(results, combine(_mm_movelh_ps(pairs[0], pairs[1]),
                                 _mm_movehl_ps(pairs[1], pairs[0])));
}
#else
template <class Combine>
TIR_INLINE float combined(Vec v, Combine combine) {
  return combine(combine(v[0], v[2]), combine(v[1], v[3]));
}
#endif
template <int Count, class Combine>
TIR_INLINE void combine_each(const Vec (&vectors)[Count], float* results, Combine combine) {
  TIR_UNROLL
  for (int i = 0; i < Count; ++i) results[i] = combined(vectors[i], combine);
}

TIR_INLINE float sum_of(Vec v) { return combined(v, Sum()); }
TIR_INLINE float largest_of(Vec v) { return combined(v, Largest()); }

constexpr float smallest_exponent = -126.0f;  // of a normal float32

// 2^x for x below 127.5, within one unit in the last place; 0 below the normal range; NaN for NaN.
//
// x = n + f with n the nearest integer, 2^f from a polynomial of least relative error on
// [-1/2, 1/2] that is exact at 0.
TIR_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  Vec n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec integer_spacing = broadcast(12582912.0f);  // 1.5 * 2^23: floats here are integers
  Vec unclamped = x;
  x = larger(broadcast(smallest_exponent - 1.0f), x);
  Vec n = (x + integer_spacing) - integer_spacing;
#endif
  Vec f = x - n;
  Vec power = multiply_add(broadcast(0.00015353362f), f, broadcast(0.0013398875f));
  power = multiply_add(power, f, broadcast(0.009618437f));
  power = multiply_add(power, f, broadcast(0.055503324f));
  power = multiply_add(power, f, broadcast(0.24022648f));
  power = multiply_add(power, f, broadcast(0.6931472f));
  power = multiply_add(power, f, broadcast(1.0f));
#if defined(__AVX512F__)
  __mmask16 is_kept = _mm512_cmp_ps_mask(x, broadcast(smallest_exponent), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(is_kept, power, n);
#elif defined(__AVX2__)
  __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  Vec scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, broadcast(smallest_exponent), _CMP_NLT_UQ));
#else
  UintVec exponent = (UintVec)__builtin_convertvector(n, IntVec) << 23;
  IntVec is_kept = ~(unclamped < broadcast(smallest_exponent));
  return (Vec)(((IntVec)((UintVec)power + exponent)) & is_kept);
#endif
}

// The natural logarithm of positive normal numbers, within one unit in the last place; NaN for NaN.
//
// x = 2^k (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1]: log(1 + f) = f - f^2 / 2 + f^3 times a
// polynomial of least error, and k ln 2 in two parts, the first of which is exact.
TIR_INLINE Vec log(Vec x) {
  IntVec bits = (IntVec)x;
  IntVec k = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  Vec f = (Vec)(bits - (k << 23)) - broadcast(1.0f);
  Vec powers_of_two = __builtin_convertvector(k, Vec);
  Vec polynomial = multiply_add(broadcast(-0.07916822f), f, broadcast(0.1277806f));
  polynomial = multiply_add(polynomial, f, broadcast(-0.13047232f));
  polynomial = multiply_add(polynomial, f, broadcast(0.14196418f));
  polynomial = multiply_add(polynomial, f, broadcast(-0.16637567f));
  polynomial = multiply_add(polynomial, f, broadcast(0.20001696f));
  polynomial = multiply_add(polynomial, f, broadcast(-0.2500027f));
  polynomial = multiply_add(polynomial, f, broadcast(0.33333322f));
  Vec square = f * f;
  Vec rest = multiply_add(polynomial, square * f, powers_of_two * broadcast(-2.1219444e-4f));
  rest = multiply_add(square, broadcast(-0.5f), rest);
  // The last term is 0, or NaN.
  return multiply_add(powers_of_two, broadcast(0.693359375f), f + rest) + (x - x);
}

#if defined(__AVX512F__)
constexpr float thirty_seconds = 393216.0f;  // 1.5 * 2^18: floats here are multiples of 1/32

// The same as exp2 within two units in the last place, in fewer instructions: what becomes bfloat16
// next has no use for the last bits. Infinite where a power of two is too large.
//
// x = k + j / 32 + f: 2^(j / 32) is looked up, 2^f - 1 a polynomial of least error on
// [-1/64, 1/64]. With an offset of thirty_seconds - n for an integer n, it is 2^(x - n).
TIR_INLINE Vec short_exp2(Vec x, Vec offset = broadcast(thirty_seconds)) {
  alignas(64) static const uint32_t powers[32] = {  // 2^(j / 32) as bits
      0x3f800000, 0x3f82cd87, 0x3f85aac3, 0x3f88980f, 0x3f8b95c2, 0x3f8ea43a, 0x3f91c3d3, 0x3f94f4f0,
      0x3f9837f0, 0x3f9b8d3a, 0x3f9ef532, 0x3fa27043, 0x3fa5fed7, 0x3fa9a15b, 0x3fad583f, 0x3fb123f6,
      0x3fb504f3, 0x3fb8fbaf, 0x3fbd08a4, 0x3fc12c4d, 0x3fc5672a, 0x3fc9b9be, 0x3fce248c, 0x3fd2a81e,
      0x3fd744fd, 0x3fdbfbb8, 0x3fe0ccdf, 0x3fe5b907, 0x3feac0c7, 0x3fefe4ba, 0x3ff5257d, 0x3ffa83b3};
  Vec rounded = x + offset;
  // Ties are the same as above: to even numbers of 1/32, of which an integer has an even number.
  Vec f = _mm512_reduce_ps(x, 5 << 4);
  Vec power = _mm512_castsi512_ps(
      _mm512_permutex2var_epi32(_mm512_load_si512(powers), _mm512_castps_si512(rounded),
                                _mm512_load_si512(powers + 16)));
  Vec per_f = multiply_add(f, broadcast(0.24022868f), broadcast(0.69315734f));
  // Scaling takes the integer below k + j / 32.
  return _mm512_scalef_ps(multiply_add(per_f, f * power, power),
                          rounded - broadcast(thirty_seconds));
}
#endif

}  // namespace tir::cpu::TIR_ARCH
