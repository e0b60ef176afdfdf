// Small matrix products on packed operands: left (rows x steps) times right (steps x columns).
//
// A product advances by units of 32 bits: one float32, or a pair of neighbouring bfloat16 values
// where the instruction set multiplies such pairs. Every element of a product is one chain of
// additions over the steps in ascending order, whatever tile of registers it falls into.
#pragma once

#include <utility>

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
  using State = NoState;
  static constexpr int64_t values_per_unit = 1;
  // Rows, steps and columns of a product are rounded up to these: operands are zero there, where
  // sums run over them, and products have room.
  static constexpr int64_t row_multiple = 2, step_multiple = 1, column_multiple = lanes;
  // Queries of one tile share the keys and values that pass through the cache: a multiple of every
  // max_tile_rows, and even, because bfloat16 queries are paired.
  static constexpr int64_t tile_queries = 48;

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
  using State = NoState;
  static constexpr int64_t values_per_unit = 2;
  static constexpr int64_t row_multiple = 2, step_multiple = 1, column_multiple = lanes;
  static constexpr int64_t tile_queries = 48;

  static TIR_INLINE UnitVec load_units(const Unit* source) { return load_bits<UintVec>(source); }
  static TIR_INLINE UnitVec broadcast_unit(const Unit* source) {
    return (UintVec)_mm512_set1_epi32(static_cast<int>(*source));
  }
  static TIR_INLINE Vec multiply_add(UnitVec left, UnitVec right, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }

  static TIR_INLINE Vec exp2(Vec x) { return short_exp2(x); }

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
  static constexpr int64_t column_multiple = panel_width;
  static constexpr int64_t tile_queries = 64;  // pairs of them are the steps of a product
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
// panel[step * panel_width + column].
template <class Math>
struct Right {
  const typename Math::Unit* data;
  int64_t panel_stride;
};

template <class Math, int Rows, int Vectors>
void multiply_tile(int64_t steps, Left<Math> left, const typename Math::Unit* right, float* product,
                   int64_t product_stride, bool adds) {
  Vec sums[Rows][Vectors];
  TIR_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TIR_UNROLL
    for (int v = 0; v < Vectors; ++v) sums[r][v] = zero();
  }
  for (int64_t step = 0; step < steps; ++step) {
    typename Math::UnitVec columns[Vectors];
    TIR_UNROLL
    for (int v = 0; v < Vectors; ++v) columns[v] = Math::load_units(right + v * lanes);
    TIR_UNROLL
    for (int r = 0; r < Rows; ++r) {
      typename Math::UnitVec row = Math::broadcast_unit(left.data + r * left.row_stride);
      TIR_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        sums[r][v] = Math::multiply_add(row, columns[v], sums[r][v]);
      }
    }
    left.data += left.step_stride;
    right += panel_width;
  }
  TIR_UNROLL
  for (int r = 0; r < Rows; ++r) {
    TIR_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      float* place = product + r * product_stride + v * lanes;
      // Adding a finished sum, not going on with it, keeps chains of additions short and exact.
      store(place, adds ? load(place) + sums[r][v] : sums[r][v]);
    }
  }
}

template <class Math>
using TileFunction = void (*)(int64_t, Left<Math>, const typename Math::Unit*, float*, int64_t,
                              bool);

// Tiles exist for even numbers of rows; index rows / 2 - 1.
template <class Math, int Vectors>
TileFunction<Math> tile_function(int64_t rows) {
  static constexpr TileFunction<Math> functions[] = {
      multiply_tile<Math, 2, Vectors>, multiply_tile<Math, 4, Vectors>,
      multiply_tile<Math, 6, Vectors>,
#if defined(__AVX512F__)
      multiply_tile<Math, 8, Vectors>, multiply_tile<Math, 10, Vectors>,
      multiply_tile<Math, 12, Vectors>,
#endif
  };
  return functions[rows / 2 - 1];
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
                             {right.data, panel_width}, right.panel_stride, product,
                             product_stride, adds);
  }
#endif
  int64_t num_tiles = divide_up(rows, max_tile_rows);
  int64_t tile_rows = round_up(divide_up(rows, larger_of(num_tiles, 1)), 2);
  for (int64_t column = 0; column < columns; column += panel_width) {
    const auto* panel = right.data + column / panel_width * right.panel_stride;
    bool is_whole = columns - column > lanes;
    for (int64_t row = 0; row < rows; row += tile_rows) {
      int64_t count = smaller_of(tile_rows, round_up(rows - row, 2));
      auto tile = is_whole ? tile_function<Math, 2>(count) : tile_function<Math, 1>(count);
      Left<Math> tile_left = left;
      tile_left.data += row * left.row_stride;
      tile(steps, tile_left, panel, product + row * product_stride + column, product_stride, adds);
    }
  }
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
                   {right.data + step * panel_width, right.panel_stride}, product, product_stride,
                   step > 0);
  }
}

// Transposes a lanes x lanes block of units.
#if defined(__clang__) || __GNUC__ >= 12
template <int Distance, bool IsUpper, int... Lane>
TIR_INLINE UintVec exchange(UintVec low, UintVec high, std::integer_sequence<int, Lane...>) {
  // One butterfly stage: the two rows swap the lanes that differ from their row in one bit.
  if constexpr (IsUpper) {
    return __builtin_shufflevector(low, high,
                                   (Lane & Distance ? lanes + Lane : Lane + Distance)...);
  } else {
    return __builtin_shufflevector(low, high,
                                   (Lane & Distance ? lanes + Lane - Distance : Lane)...);
  }
}

