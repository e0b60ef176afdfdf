// What a worker reads and writes next is asked for while it computes.
#pragma once

#include "rows.h"

namespace tir::cpu::TIR_ARCH {

// Rows of several grids, a few of them at a time: a core keeps only so many requests open, and a
// burst of more holds up whatever comes after it.
class Prefetcher {
 public:
  void clear() {
    num_grids_ = 0;
    grid_ = 0;
  }

  // Up to max_grids times; `stride` is in bytes.
  void add(const void* start, int64_t stride, int64_t num_rows) {
    if (num_rows == 0) return;
    grids_[num_grids_++] = {static_cast<const char*>(start), stride, num_rows};
  }

  // All of them are spread over `work`, in vectors of sums; later work asks for nothing. Where there
  // is more than a line to a vector, what products work on would be driven out of the first-level
  // cache.
  void spread(int64_t row_bytes, int64_t work) {
    int64_t num_rows = 0;
    for (int64_t i = 0; i < num_grids_; ++i) num_rows += grids_[i].num_rows;
    row_bytes_ = row_bytes;
    rate_ = divide_up(num_rows * one_row, larger_of(work, 1));
    due_ = 0;
    goes_near_ = num_rows * divide_up(row_bytes, line) < work;
  }

  // After some of the work. Always inlined: compilers drop calls of a function that does nothing
  // but prefetch.
  TIR_INLINE void advance(int64_t work) {
    if (grid_ == num_grids_) return;
    due_ += work * rate_;
    for (; due_ >= one_row; due_ -= one_row) {
      Grid& grid = grids_[grid_];
      for (int64_t i = 0; i < row_bytes_; i += line) {
        if (goes_near_) {
          __builtin_prefetch(grid.next + i, 0, 3);
        } else {
          __builtin_prefetch(grid.next + i, 0, 2);
        }
      }
      grid.next += grid.stride;
      if (--grid.num_rows == 0 && ++grid_ == num_grids_) return;
    }
  }

 private:
  static constexpr int64_t max_grids = 8, line = 64;
  static constexpr int64_t one_row = 1 << 16;  // as rates and what is due are counted
  struct Grid {
    const char* next;
    int64_t stride, num_rows;
  };
  Grid grids_[max_grids];
  int64_t num_grids_ = 0, grid_ = 0;
  int64_t row_bytes_ = 0, rate_ = 0, due_ = 0;
  bool goes_near_ = false;  // to the first-level cache, not the second alone
};

// A product in memory: `adds` where it is added to what lies there, a row every `stride` sums.
struct Product {
  float* sums;
  int64_t stride;
  bool adds;
  Prefetcher& prefetcher;  // which goes on meanwhile, by the vectors that are written
};

// An epilogue of a product after each of whose tiles a prefetcher goes on.
template <class Epilogue>
struct PrefetchingEpilogue {
  Epilogue epilogue;
  Prefetcher& prefetcher;

  TIR_INLINE PrefetchingEpilogue at(int64_t row, int64_t column) const {
    return {epilogue.at(row, column), prefetcher};
  }

  template <int Rows, int Vectors, class Sums, class... More>
  TIR_INLINE void take(const Sums (&sums)[Rows][Vectors], const More&... more) const {
    epilogue.take(sums, more...);
    prefetcher.advance((1 + sizeof...(more)) * Rows * Vectors);
  }
};

template <class Epilogue>
PrefetchingEpilogue<Epilogue> prefetching(const Epilogue& epilogue, Prefetcher& prefetcher) {
  return {epilogue, prefetcher};
}

}  // namespace tir::cpu::TIR_ARCH
