// Small matrix products on packed operands: left (rows x steps) times right (steps x columns).
// packing.h packs them.
//
// A product advances by units of 32 bits: one float32, or a pair of neighbouring bfloat16 values
// where the instruction set multiplies such pairs. Every element of a product is one chain of
// additions over the steps in ascending order, whatever tile of registers it falls into.
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
  // The same in the forward pass, which sums nothing up from tile to tile: their scores stay in the
  // first-level cache.
  static constexpr int64_t forward_queries = 12;

  static TIR_INLINE UnitVec load_units(const Unit* source) { return load(source); }
  static TIR_INLINE UnitVec broadcast_unit(const Unit* source) { return broadcast(*source); }
  static TIR_INLINE Vec multiply_add(UnitVec left, UnitVec right, Vec sum) {
    return TIR_ARCH::multiply_add(left, right, sum);
  }

  static TIR_INLINE Vec exp2(Vec x) { return TIR_ARCH::exp2(x); }

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
  static constexpr int64_t tile_queries = 60, forward_queries = 12;

  static TIR_INLINE UnitVec load_units(const Unit* source) { return load_bits<UintVec>(source); }
  static TIR_INLINE UnitVec broadcast_unit(const Unit* source) {
    return (UintVec)_mm512_set1_epi32(static_cast<int>(*source));
  }
  static TIR_INLINE Vec multiply_add(UnitVec left, UnitVec right, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }

  static TIR_INLINE Vec exp2(Vec x) { return short_exp2(x); }

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
  static constexpr int64_t forward_queries = 64;
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

// The left operand: unit (row, step) lies at data[row * row_stride + step * step_stride].
template <class Math>
struct Left {
  const typename Math::Unit* data;
  int64_t row_stride;
  int64_t step_stride;
};

// The right operand, in panels of panel_width columns: unit (step, column) of a panel lies at
// panel[step * step_stride + column].
template <class Math>
struct Right {
  const typename Math::Unit* data;
  int64_t panel_stride;
  int64_t step_stride = panel_width;
};

// Rows that a compiler can address from one pointer, as pointer + {0, 1, 2} * stride.
constexpr int rows_per_pointer = 3;

// Keeps a compiler from having a pointer for each row instead, more than there are registers for:
// some would lie in vector registers, and addresses would wait for the products.
template <class T>
TIR_INLINE void keep_in_register(T*& pointer) {
  asm("" : "+r"(pointer));
}

// Of a last vector the first half, where the second has no columns: it takes half the time.
template <class Math>
struct HalfVectors;
#if defined(__AVX512F__)
constexpr bool has_halves = true;
template <class Math>
struct HalfVectors {
  using Unit = typename Math::Unit;
  using UnitVec = __m256;
  using Sums = __m256;

  static TIR_INLINE UnitVec load_units(const Unit* source) { return load_bits<__m256>(source); }
  static TIR_INLINE UnitVec broadcast_unit(const Unit* source) {
    if constexpr (Math::values_per_unit == 1) {
      return _mm256_set1_ps(*source);
    } else {
      return (__m256)_mm256_set1_epi32(static_cast<int>(*source));
    }
  }
  static TIR_INLINE Sums multiply_add(UnitVec left, UnitVec right, Sums sum) {
#if defined(__AVX512BF16__)
    if constexpr (Math::values_per_unit == 2) {
      return _mm256_dpbf16_ps(sum, (__m256bh)left, (__m256bh)right);
    }
#endif
    return _mm256_fmadd_ps(left, right, sum);
  }
};
// Zeros in the second half, as products of the zeros that are packed there.
TIR_INLINE Vec whole(__m256 sums) { return _mm512_zextps256_ps512(sums); }
#else
constexpr bool has_halves = false;
#endif
TIR_INLINE Vec whole(Vec sums) { return sums; }

// The number of vectors that stands for half of one.
constexpr int half_vector = 0;

template <class Math, int Rows, int Vectors, bool Adds>
TIR_INLINE void multiply_tile(int64_t steps, Left<Math> left, Right<Math> panel, float* product,
                              int64_t product_stride) {
  using Own = std::conditional_t<Vectors == half_vector, HalfVectors<Math>, Math>;
  constexpr int num_pointers = (Rows + rows_per_pointer - 1) / rows_per_pointer;
  constexpr int num_vectors = Vectors == half_vector ? 1 : Vectors;
  typename Own::Sums sums[Rows][num_vectors];
  TIR_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TIR_UNROLL
    for (int v = 0; v < num_vectors; ++v) sums[r][v] = typename Own::Sums{};
  }
  const typename Math::Unit* rows[num_pointers];
  TIR_UNROLL
  for (int i = 0; i < num_pointers; ++i) {
    rows[i] = left.data + rows_per_pointer * i * left.row_stride;
  }
  const typename Math::Unit* right = panel.data;
  for (const auto* end = right + steps * panel.step_stride; right != end;
       right += panel.step_stride) {
    typename Own::UnitVec columns[num_vectors];
    TIR_UNROLL
    for (int v = 0; v < num_vectors; ++v) columns[v] = Own::load_units(right + v * lanes);
    TIR_UNROLL
    for (int r = 0; r < Rows; ++r) {
      typename Own::UnitVec row = Own::broadcast_unit(
          rows[r / rows_per_pointer] + r % rows_per_pointer * left.row_stride);
      TIR_UNROLL
      for (int v = 0; v < num_vectors; ++v) {
        sums[r][v] = Own::multiply_add(row, columns[v], sums[r][v]);
      }
    }
    TIR_UNROLL
    for (int i = 0; i < num_pointers; ++i) {
      rows[i] += left.step_stride;
      keep_in_register(rows[i]);
    }
  }
  TIR_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TIR_UNROLL
    for (int v = 0; v < num_vectors; ++v) {
      float* place = product + v * lanes;
      // Adding a finished sum, not going on with it, keeps chains of additions short and exact.
      store(place, Adds ? load(place) + whole(sums[r][v]) : whole(sums[r][v]));
    }
    product += product_stride;
    keep_in_register(product);
  }
}

