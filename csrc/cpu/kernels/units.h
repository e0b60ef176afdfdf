// The units that products advance by, and what else is known of the types that are multiplied.
#pragma once

#include <type_traits>

#include "rows.h"
#include "tiles.h"

namespace tir::cpu::TIR_ARCH {

// Registers hold a tile of max_tile_rows x panel_width sums, beside one row of the right operand.
#if defined(__AVX512F__)
constexpr int max_tile_rows = 12;
#else
constexpr int max_tile_rows = 6;
#endif
constexpr int panel_vectors = 2;
constexpr int64_t panel_width = panel_vectors * lanes;

// What a unit's products may leave behind on a thread: nothing, of those by vectors.
struct NoState {};

struct Float32Math {
  using Unit = float;
  using UnitVec = Vec;
  using Sums = Vec;
  using State = NoState;
  static constexpr int64_t values_per_unit = 1;
  // Rows, steps and columns of a product are rounded up to these: operands are zero there, where
  // sums run over them, and products have room.
  static constexpr int64_t row_multiple = 2, step_multiple = 1, column_multiple = lanes;
  // A product writes whole vectors, of whatever number of columns; by tiles, it has to be asked for
  // whole panels.
  static constexpr int64_t written_multiple = 1;
  // Queries of one tile share the keys and values that pass through the cache: a multiple of every
  // max_tile_rows, and even, because bfloat16 queries are paired.
  static constexpr int64_t tile_queries = 60;
  // The same in the backward pass. Where scores stay in registers, sums are the less often added to
  // the more there are, as long as what becomes of scores stays in the second-level cache.
  static constexpr int64_t backward_queries = tile_queries;

  static TIR_INLINE UnitVec load_units(const Unit* source) { return load(source); }
  static TIR_INLINE UnitVec broadcast_unit(const Unit* source) { return broadcast(*source); }
  static TIR_INLINE Vec multiply_add(UnitVec left, UnitVec right, Vec sum) {
    return TIR_ARCH::multiply_add(left, right, sum);
  }

  static TIR_INLINE Vec exp2(Vec x) { return TIR_ARCH::exp2(x); }

  // 2^(x - reference) for an integer, of which offset_of makes what is given; 2^127 or more where
  // that is larger.
  static TIR_INLINE float offset_of(float reference) { return reference; }
  static TIR_INLINE Vec exp2_beyond(Vec x, Vec offset) {
#if defined(__AVX512F__)
    return TIR_ARCH::exp2(x - offset);
#else
    return TIR_ARCH::exp2(smaller(broadcast(127.0f), x - offset));
#endif
  }

  // A row as units, with zeros up to a whole vector.
  static TIR_INLINE void copy_row(Unit* target, const void* source, Type type, int64_t width) {
    read_row(target, source, type, width);
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Math {
  using Unit = uint32_t;
  using UnitVec = UintVec;
  using Sums = Vec;
  using State = NoState;
  static constexpr int64_t values_per_unit = 2;
  static constexpr int64_t row_multiple = 2, step_multiple = 1, column_multiple = lanes;
  static constexpr int64_t written_multiple = 1;
  static constexpr int64_t tile_queries = 60, backward_queries = 200;

  static TIR_INLINE UnitVec load_units(const Unit* source) { return load_bits<UintVec>(source); }
  static TIR_INLINE UnitVec broadcast_unit(const Unit* source) {
    return (UintVec)_mm512_set1_epi32(static_cast<int>(*source));
  }
  static TIR_INLINE Vec multiply_add(UnitVec left, UnitVec right, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }

  static TIR_INLINE Vec exp2(Vec x) { return short_exp2(x); }
  static TIR_INLINE float offset_of(float reference) { return thirty_seconds - reference; }
  static TIR_INLINE Vec exp2_beyond(Vec x, Vec offset) { return short_exp2(x, offset); }

  // Two vectors, one behind the other; and each value of the first with its value of the second.
  static TIR_INLINE UintVec side_by_side(Vec first, Vec second) {
    return (UintVec)_mm512_cvtne2ps_pbh(second, first);
  }
  static TIR_INLINE void store_halves(Unit* first, Unit* second, UintVec bits) {
    _mm256_storeu_si256((__m256i*)first, _mm512_castsi512_si256((__m512i)bits));
    _mm256_storeu_si256((__m256i*)second, _mm512_extracti64x4_epi64((__m512i)bits, 1));
  }
  static TIR_INLINE UintVec paired(UintVec bits) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                                       21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (UintVec)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)bits);
  }

  // A panel's width of units, each of a value of one row and, unless it is null, of another, with
  // zeros behind the last `count`.
  static TIR_INLINE void pair_values(Unit* target, const uint16_t* even, const uint16_t* odd,
                                     int64_t count) {
    alignas(64) static constexpr uint16_t low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5,
                                                     37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __mmask32 mask = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    __m512i evens = _mm512_maskz_loadu_epi16(mask, even);
    __m512i odds = odd == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, odd);
    __m512i first = _mm512_load_si512(low);
    __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(target, _mm512_permutex2var_epi16(evens, first, odds));
    _mm512_storeu_si512(target + lanes, _mm512_permutex2var_epi16(evens, second, odds));
  }

  static TIR_INLINE void copy_row(Unit* target, const void* source, Type, int64_t width) {
    auto* values = static_cast<const uint16_t*>(source);
    auto* copies = reinterpret_cast<uint16_t*>(target);
    int64_t i = 0;
    for (; i + 2 * lanes <= width; i += 2 * lanes) {
      UintVec bits = load_bits<UintVec>(values + i);
      memcpy(copies + i, &bits, sizeof bits);
    }
    for (; i < round_up(width, 2 * lanes); i += lanes) {
      HalfWidthVec bits = load_first(values + i, larger_of(0, smaller_of(lanes, width - i)));
      memcpy(copies + i, &bits, sizeof bits);
    }
  }
};
#endif

#if defined(__AMX_BF16__)
struct TileMath : BFloat16Math {
  using State = TileShapes;
  static constexpr int64_t row_multiple = tile_size, step_multiple = tile_size;
  static constexpr int64_t column_multiple = panel_width, written_multiple = panel_width;
  static constexpr int64_t tile_queries = 64;  // pairs of them are the steps of a product
  static constexpr int64_t backward_queries = 64;
};
using PairMath = TileMath;
#elif defined(__AVX512BF16__)
using PairMath = BFloat16Math;
#endif

// Calls function(Math()) for how values of a type are multiplied.
template <class Function>
void with_math([[maybe_unused]] Type type, Function function) {
#if defined(__AVX512BF16__)
  if (type == Type::bfloat16) return function(PairMath());
#endif
  function(Float32Math());
}

template <class Math>
constexpr int64_t steps_of(int64_t width) {
  return round_up(divide_up(width, Math::values_per_unit), Math::step_multiple);
}
// The distance of rows written by Math::copy_row.
template <class Math>
constexpr int64_t row_units(int64_t width) {
  return round_up(steps_of<Math>(width), lanes);
}
// Units of a packed right operand.
constexpr int64_t packed_units(int64_t steps, int64_t columns) {
  return steps * round_up(columns, panel_width);
}

}  // namespace tir::cpu::TIR_ARCH
