// Rows of float32, float16 or bfloat16 in memory, read into and written from float32 vectors.
#pragma once

#include "simd.h"
#include "tir/types.h"

namespace tir::cpu::TIR_ARCH {

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}
constexpr int64_t divide_up(int64_t count, int64_t divisor) {
  return (count + divisor - 1) / divisor;
}
constexpr int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

TIR_INLINE HalfWidthVec to_bfloat16(Vec value) {
#if defined(__AVX512BF16__)
  return (HalfWidthVec)_mm512_cvtneps_pbh(value);
#else
  UintVec bits = (UintVec)value;
  UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  UintVec quiet_nan = (bits >> 16) | 0x40u;
  IntVec is_nan = (IntVec)(value != value);
  UintVec result = ((UintVec)is_nan & quiet_nan) | (~(UintVec)is_nan & rounded);
  return __builtin_convertvector(result, HalfWidthVec);
#endif
}

TIR_INLINE UintVec widen(HalfWidthVec bits) {
#if defined(__AVX512F__)
  return (UintVec)_mm512_cvtepu16_epi32((__m256i)bits);
#else
  return __builtin_convertvector(bits, UintVec);
#endif
}
TIR_INLINE Vec from_bfloat16(HalfWidthVec bits) { return (Vec)(widen(bits) << 16); }

#if !defined(__AVX2__)
inline float half_to_float(uint16_t half) {
  uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  if (exponent == 0) {
    float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -tiny : tiny;
  }
  uint32_t shifted = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23;
  uint32_t bits = sign | shifted | mantissa << 13;
  return load_bits<float>(&bits);
}

inline uint16_t float_to_half(float value) {
  uint32_t bits = load_bits<uint32_t>(&value);
  uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24
    float magnitude = load_bits<float>(&bits);
    // Adding 1/2 leaves 24 bits that end at 2^-24: the addition rounds to nearest even.
    float aligned = magnitude + 0.5f;
    return static_cast<uint16_t>(sign | (load_bits<uint32_t>(&aligned) - 0x3f000000u));
  }
  uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
#endif

TIR_INLINE HalfWidthVec to_float16(Vec value) {
#if defined(__AVX512F__)
  return (HalfWidthVec)_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (HalfWidthVec)_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  HalfWidthVec result{};
  for (int i = 0; i < lanes; ++i) result[i] = float_to_half(value[i]);
  return result;
#endif
}

TIR_INLINE Vec from_float16(HalfWidthVec bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)bits);
#else
  Vec result{};
  for (int i = 0; i < lanes; ++i) result[i] = half_to_float(bits[i]);
  return result;
#endif
}

// The first `count` (at most `lanes`) values at an address that may end a page; zeros follow.
TIR_INLINE Vec load_first(const float* source, int64_t count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), source);
#else
  float values[lanes] = {};
  memcpy(values, source, count * sizeof(float));
  return load(values);
#endif
}

TIR_INLINE HalfWidthVec load_first(const uint16_t* source, int64_t count) {
#if defined(__AVX512F__)
  auto mask = static_cast<__mmask16>((1u << count) - 1);
  return (HalfWidthVec)_mm256_maskz_loadu_epi16(mask, source);
#else
  uint16_t values[lanes] = {};
  memcpy(values, source, count * sizeof(uint16_t));
  return load_bits<HalfWidthVec>(values);
#endif
}

TIR_INLINE void store_first(float* target, Vec value, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1), value);
#else
  memcpy(target, &value, count * sizeof(float));
#endif
}

TIR_INLINE void store_first(uint16_t* target, HalfWidthVec value, int64_t count) {
#if defined(__AVX512F__)
  auto mask = static_cast<__mmask16>((1u << count) - 1);
  _mm256_mask_storeu_epi16(target, mask, (__m256i)value);
#else
  memcpy(target, &value, count * sizeof(uint16_t));
#endif
}

// How each type is read and written, one vector or the beginning of one at a time.
struct Float32Row {
  using Element = float;
  static TIR_INLINE Vec read(const float* source) { return load(source); }
  static TIR_INLINE Vec read(const float* source, int64_t count) {
    return load_first(source, count);
  }
  static TIR_INLINE void write(float* target, Vec value) { store(target, value); }
  static TIR_INLINE void write(float* target, Vec value, int64_t count) {
    store_first(target, value, count);
  }
};

