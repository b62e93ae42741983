// What MLX puts before a kernel's text, as far as kernels may use it.
#pragma once
#include "atomics.h"
#include "matrix.h"

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

#define MTL_CONST constant
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")

template <typename T>
struct Limits {
  static constexpr T max = metal::numeric_limits<T>::max();
  static constexpr T min = metal::numeric_limits<T>::min();
  static constexpr T finite_max = max;
  static constexpr T finite_min = min;
};

#define FLOAT_LIMITS(T)                                             \
  template <>                                                       \
  struct Limits<T> {                                                \
    static constexpr T max = metal::numeric_limits<T>::infinity();  \
    static constexpr T min = -metal::numeric_limits<T>::infinity(); \
    static constexpr T finite_max = metal::numeric_limits<T>::max();  \
    static constexpr T finite_min = -metal::numeric_limits<T>::max(); \
  };
FLOAT_LIMITS(float)
FLOAT_LIMITS(half)
FLOAT_LIMITS(bfloat)
#undef FLOAT_LIMITS

template <typename T, typename U>
SHIM T ceildiv(T n, U unit) {
  return (n + unit - 1) / unit;
}

// The index in memory of a row-contiguous index.
template <typename I = int64_t>
SHIM I elem_to_loc(I element, constant int* shape, constant int64_t* strides, int ndim) {
  I place = 0;
  for (int i = ndim - 1; i >= 0 && element > 0; i--) {
    place += element % shape[i] * I(strides[i]);
    element /= shape[i];
  }
  return place;
}