template <int Distance>
TIR_INLINE void transpose_stage(UintVec (&rows)[lanes]) {
  constexpr auto every_lane = std::make_integer_sequence<int, lanes>();
  TIR_UNROLL
  for (int i = 0; i < lanes; ++i) {
    if (i & Distance) continue;
    UintVec low = rows[i], high = rows[i + Distance];
    rows[i] = exchange<Distance, false>(low, high, every_lane);
    rows[i + Distance] = exchange<Distance, true>(low, high, every_lane);
  }
}

// row_at(i) gives the address of row i's first unit of the block.
template <class RowAt>
TIR_INLINE void transpose_rows(void* target, int64_t target_stride, RowAt row_at) {
  UintVec rows[lanes];
  TIR_UNROLL
  for (int i = 0; i < lanes; ++i) rows[i] = load_bits<UintVec>(row_at(i));
  transpose_stage<1>(rows);
  transpose_stage<2>(rows);
  if constexpr (lanes > 4) transpose_stage<(lanes > 4 ? 4 : 1)>(rows);
  if constexpr (lanes > 8) transpose_stage<(lanes > 8 ? 8 : 1)>(rows);
  TIR_UNROLL
  for (int i = 0; i < lanes; ++i) {
    memcpy(static_cast<uint32_t*>(target) + i * target_stride, &rows[i], sizeof rows[i]);
  }
}
#else
template <class RowAt>
inline void transpose_rows(void* target, int64_t target_stride, RowAt row_at) {
  for (int i = 0; i < lanes; ++i) {
    auto* row = static_cast<const uint32_t*>(row_at(i));
    for (int j = 0; j < lanes; ++j) {
      static_cast<uint32_t*>(target)[j * target_stride + i] = row[j];
    }
  }
}
#endif

inline void transpose_block(void* target, int64_t target_stride, const void* source,
                            int64_t source_stride) {
  transpose_rows(target, target_stride, [&](int64_t i) -> const void* {
    return static_cast<const uint32_t*>(source) + i * source_stride;
  });
}

// Packs `count` rows of `width` values as the columns of a right operand of steps_of(width) steps.
// row_at(i) gives the address of row i. `workspace` holds lanes * row_units(width) units, and the
// target row_units(width) steps: those beyond the width are zero, as are columns up to a multiple.
template <class Math, class RowAt>
void pack_columns(typename Math::Unit* target, RowAt row_at, Type type, int64_t count,
                  int64_t width, typename Math::Unit* workspace) {
  int64_t stride = row_units<Math>(width);
  // Whole rows of units lie in memory as they are multiplied.
  bool are_units = bytes_of(type) * Math::values_per_unit == sizeof(uint32_t) &&
                   width % (lanes * Math::values_per_unit) == 0;
  for (int64_t first = 0; first < round_up(count, Math::column_multiple); first += lanes) {
    auto* panel = target + first / panel_width * panel_width * stride + first % panel_width;
    if (are_units && first + lanes <= count) {
      const void* rows[lanes];
      for (int64_t i = 0; i < lanes; ++i) rows[i] = row_at(first + i);
      for (int64_t step = 0; step < stride; step += lanes) {
        transpose_rows(panel + step * panel_width, panel_width,
                       [&](int64_t i) -> const void* {
                         return static_cast<const uint32_t*>(rows[i]) + step;
                       });
      }
      continue;
    }
    for (int64_t i = 0; i < lanes; ++i) {
      if (first + i < count) {
        Math::copy_row(workspace + i * stride, row_at(first + i), type, width);
      } else {
        memset(workspace + i * stride, 0, stride * sizeof(uint32_t));
      }
    }
    for (int64_t step = 0; step < stride; step += lanes) {
      transpose_block(panel + step * panel_width, panel_width, workspace + step, stride);
    }
  }
}

// Packs `count` rows of `width` values as the steps of a right operand of `width` columns, in
// panels `panel_stride` units apart. An odd last row of bfloat16 is paired with zeros, and steps of
// zeros follow up to steps_of(count).
template <class Math, class RowAt>
void pack_rows(typename Math::Unit* target, int64_t panel_stride, RowAt row_at, Type type,
               int64_t count, int64_t width) {
  if constexpr (Math::values_per_unit == 1) {
    with_row_type(type, [&](auto row_type) {
      using Row = decltype(row_type);
      for (int64_t i = 0; i < count; ++i) {
        auto* row = static_cast<const typename Row::Element*>(row_at(i));
        float* step = target + i * panel_width;
        for (int64_t column = 0; column < width; column += lanes) {
          float* place = step + column / panel_width * panel_stride + column % panel_width;
          int64_t left = width - column;
          store(place, left >= lanes ? Row::read(row + column) : Row::read(row + column, left));
        }
      }
    });
  } else {
    for (int64_t i = 0; i < count; i += 2) {
      auto* even = static_cast<const uint16_t*>(row_at(i));
      auto* odd = i + 1 < count ? static_cast<const uint16_t*>(row_at(i + 1)) : nullptr;
      auto* step = target + i / 2 * panel_width;
      for (int64_t column = 0; column < width; column += lanes) {
        int64_t left = width - column;
        auto values_at = [&](const uint16_t* row) {
          return widen(left >= lanes ? load_bits<HalfWidthVec>(row + column)
                                     : load_first(row + column, left));
        };
        UintVec pairs = values_at(even);
        if (odd != nullptr) pairs |= values_at(odd) << 16;
        auto* place = step + column / panel_width * panel_stride + column % panel_width;
        memcpy(place, &pairs, sizeof pairs);
      }
    }
    for (int64_t step = divide_up(count, 2); step < steps_of<Math>(count); ++step) {
      for (int64_t column = 0; column < width; column += panel_width) {
        memset(target + column / panel_width * panel_stride + step * panel_width, 0,
               panel_width * sizeof *target);
      }
    }
  }
}

}  // namespace tir::cpu::TIR_ARCH
