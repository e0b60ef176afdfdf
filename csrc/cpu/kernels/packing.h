// Packs rows in memory as the operands that matrix.h multiplies.
#pragma once

#include <utility>

#include "matrix.h"

namespace tir::cpu::TIR_ARCH {

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

// The left operand whose rows are the columns of a packed right one, which holds `steps` and
// `columns` in whole vectors.
inline void turn_panels(uint32_t* target, int64_t target_stride, const uint32_t* panels,
                        int64_t panel_stride, int64_t steps, int64_t columns) {
  for (int64_t column = 0; column < columns; column += lanes) {
    const uint32_t* panel = panels + column / panel_width * panel_stride + column % panel_width;
    for (int64_t step = 0; step < steps; step += lanes) {
      transpose_block(target + column * target_stride + step, target_stride,
                      panel + step * panel_width, panel_width);
    }
  }
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
  if (are_units) memset(workspace, 0, stride * sizeof(uint32_t));  // a row for the missing ones
  for (int64_t first = 0; first < round_up(count, Math::column_multiple); first += lanes) {
    auto* panel = target + first / panel_width * panel_width * stride + first % panel_width;
    if (are_units) {
      const void* rows[lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        rows[i] = first + i < count ? row_at(first + i) : workspace;
      }
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
      for (int64_t column = 0; column < width; column += panel_width) {
        Math::pair_values(step + column / panel_width * panel_stride, even + column,
                          odd == nullptr ? nullptr : odd + column, width - column);
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
