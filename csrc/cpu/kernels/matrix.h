// Small matrix products on packed operands: left (rows x steps) times right (steps x columns).
// packing.h packs them.
//
// A product advances by units of 32 bits: one float32, or a pair of neighbouring bfloat16 values
// where the instruction set multiplies such pairs. Every element of a product is one chain of
// additions over the steps in ascending order, whatever tile of registers it falls into.
#pragma once

#include "tiles.h"
#include "units.h"

namespace tir::cpu::TIR_ARCH {

// The left operand: unit (row, step) lies at data[row * row_stride + step * step_stride].
template <class Math>
struct Left {
  const typename Math::Unit* data;
  int64_t row_stride;
  int64_t step_stride;

  Left from_row(int64_t row) const { return {data + row * row_stride, row_stride, step_stride}; }
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

// What becomes of a tile of sums while it lies in registers. An epilogue has
//   at(row, column), the same for tiles that begin there: the product's first has row 0, column 0;
//   take(sums), for a finished [rows][vectors].
// This one stores them, or adds them to what lies there.
template <bool Adds>
struct MemoryEpilogue {
  float* product;
  int64_t stride;

  TIR_INLINE MemoryEpilogue at(int64_t row, int64_t column) const {
    return {product + row * stride + column, stride};
  }

  template <int Rows, int Vectors, class Sums>
  TIR_INLINE void take(const Sums (&sums)[Rows][Vectors]) const {
    float* row = product;
    TIR_UNROLL
    for (int r = 0; r < Rows; ++r) {
      TIR_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        float* place = row + v * lanes;
        // Adding a finished sum, not going on with it, keeps chains of additions short and exact.
        store(place, Adds ? load(place) + whole(sums[r][v]) : whole(sums[r][v]));
      }
      row += stride;
      keep_in_register(row);
    }
  }
};

template <class Math, int Vectors>
struct TileTypes {
  using Own = std::conditional_t<Vectors == half_vector, HalfVectors<Math>, Math>;
  static constexpr int num_vectors = Vectors == half_vector ? 1 : Vectors;
  template <int Rows>
  using Sums = typename Own::Sums[Rows][num_vectors];
};

// The sums of a tile, which stay in registers.
template <class Math, int Rows, int Vectors>
TIR_INLINE void sum_up_tile(int64_t steps, Left<Math> left, Right<Math> panel,
                            typename TileTypes<Math, Vectors>::template Sums<Rows>& sums) {
  using Own = typename TileTypes<Math, Vectors>::Own;
  constexpr int num_vectors = TileTypes<Math, Vectors>::num_vectors;
  constexpr int num_pointers = (Rows + rows_per_pointer - 1) / rows_per_pointer;
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
}

// Whole tiles. A function for all of them, not one for each: a call takes as long as some steps.
template <class Math, int Rows, int Vectors, class Epilogue>
void multiply_panels(int64_t num_tiles, int64_t num_panels, int64_t steps, Left<Math> left,
                    Right<Math> right, const Epilogue& epilogue) {
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      typename TileTypes<Math, Vectors>::template Sums<Rows> sums;
      sum_up_tile<Math, Rows, Vectors>(steps, left.from_row(tile * Rows), right, sums);
      epilogue.at(tile * Rows, panel * panel_width).take(sums);
    }
    right.data += right.panel_stride;
  }
}

template <class Math, class Epilogue>
using PanelsFunction = void (*)(int64_t, int64_t, int64_t, Left<Math>, Right<Math>,
                                const Epilogue&);

// Tiles exist for even numbers of rows; index rows / 2 - 1.
template <class Math, int Vectors, class Epilogue>
PanelsFunction<Math, Epilogue> panels_function(int64_t rows) {
  static constexpr PanelsFunction<Math, Epilogue> functions[] = {
      multiply_panels<Math, 2, Vectors, Epilogue>, multiply_panels<Math, 4, Vectors, Epilogue>,
      multiply_panels<Math, 6, Vectors, Epilogue>,
#if defined(__AVX512F__)
      multiply_panels<Math, 8, Vectors, Epilogue>, multiply_panels<Math, 10, Vectors, Epilogue>,
      multiply_panels<Math, 12, Vectors, Epilogue>,
#endif
  };
  return functions[rows / 2 - 1];
}