// Whole tiles. A function for all of them, not one for each: a call takes as long as some steps.
template <class Math, int Rows, int Vectors, bool Adds>
void multiply_panels(int64_t num_tiles, int64_t num_panels, int64_t steps, Left<Math> left,
                    Right<Math> right, float* product, int64_t product_stride) {
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    Left<Math> tile_left = left;
    float* place = product + panel * panel_width;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      multiply_tile<Math, Rows, Vectors, Adds>(steps, tile_left, right, place, product_stride);
      tile_left.data += Rows * left.row_stride;
      place += Rows * product_stride;
    }
    right.data += right.panel_stride;
  }
}

template <class Math>
using PanelsFunction = void (*)(int64_t, int64_t, int64_t, Left<Math>, Right<Math>, float*, int64_t);

// Tiles exist for even numbers of rows; index rows / 2 - 1.
template <class Math, int Vectors, bool Adds>
PanelsFunction<Math> panels_function(int64_t rows) {
  static constexpr PanelsFunction<Math> functions[] = {
      multiply_panels<Math, 2, Vectors, Adds>, multiply_panels<Math, 4, Vectors, Adds>,
      multiply_panels<Math, 6, Vectors, Adds>,
#if defined(__AVX512F__)
      multiply_panels<Math, 8, Vectors, Adds>, multiply_panels<Math, 10, Vectors, Adds>,
      multiply_panels<Math, 12, Vectors, Adds>,
#endif
  };
  return functions[rows / 2 - 1];
}

// Tiles of one number of rows: in panels, then in a vector and the half of one for what is left of
// the columns, where these take less time than a panel.
template <class Math, bool Adds>
void multiply_band(int64_t tile_rows, int64_t num_tiles, int64_t columns, int64_t steps,
                   Left<Math> left, Right<Math> right, float* product, int64_t product_stride) {
  constexpr int64_t half = has_halves ? lanes / 2 : 0;
  int64_t num_panels = divide_up(columns - lanes - half, panel_width);
  panels_function<Math, 2, Adds>(tile_rows)(num_tiles, num_panels, steps, left, right, product,
                                           product_stride);
  int64_t done = num_panels * panel_width;
  right.data += num_panels * right.panel_stride;
  if (columns - done > half) {
    panels_function<Math, 1, Adds>(tile_rows)(num_tiles, 1, steps, left, right, product + done,
                                             product_stride);
    done += lanes;
    right.data += lanes;
  }
  if constexpr (has_halves) {
    if (columns <= done) return;
    panels_function<Math, half_vector, Adds>(tile_rows)(num_tiles, 1, steps, left, right,
                                                       product + done, product_stride);
  }
}

template <class Math, bool Adds>
void multiply_by_vectors(int64_t rows, int64_t columns, int64_t steps, Left<Math> left,
                         Right<Math> right, float* product, int64_t product_stride) {
  if (rows == 0 || columns == 0) return;
  int64_t tile_rows = round_up(divide_up(rows, divide_up(rows, max_tile_rows)), 2);
  int64_t num_tiles = rows / tile_rows, whole = num_tiles * tile_rows;
  multiply_band<Math, Adds>(tile_rows, num_tiles, columns, steps, left, right, product,
                            product_stride);
  if (rows == whole) return;
  left.data += whole * left.row_stride;
  multiply_band<Math, Adds>(round_up(rows - whole, 2), 1, columns, steps, left, right,
                            product + whole * product_stride, product_stride);
}

// product = left @ right, or product += left @ right where `adds`.
//
// Rows are rounded up to an even number and columns to whole vectors, or both to whole tiles: left
// operand and product must have room for them.
template <class Math>
void multiply(int64_t rows, int64_t columns, int64_t steps, Left<Math> left, Right<Math> right,
              float* product, int64_t product_stride, bool adds) {
#if defined(__AMX_BF16__)
  if constexpr (Math::row_multiple == tile_size) {
    return multiply_by_tiles(rows, columns, steps, {left.data, left.row_stride},
                             {right.data, right.step_stride}, right.panel_stride, product,
                             product_stride, adds);
  }
#endif
  auto multiply_all = adds ? multiply_by_vectors<Math, true> : multiply_by_vectors<Math, false>;
  multiply_all(rows, columns, steps, left, right, product, product_stride);
}

// product = left @ right in several sums over parts of the steps: rounding errors of one long sum
// would grow with its length, and a part of a panel stays in the first-level cache.
template <class Math>
void multiply_in_parts(int64_t rows, int64_t columns, int64_t steps, Left<Math> left,
                       Right<Math> right, float* product, int64_t product_stride) {
  constexpr int64_t part_steps = 128;
  for (int64_t step = 0; step < steps; step += part_steps) {
    multiply<Math>(rows, columns, smaller_of(part_steps, steps - step),
                   {left.data + step * left.step_stride, left.row_stride, left.step_stride},
                   {right.data + step * right.step_stride, right.panel_stride, right.step_stride},
                   product, product_stride, step > 0);
  }
}

}  // namespace tir::cpu::TIR_ARCH
