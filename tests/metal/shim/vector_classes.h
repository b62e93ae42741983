// vec<T, 2..4> as classes, with their operators. swizzles.h is written by swizzles.py.
#pragma once
#include "traits.h"

namespace metal {

#ifdef CHECKED
template <unsigned BYTES>
constexpr unsigned vector_alignment = BYTES;

// clang's alignment check passes over copies of whole objects.
template <unsigned ALIGNMENT>
SHIM void check_aligned(const void* address) {
  if (__builtin_expect((ulong)address & (ALIGNMENT - 1), 0)) metal_misaligned(address, ALIGNMENT);
}
// Else the optimiser takes the address's alignment, and with it the check's result, as given.
template <class V>
SHIM void check_vector(const V* vector) {
  const void* address = vector;
  __asm__("" : "+r"(address));
  check_aligned<alignof(V)>(address);
}
#define VECTOR_COPIES(N)                                                    \
  SHIM constexpr vec(const vec& other) {                                    \
    if (!__builtin_is_constant_evaluated()) check_vector(&other);           \
    for (int i = 0; i < N; i++) elements[i] = other.elements[i];            \
  }                                                                         \
  SHIM constexpr vec& operator=(const vec& other) {                         \
    if (!__builtin_is_constant_evaluated()) {                               \
      check_vector(&other);                                                 \
      check_vector(this);                                                   \
    }                                                                       \
    for (int i = 0; i < N; i++) elements[i] = other.elements[i];            \
    return *this;                                                           \
  }
#else
// MLX's arrays on a CPU, which are used where they are, start at multiples of 8 only.
template <unsigned BYTES>
constexpr unsigned vector_alignment = BYTES < 8 ? BYTES : 8;
#define VECTOR_COPIES(N)
#endif

#define VECTOR_COMMON(N)                                                             \
  vec() = default;                                                                   \
  VECTOR_COPIES(N)                                                                   \
  SHIM constexpr vec(T value) {                                                      \
    for (int i = 0; i < N; i++) elements[i] = value;                                 \
  }                                                                                  \
  template <class U, class = enable_if_t<!is_same_v<U, T>>>                          \
  SHIM explicit constexpr vec(const vec<U, N>& other) {                              \
    for (int i = 0; i < N; i++) elements[i] = T(other.elements[i]);                  \
  }                                                                                  \
  template <class U>                                                                 \
  explicit constexpr vec(const U*) = delete;                                         \
  SHIM constexpr T& operator[](int i) { return elements[i]; }                        \
  SHIM constexpr const T& operator[](int i) const { return elements[i]; }

template <class T, int N>
struct vec;

template <class T>
struct alignas(vector_alignment<2 * sizeof(T)>) vec<T, 2> {
  union {
    T elements[2];
    struct { T x, y; };
  };
  VECTOR_COMMON(2)
  SHIM constexpr vec(T a, T b) : elements{a, b} {}
#define SWIZZLES_OF 2
#include "swizzles.h"
};

template <class T>
struct alignas(vector_alignment<4 * sizeof(T)>) vec<T, 3> {
  union {
    T elements[3];
    struct { T x, y, z; };
    T padded[4];
  };
  VECTOR_COMMON(3)
  SHIM constexpr vec(T a, T b, T c) : elements{a, b, c} {}
  SHIM constexpr vec(vec<T, 2> ab, T c) : elements{ab.x, ab.y, c} {}
  SHIM constexpr vec(T a, vec<T, 2> bc) : elements{a, bc.x, bc.y} {}
#define SWIZZLES_OF 3
#include "swizzles.h"
};

template <class T>
struct alignas(vector_alignment<4 * sizeof(T)>) vec<T, 4> {
  union {
    T elements[4];
    struct { T x, y, z, w; };
  };
  VECTOR_COMMON(4)
  SHIM constexpr vec(T a, T b, T c, T d) : elements{a, b, c, d} {}
  SHIM constexpr vec(vec<T, 2> ab, vec<T, 2> cd) : elements{ab.x, ab.y, cd.x, cd.y} {}
  SHIM constexpr vec(vec<T, 2> ab, T c, T d) : elements{ab.x, ab.y, c, d} {}
  SHIM constexpr vec(T a, T b, vec<T, 2> cd) : elements{a, b, cd.x, cd.y} {}
  SHIM constexpr vec(vec<T, 3> abc, T d) : elements{abc.x, abc.y, abc.z, d} {}
  SHIM constexpr vec(T a, vec<T, 3> bcd) : elements{a, bcd.x, bcd.y, bcd.z} {}
#define SWIZZLES_OF 4
#include "swizzles.h"
};

#undef VECTOR_COMMON
#undef VECTOR_COPIES

#define BINARY(OP)                                                            \
  template <class T, int N>                                                   \
  SHIM constexpr vec<T, N> operator OP(vec<T, N> a, vec<T, N> b) {            \
    for (int i = 0; i < N; i++) a.elements[i] = T(a.elements[i] OP b.elements[i]); \
    return a;                                                                 \
  }                                                                           \
  template <class T, int N>                                                   \
  SHIM constexpr vec<T, N> operator OP(vec<T, N> a, same<T> b) {              \
    for (int i = 0; i < N; i++) a.elements[i] = T(a.elements[i] OP b);        \
    return a;                                                                 \
  }                                                                           \
  template <class T, int N>                                                   \
  SHIM constexpr vec<T, N> operator OP(same<T> a, vec<T, N> b) {              \
    for (int i = 0; i < N; i++) b.elements[i] = T(a OP b.elements[i]);        \
    return b;                                                                 \
  }                                                                           \
  template <class T, int N>                                                   \
  SHIM constexpr vec<T, N>& operator OP##=(vec<T, N>& a, vec<T, N> b) {       \
    return a = a OP b;                                                        \
  }                                                                           \
  template <class T, int N>                                                   \
  SHIM constexpr vec<T, N>& operator OP##=(vec<T, N>& a, same<T> b) {         \
    return a = a OP b;                                                        \
  }