// Tiles of one number of rows: in panels, then in a vector and the half of one for what is left of
// the columns, where these take less time than a panel.
template <class Math, class Epilogue>
void multiply_band(int64_t tile_rows, int64_t num_tiles, int64_t columns, int64_t steps,
                   Left<Math> left, Right<Math> right, const Epilogue& epilogue) {
  constexpr int64_t half = has_halves ? lanes / 2 : 0;
  int64_t num_panels = divide_up(columns - lanes - half, panel_width);
  panels_function<Math, 2, Epilogue>(tile_rows)(num_tiles, num_panels, steps, left, right,
                                               epilogue);
  int64_t done = num_panels * panel_width;
  right.data += num_panels * right.panel_stride;
  if (columns - done > half) {
    panels_function<Math, 1, Epilogue>(tile_rows)(num_tiles, 1, steps, left, right,
                                                 epilogue.at(0, done));
    done += lanes;
    right.data += lanes;
  }
  if constexpr (has_halves) {
    if (columns <= done) return;
    panels_function<Math, half_vector, Epilogue>(tile_rows)(num_tiles, 1, steps, left, right,
                                                           epilogue.at(0, done));
  }
}

// Rows as tiles of nearly the same height: of few rows, a tile waits for its own sums.
struct Bands {
  explicit Bands(int64_t rows) {
    int64_t even = round_up(rows, 2), count = divide_up(even, max_tile_rows);
    tile_rows = round_up(divide_up(even, count), 2);
    num_smaller = (count * tile_rows - even) / 2;
    num_tiles = count - num_smaller;
  }

  int64_t tile_rows, num_tiles;
  int64_t num_smaller;  // which have two rows less
};

// left @ right as tiles in registers, each of which an epilogue takes.
//
// Rows are rounded up to an even number and columns to whole vectors: left operand and epilogue
// must have room for them.
template <class Math, class Epilogue>
void multiply_into(int64_t rows, int64_t columns, int64_t steps, Left<Math> left,
                   Right<Math> right, const Epilogue& epilogue) {
  if (rows == 0 || columns == 0) return;
  Bands bands(rows);
  multiply_band<Math>(bands.tile_rows, bands.num_tiles, columns, steps, left, right, epilogue);
  if (bands.num_smaller == 0) return;
  int64_t done = bands.num_tiles * bands.tile_rows;
  multiply_band<Math>(bands.tile_rows - 2, bands.num_smaller, columns, steps, left.from_row(done),
                      right, epilogue.at(done, 0));
}

// Two products of the same sizes, of which the right operands lie alike.
template <class Math>
struct TwoProducts {
  Left<Math> left[2];
  Right<Math> right[2];

  TwoProducts at(int64_t row, int64_t column) const {
    TwoProducts part = *this;
    for (int i = 0; i < 2; ++i) {
      part.left[i] = left[i].from_row(row);
      part.right[i].data +=
          column / panel_width * right[i].panel_stride + column % panel_width;
    }
    return part;
  }
};

template <class Math, int Rows, int Vectors, class Epilogue>
void multiply_two_vectors(int64_t num_tiles, int64_t num_vectors, int64_t steps,
                          const TwoProducts<Math>& products, const Epilogue& epilogue) {
  for (int64_t vector = 0; vector < num_vectors; ++vector) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      TwoProducts<Math> own = products.at(tile * Rows, vector * lanes);
      typename TileTypes<Math, Vectors>::template Sums<Rows> first, second;
      sum_up_tile<Math, Rows, Vectors>(steps, own.left[0], own.right[0], first);
      sum_up_tile<Math, Rows, Vectors>(steps, own.left[1], own.right[1], second);
      epilogue.at(tile * Rows, vector * lanes).take(first, second);
    }
  }
}

template <class Math, class Epilogue>
using TwoVectorsFunction = void (*)(int64_t, int64_t, int64_t, const TwoProducts<Math>&,
                                    const Epilogue&);

