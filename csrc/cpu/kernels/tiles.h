// Products of bfloat16 by the matrix unit (AMX): tiles of 16 x 16 sums in registers of their own.
//
// The operands lie as for the vector unit, in units of two values; but what a tile reads must be
// there: steps in sixteens, with zeros behind the last, and room for rows in sixteens.
#pragma once

#include "prefetch.h"

#if defined(__AMX_BF16__)
namespace tir::cpu::TIR_ARCH {

constexpr int64_t tile_size = 16;  // rows, units of a row, columns

// The shape of all tiles, for as long as it lives: other libraries on the thread set their own.
class TileShapes {
 public:
  TileShapes() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = tile_size * sizeof(uint32_t);
      shapes.rows[tile] = tile_size;
    }
    _tile_loadconfig(&shapes);
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// Where an operand's units or a product's sums lie; distances in elements of 32 bits.
struct TileLeft {
  const uint32_t* data;  // unit (row, step) at data[row * row_stride + step]
  int64_t row_stride;
};
struct TileRight {
  const uint32_t* data;  // unit (step, column) at data[step * step_stride + column]
  int64_t step_stride;
};

// One or two tiles of rows by one or two of columns. Tile registers: sums 0-3, left 4-5, right 6-7.
template <int RowTiles, int ColumnTiles>
TIR_INLINE void multiply_tiles(int64_t steps, TileLeft left, TileRight right, float* sums,
                               const Product& product) {
  int64_t left_bytes = left.row_stride * 4, right_bytes = right.step_stride * 4;
  int64_t product_bytes = product.stride * 4;
  float* lower = sums + tile_size * product.stride;
  // The compiler knows of tiles no memory that they read.
  __asm__ volatile("" ::: "memory");
  if (product.adds) {
    _tile_loadd(0, sums, product_bytes);
    if (ColumnTiles > 1) _tile_loadd(1, sums + tile_size, product_bytes);
    if (RowTiles > 1) _tile_loadd(2, lower, product_bytes);
    if (RowTiles > 1 && ColumnTiles > 1) _tile_loadd(3, lower + tile_size, product_bytes);
  } else {
    _tile_zero(0);
    if (ColumnTiles > 1) _tile_zero(1);
    if (RowTiles > 1) _tile_zero(2);
    if (RowTiles > 1 && ColumnTiles > 1) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; step += tile_size) {
    const uint32_t* rows = left.data + step;
    const uint32_t* columns = right.data + step * right.step_stride;
    _tile_loadd(6, columns, right_bytes);
    _tile_loadd(4, rows, left_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (ColumnTiles > 1) {
      _tile_loadd(7, columns + tile_size, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (RowTiles > 1) {
      _tile_loadd(5, rows + tile_size * left.row_stride, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (ColumnTiles > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, product_bytes);
  if (ColumnTiles > 1) _tile_stored(1, sums + tile_size, product_bytes);
  if (RowTiles > 1) _tile_stored(2, lower, product_bytes);
  if (RowTiles > 1 && ColumnTiles > 1) _tile_stored(3, lower + tile_size, product_bytes);
  product.prefetcher.advance(RowTiles * tile_size * ColumnTiles);
}

// Two tiles of columns, or what is left of them, for all rows.
template <int ColumnTiles>
inline void multiply_tile_rows(int64_t rows, int64_t steps, TileLeft left, TileRight right,
                               float* sums, const Product& product) {
  int64_t row = 0;
  for (; row + tile_size < rows; row += 2 * tile_size) {
    multiply_tiles<2, ColumnTiles>(steps, {left.data + row * left.row_stride, left.row_stride},
                                   right, sums + row * product.stride, product);
  }
  if (row < rows) {
    multiply_tiles<1, ColumnTiles>(steps, {left.data + row * left.row_stride, left.row_stride},
                                   right, sums + row * product.stride, product);
  }
}

// The product left @ right, with rows, columns and steps rounded up to whole tiles. Columns come in
// panels of two tiles, `panel_stride` units apart.
inline void multiply_by_tiles(int64_t rows, int64_t columns, int64_t steps, TileLeft left,
                              TileRight right, int64_t panel_stride, const Product& product) {
  for (int64_t column = 0; column < columns; column += 2 * tile_size) {
    if (columns - column > tile_size) {
      multiply_tile_rows<2>(rows, steps, left, right, product.sums + column, product);
    } else {
      multiply_tile_rows<1>(rows, steps, left, right, product.sums + column, product);
    }
    right.data += panel_stride;
  }
}

}  // namespace tir::cpu::TIR_ARCH
#endif