BINARY(+)
BINARY(-)
BINARY(*)
BINARY(/)
BINARY(%)
BINARY(&)
BINARY(|)
BINARY(^)
BINARY(<<)
BINARY(>>)
#undef BINARY

#define COMPARISON(OP)                                                        \
  template <class T, int N>                                                   \
  SHIM constexpr vec<bool, N> operator OP(vec<T, N> a, vec<T, N> b) {         \
    vec<bool, N> result;                                                      \
    for (int i = 0; i < N; i++) result.elements[i] = a.elements[i] OP b.elements[i]; \
    return result;                                                            \
  }                                                                           \
  template <class T, int N>                                                   \
  SHIM constexpr vec<bool, N> operator OP(vec<T, N> a, same<T> b) {           \
    return a OP vec<T, N>(b);                                                 \
  }                                                                           \
  template <class T, int N>                                                   \
  SHIM constexpr vec<bool, N> operator OP(same<T> a, vec<T, N> b) {           \
    return vec<T, N>(a) OP b;                                                 \
  }
COMPARISON(<)
COMPARISON(>)
COMPARISON(<=)
COMPARISON(>=)
COMPARISON(==)
COMPARISON(!=)
COMPARISON(&&)
COMPARISON(||)
#undef COMPARISON

template <class T, int N>
SHIM constexpr vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; i++) a.elements[i] = T(-a.elements[i]);
  return a;
}
template <class T, int N>
SHIM constexpr vec<T, N> operator~(vec<T, N> a) {
  for (int i = 0; i < N; i++) a.elements[i] = T(~a.elements[i]);
  return a;
}
template <int N>
SHIM constexpr vec<bool, N> operator!(vec<bool, N> a) {
  for (int i = 0; i < N; i++) a.elements[i] = !a.elements[i];
  return a;
}

}  // namespace metal