template <class Math, int Vectors, class Epilogue>
TwoVectorsFunction<Math, Epilogue> two_vectors_function(int64_t rows) {
  static constexpr TwoVectorsFunction<Math, Epilogue> functions[] = {
      multiply_two_vectors<Math, 2, Vectors, Epilogue>,
      multiply_two_vectors<Math, 4, Vectors, Epilogue>,
      multiply_two_vectors<Math, 6, Vectors, Epilogue>,
#if defined(__AVX512F__)
      multiply_two_vectors<Math, 8, Vectors, Epilogue>,
      multiply_two_vectors<Math, 10, Vectors, Epilogue>,
      multiply_two_vectors<Math, 12, Vectors, Epilogue>,
#endif
  };
  return functions[rows / 2 - 1];
}

template <class Math, class Epilogue>
void multiply_two_bands(int64_t tile_rows, int64_t num_tiles, int64_t columns, int64_t steps,
                        const TwoProducts<Math>& products, const Epilogue& epilogue) {
  constexpr int64_t half = has_halves ? lanes / 2 : 0;
  int64_t num_vectors = divide_up(columns - half, lanes);
  two_vectors_function<Math, 1, Epilogue>(tile_rows)(num_tiles, num_vectors, steps, products,
                                                    epilogue);
  int64_t done = num_vectors * lanes;
  if constexpr (has_halves) {
    if (columns <= done) return;
    two_vectors_function<Math, half_vector, Epilogue>(tile_rows)(
        num_tiles, 1, steps, products.at(0, done), epilogue.at(0, done));
  }
}

// As multiply_into, for an epilogue that takes the sums of both products, [rows][1].
template <class Math, class Epilogue>
void multiply_two_into(int64_t rows, int64_t columns, int64_t steps,
                       const TwoProducts<Math>& products, const Epilogue& epilogue) {
  if (rows == 0 || columns == 0) return;
  Bands bands(rows);
  multiply_two_bands(bands.tile_rows, bands.num_tiles, columns, steps, products, epilogue);
  if (bands.num_smaller == 0) return;
  int64_t done = bands.num_tiles * bands.tile_rows;
  multiply_two_bands(bands.tile_rows - 2, bands.num_smaller, columns, steps, products.at(done, 0),
                     epilogue.at(done, 0));
}

// The product left @ right in memory.
//
// Rows are rounded up to an even number and columns to whole vectors, or both to whole tiles: left
// operand and product must have room for them.
template <class Math>
void multiply(int64_t rows, int64_t columns, int64_t steps, Left<Math> left, Right<Math> right,
              const Product& product) {
#if defined(__AMX_BF16__)
  if constexpr (Math::row_multiple == tile_size) {
    return multiply_by_tiles(rows, columns, steps, {left.data, left.row_stride},
                             {right.data, right.step_stride}, right.panel_stride, product);
  }
#endif
  if (product.adds) {
    MemoryEpilogue<true> epilogue{product.sums, product.stride};
    multiply_into(rows, columns, steps, left, right, prefetching(epilogue, product.prefetcher));
  } else {
    MemoryEpilogue<false> epilogue{product.sums, product.stride};
    multiply_into(rows, columns, steps, left, right, prefetching(epilogue, product.prefetcher));
  }
}

// The product left @ right in several sums over parts of the steps: rounding errors of one long sum
// would grow with its length, and a part of a panel stays in the first-level cache.
template <class Math>
void multiply_in_parts(int64_t rows, int64_t columns, int64_t steps, Left<Math> left,
                       Right<Math> right, float* product, int64_t product_stride) {
  constexpr int64_t part_steps = 128;
  Prefetcher nothing;
  for (int64_t step = 0; step < steps; step += part_steps) {
    multiply<Math>(rows, columns, smaller_of(part_steps, steps - step),
                   {left.data + step * left.step_stride, left.row_stride, left.step_stride},
                   {right.data + step * right.step_stride, right.panel_stride, right.step_stride},
                   {product, product_stride, step > 0, nothing});
  }
}

}  // namespace tir::cpu::TIR_ARCH