template <Vec (*decode)(HalfWidthVec), HalfWidthVec (*encode)(Vec)>
struct HalfWidthRow {
  using Element = uint16_t;
  static TIR_INLINE Vec read(const uint16_t* source) {
    return decode(load_bits<HalfWidthVec>(source));
  }
  static TIR_INLINE Vec read(const uint16_t* source, int64_t count) {
    return decode(load_first(source, count));
  }
  static TIR_INLINE void write(uint16_t* target, Vec value) {
    HalfWidthVec bits = encode(value);
    memcpy(target, &bits, sizeof bits);
  }
  static TIR_INLINE void write(uint16_t* target, Vec value, int64_t count) {
    store_first(target, encode(value), count);
  }
};
using Float16Row = HalfWidthRow<from_float16, to_float16>;
using BFloat16Row = HalfWidthRow<from_bfloat16, to_bfloat16>;

// Calls function(RowType()) for the type.
template <class Function>
TIR_INLINE void with_row_type(Type type, Function function) {
  if (type == Type::float32) return function(Float32Row());
  if (type == Type::float16) return function(Float16Row());
  function(BFloat16Row());
}

// Reads `width` values and fills the last vector up with zeros.
inline void read_row(float* target, const void* source, Type type, int64_t width) {
  with_row_type(type, [&](auto row_type) {
    using Row = decltype(row_type);
    auto* elements = static_cast<const typename Row::Element*>(source);
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) store(target + i, Row::read(elements + i));
    if (i < width) store(target + i, Row::read(elements + i, width - i));
  });
}

inline float dot_of_rows(const void* left, const void* right, Type type, int64_t width) {
  Vec sum = zero();
  with_row_type(type, [&](auto row_type) {
    using Row = decltype(row_type);
    auto* lefts = static_cast<const typename Row::Element*>(left);
    auto* rights = static_cast<const typename Row::Element*>(right);
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
      sum = multiply_add(Row::read(lefts + i), Row::read(rights + i), sum);
    }
    if (i < width) {
      sum = multiply_add(Row::read(lefts + i, width - i), Row::read(rights + i, width - i), sum);
    }
  });
  return sum_of(sum);
}

// Writes `width` values times a factor.
template <class Row>
TIR_INLINE void write_row_as(void* target, const float* source, float factor, int64_t width) {
  auto* elements = static_cast<typename Row::Element*>(target);
  Vec factors = broadcast(factor);
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) Row::write(elements + i, load(source + i) * factors);
  if (i < width) Row::write(elements + i, load(source + i) * factors, width - i);
}

// The products of some rows of float32, `left_stride` apart, with each of `rows`: those of a left
// row side by side.
template <class Row, int Lefts, int Rows>
TIR_INLINE void multiply_rows(const typename Row::Element* const (&rows)[Rows], int64_t width,
                              const float* lefts, int64_t left_stride, float* products,
                              int64_t product_stride) {
  Vec sums[Lefts][Rows];
  TIR_UNROLL
  for (int l = 0; l < Lefts; ++l) {
    TIR_UNROLL
    for (int i = 0; i < Rows; ++i) sums[l][i] = zero();
  }
  auto add = [&](int64_t column, auto read, auto load_left) {
    Vec values[Rows];
    TIR_UNROLL
    for (int i = 0; i < Rows; ++i) values[i] = read(rows[i] + column);
    TIR_UNROLL
    for (int l = 0; l < Lefts; ++l) {
      Vec left = load_left(lefts + l * left_stride + column);
      TIR_UNROLL
      for (int i = 0; i < Rows; ++i) sums[l][i] = multiply_add(values[i], left, sums[l][i]);
    }
  };
  int64_t column = 0;
  for (; column + lanes <= width; column += lanes) {
    add(column, [](auto* source) { return Row::read(source); },
        [](const float* source) { return load(source); });
  }
  if (int64_t rest = width - column; rest > 0) {
    add(column, [&](auto* source) { return Row::read(source, rest); },
        [&](const float* source) { return load_first(source, rest); });
  }
  TIR_UNROLL
  for (int l = 0; l < Lefts; ++l) combine_each(sums[l], products + l * product_stride, Sum());
}

inline void write_row(void* target, const float* source, float factor, Type type, int64_t width) {
  with_row_type(type, [&](auto row_type) {
    write_row_as<decltype(row_type)>(target, source, factor, width);
  });
}

}  // namespace tir::cpu::TIR_ARCH
