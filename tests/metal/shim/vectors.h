// The names of vectors; packed_vec and array.
#pragma once
#include "traits.h"
#ifdef SPACES
#include "vector_types.h"
#else
#include "vector_classes.h"
#endif

namespace metal {

template <class T, int N>
struct packed_vec {
  T elements[N];
  packed_vec() = default;
  SHIM constexpr packed_vec(vec<T, N> v) {
    for (int i = 0; i < N; i++) elements[i] = v[i];
  }
  SHIM constexpr operator vec<T, N>() const {
    vec<T, N> result;
    for (int i = 0; i < N; i++) result[i] = elements[i];
    return result;
  }
  SHIM constexpr T& operator[](int i) { return elements[i]; }
  SHIM constexpr const T& operator[](int i) const { return elements[i]; }
};

#define VECTOR_NAMES(T)        \
  typedef vec<T, 2> T##2;      \
  typedef vec<T, 3> T##3;      \
  typedef vec<T, 4> T##4;      \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
VECTOR_NAMES(float)
VECTOR_NAMES(half)
VECTOR_NAMES(bfloat)
VECTOR_NAMES(int)
VECTOR_NAMES(uint)
VECTOR_NAMES(short)
VECTOR_NAMES(ushort)
VECTOR_NAMES(char)
VECTOR_NAMES(uchar)
VECTOR_NAMES(long)
VECTOR_NAMES(ulong)
VECTOR_NAMES(bool)
#undef VECTOR_NAMES

template <class T, size_t N>
struct array {
  T elements[N];
  SHIM constexpr T& operator[](size_t i) { return elements[i]; }
  SHIM constexpr const T& operator[](size_t i) const { return elements[i]; }
  SHIM constexpr size_t size() const { return N; }
};

// The size of what a race is followed for: the scalars of a variable's type.
template <class T>
constexpr unsigned scalar_size = is_arithmetic_v<T> ? sizeof(T) : 1;
template <class T>
constexpr unsigned scalar_size<const T> = scalar_size<T>;
template <class T, int N>
constexpr unsigned scalar_size<vec<T, N>> = sizeof(T);
template <class T, size_t N>
constexpr unsigned scalar_size<T[N]> = scalar_size<T>;

}  // namespace metal
