// The matrix unit's instructions (AMX) in plain C++, for machines without it: tiles of 16 x 16 words.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace emulated_tiles {

struct Tile {
  uint32_t words[16][16];
};
inline thread_local Tile tiles[8];

inline void load(int tile, const void* source, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    memcpy(tiles[tile].words[row], static_cast<const char*>(source) + row * stride, 64);
  }
}

inline void store(int tile, void* target, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    memcpy(static_cast<char*>(target) + row * stride, tiles[tile].words[row], 64);
  }
}

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void multiply(int product, int left, int right) {
  for (int row = 0; row < 16; ++row) {
    for (int step = 0; step < 16; ++step) {
      uint32_t pair = tiles[left].words[row][step];
      for (int column = 0; column < 16; ++column) {
        uint32_t other = tiles[right].words[step][column];
        float sum = as_float(tiles[product].words[row][column]);
        sum += as_float(pair << 16) * as_float(other << 16);
        sum += as_float(pair & 0xffff0000u) * as_float(other & 0xffff0000u);
        memcpy(&tiles[product].words[row][column], &sum, sizeof sum);
      }
    }
  }
}

}  // namespace emulated_tiles

#define _tile_loadconfig(shapes) static_cast<void>(shapes)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) memset(&emulated_tiles::tiles[tile], 0, sizeof(emulated_tiles::Tile))
#define _tile_loadd(tile, source, stride) emulated_tiles::load(tile, source, stride)
#define _tile_stored(tile, target, stride) emulated_tiles::store(tile, target, stride)
#define _tile_dpbf16ps(product, left, right) emulated_tiles::multiply(product, left, right)
