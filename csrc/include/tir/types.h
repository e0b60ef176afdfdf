// What the launchers of every device share: element types and strided tensors.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tir {

enum class Type : int { float32 = 0, float16 = 1, bfloat16 = 2 };

inline int64_t bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Elements of a type that only the running program knows.
struct Array {
  const void* data;  // null for none
  Type type;
};

// A (batch, head, row) grid of rows whose elements lie side by side, of a type that
// stands beside the grid. Strides count elements.
template <class Void>
struct GridOf {
  Void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;

  Void* row(int64_t batch, int64_t head, int64_t row, Type type) const {
    using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
    int64_t element = batch * batch_stride + head * head_stride + row * row_stride;
    return static_cast<Byte*>(data) + element * bytes_of(type);
  }
};
using RowGrid = GridOf<const void>;
using ResultGrid = GridOf<void>;

}  // namespace tir
