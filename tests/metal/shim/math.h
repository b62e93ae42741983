// <metal_math>, <metal_integer>, <metal_geometric>, <metal_relational>, <metal_common>.
//
// precise:: and fast:: are the same here: libm's results, rounded once to half or bfloat.
#pragma once
#include "vectors.h"

namespace metal {

#define EACH_1(NAME)                                                        \
  template <class T, int N>                                                 \
  SHIM auto NAME(vec<T, N> a) {                                             \
    vec<decltype(NAME(a[0])), N> result;                           \
    for (int i = 0; i < N; i++) result[i] = NAME(a[i]);   \
    return result;                                                          \
  }
#define EACH_2(NAME)                                                                 \
  template <class T, int N>                                                          \
  SHIM vec<T, N> NAME(vec<T, N> a, vec<T, N> b) {                                    \
    for (int i = 0; i < N; i++) a[i] = NAME(a[i], b[i]);  \
    return a;                                                                        \
  }                                                                                  \
  template <class T, int N>                                                          \
  SHIM vec<T, N> NAME(vec<T, N> a, same<T> b) {                                      \
    return NAME(a, vec<T, N>(b));                                                    \
  }
#define EACH_3(NAME)                                                      \
  template <class T, int N>                                               \
  SHIM vec<T, N> NAME(vec<T, N> a, vec<T, N> b, vec<T, N> c) {            \
    for (int i = 0; i < N; i++)                                           \
      a[i] = NAME(a[i], b[i], c[i]);  \
    return a;                                                             \
  }                                                                       \
  template <class T, int N>                                               \
  SHIM vec<T, N> NAME(vec<T, N> a, same<T> b, same<T> c) {                \
    return NAME(a, vec<T, N>(b), vec<T, N>(c));                           \
  }

// A function of floats, whose half and bfloat forms compute in float and round.
#define FLOAT_1(NAME, VALUE)                                       \
  SHIM float NAME(float x) { return VALUE; }                       \
  SHIM half NAME(half x) { return half(NAME(float(x))); }          \
  SHIM bfloat NAME(bfloat x) { return bfloat(NAME(float(x))); }    \
  EACH_1(NAME)
#define FLOAT_2(NAME, VALUE)                                                             \
  SHIM float NAME(float x, float y) { return VALUE; }                                    \
  SHIM half NAME(half x, half y) { return half(NAME(float(x), float(y))); }              \
  SHIM bfloat NAME(bfloat x, bfloat y) { return bfloat(NAME(float(x), float(y))); }      \
  EACH_2(NAME)
#define FLOAT_3(NAME, VALUE)                                         \
  SHIM float NAME(float x, float y, float z) { return VALUE; }       \
  SHIM half NAME(half x, half y, half z) {                           \
    return half(NAME(float(x), float(y), float(z)));                 \
  }                                                                  \
  SHIM bfloat NAME(bfloat x, bfloat y, bfloat z) {                   \
    return bfloat(NAME(float(x), float(y), float(z)));               \
  }                                                                  \
  EACH_3(NAME)
#define TEST_1(NAME, VALUE)                                        \
  SHIM bool NAME(float x) { return VALUE; }                        \
  SHIM bool NAME(half x) { return NAME(float(x)); }                \
  SHIM bool NAME(bfloat x) { return NAME(float(x)); }              \
  EACH_1(NAME)

#define FLOAT_FUNCTIONS                                                   \
  FLOAT_1(acos, __builtin_acosf(x))                                       \
  FLOAT_1(asin, __builtin_asinf(x))                                       \
  FLOAT_1(atan, __builtin_atanf(x))                                       \
  FLOAT_1(ceil, __builtin_ceilf(x))                                       \
  FLOAT_1(cos, __builtin_cosf(x))                                         \
  FLOAT_1(cosh, __builtin_coshf(x))                                       \
  FLOAT_1(cospi, __builtin_cosf(M_PI_F * x))                              \
  FLOAT_1(exp, __builtin_expf(x))                                         \
  FLOAT_1(exp2, __builtin_exp2f(x))                                       \
  FLOAT_1(exp10, __builtin_powf(10.0f, x))                                \
  FLOAT_1(fabs, __builtin_fabsf(x))                                       \
  FLOAT_1(abs, __builtin_fabsf(x))                                        \
  FLOAT_1(floor, __builtin_floorf(x))                                     \
  FLOAT_1(fract, (x - __builtin_floorf(x)))                               \
  FLOAT_1(log, __builtin_logf(x))                                         \
  FLOAT_1(log2, __builtin_log2f(x))                                       \
  FLOAT_1(log10, __builtin_log10f(x))                                     \
  FLOAT_1(rint, __builtin_rintf(x))                                       \
  FLOAT_1(round, __builtin_roundf(x))                                     \
  FLOAT_1(rsqrt, (1.0f / __builtin_sqrtf(x)))                             \
  FLOAT_1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))      \
  FLOAT_1(sign, (x > 0 ? 1.0f : x < 0 ? -1.0f : x * 0.0f))                \
  FLOAT_1(sin, __builtin_sinf(x))                                         \
  FLOAT_1(sinh, __builtin_sinhf(x))                                       \
  FLOAT_1(sinpi, __builtin_sinf(M_PI_F * x))                              \
  FLOAT_1(sqrt, __builtin_sqrtf(x))                                       \
  FLOAT_1(tan, __builtin_tanf(x))                                         \
  FLOAT_1(tanh, __builtin_tanhf(x))                                       \
  FLOAT_1(trunc, __builtin_truncf(x))                                     \
  FLOAT_2(atan2, __builtin_atan2f(x, y))                                  \
  FLOAT_2(copysign, __builtin_copysignf(x, y))                            \
  FLOAT_2(divide, (x / y))                                                \
  FLOAT_2(fmax, __builtin_fmaxf(x, y))                                    \
  FLOAT_2(fmin, __builtin_fminf(x, y))                                    \
  FLOAT_2(max, __builtin_fmaxf(x, y))                                     \
  FLOAT_2(min, __builtin_fminf(x, y))                                     \
  FLOAT_2(fmod, __builtin_fmodf(x, y))                                    \
  FLOAT_2(pow, __builtin_powf(x, y))                                      \
  FLOAT_2(powr, __builtin_powf(x, y))                                     \
  FLOAT_2(step, (y < x ? 0.0f : 1.0f))                                    \
  FLOAT_3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))               \
  FLOAT_3(fma, __builtin_fmaf(x, y, z))                                   \
  FLOAT_3(mix, (x + (y - x) * z))                                         \
  SHIM float sincos(float x, float& cosine) {                             \
    cosine = __builtin_cosf(x);                                           \
    return __builtin_sinf(x);                                             \
  }
FLOAT_FUNCTIONS
namespace fast {
FLOAT_FUNCTIONS
}
namespace precise {
FLOAT_FUNCTIONS
}
TEST_1(isnan, __builtin_isnan(x))
TEST_1(isinf, __builtin_isinf(x))
TEST_1(isfinite, __builtin_isfinite(x))
TEST_1(signbit, __builtin_signbit(x))
SHIM float ldexp(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
SHIM float frexp(float x, int& exponent) { return __builtin_frexpf(x, &exponent); }
SHIM float modf(float x, float& whole) { return __builtin_modff(x, &whole); }
SHIM int ilogb(float x) { return __builtin_ilogbf(x); }

// ---- integers ----

#define INTEGER_FUNCTIONS(T, UNSIGNED)                                                \
  SHIM T max(T a, T b) { return a > b ? a : b; }                                      \
  SHIM T min(T a, T b) { return a < b ? a : b; }                                      \
  SHIM T clamp(T x, T low, T high) { return x < low ? low : x > high ? high : x; }    \
  SHIM T absdiff(T a, T b) { return a > b ? T(a - b) : T(b - a); }                    \
  SHIM T popcount(T x) { return T(__builtin_popcountll(UNSIGNED(x))); }               \
  SHIM T clz(T x) {                                                                   \
    constexpr int bits = 8 * sizeof(T);                                               \
    return T(x ? __builtin_clzll(UNSIGNED(x)) - (64 - bits) : bits);                  \
  }                                                                                   \
  SHIM T ctz(T x) { return T(x ? __builtin_ctzll(UNSIGNED(x)) : 8 * int(sizeof(T))); } \
  SHIM T rotate(T x, T by) {                                                          \
    constexpr uint bits = 8 * sizeof(T);                                              \
    uint n = uint(by) % bits;                                                         \
    return n ? T(UNSIGNED(x) << n | UNSIGNED(x) >> (bits - n)) : x;                   \
  }                                                                                   \
  SHIM T extract_bits(T x, uint offset, uint count) {                                 \
    constexpr uint bits = 8 * sizeof(T);                                              \
    if (count == 0) return T(0);                                                      \
    return T(T(UNSIGNED(x) << (bits - offset - count)) >> (bits - count));            \
  }                                                                                   \
  SHIM T insert_bits(T base, T bits, uint offset, uint count) {                       \
    UNSIGNED ones = count >= 8 * sizeof(T) ? ~UNSIGNED(0) : (UNSIGNED(1) << count) - 1; \
    UNSIGNED mask = ones << offset;                                                   \
    return T((UNSIGNED(base) & ~mask) | (UNSIGNED(bits) << offset & mask));           \
  }
INTEGER_FUNCTIONS(char, uchar)
INTEGER_FUNCTIONS(int8_t, uchar)
INTEGER_FUNCTIONS(uchar, uchar)
INTEGER_FUNCTIONS(short, ushort)
INTEGER_FUNCTIONS(ushort, ushort)
INTEGER_FUNCTIONS(int, uint)
INTEGER_FUNCTIONS(uint, uint)
INTEGER_FUNCTIONS(long, ulong)
INTEGER_FUNCTIONS(ulong, ulong)
#undef INTEGER_FUNCTIONS
EACH_1(popcount)
EACH_1(clz)
EACH_1(ctz)
SHIM int abs(int x) { return x < 0 ? -x : x; }
SHIM short abs(short x) { return short(x < 0 ? -x : x); }
SHIM long abs(long x) { return x < 0 ? -x : x; }
SHIM uint abs(uint x) { return x; }
SHIM uint mulhi(uint a, uint b) { return uint(ulong(a) * b >> 32); }
SHIM int mulhi(int a, int b) { return int(long(a) * b >> 32); }
SHIM int mul24(int a, int b) { return a * b; }
SHIM uint mul24(uint a, uint b) { return a * b; }
SHIM int mad24(int a, int b, int c) { return a * b + c; }
SHIM uint mad24(uint a, uint b, uint c) { return a * b + c; }
SHIM uint addsat(uint a, uint b) { return a + b < a ? UINT_MAX : a + b; }
SHIM uint subsat(uint a, uint b) { return a < b ? 0 : a - b; }
template <class T>
SHIM T max3(T a, T b, T c) {
  return max(max(a, b), c);
}
template <class T>
SHIM T min3(T a, T b, T c) {
  return min(min(a, b), c);
}
template <class T>
SHIM T median3(T a, T b, T c) {
  return max(min(a, b), min(max(a, b), c));
}

// ---- relational and geometric ----

template <class T>
SHIM enable_if_t<is_arithmetic_v<T>, T> select(T a, T b, bool second) {
  return second ? b : a;
}
#ifndef SPACES
template <class T, int N>
SHIM vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> second) {
  for (int i = 0; i < N; i++)
    if (second[i]) a[i] = b[i];
  return a;
}
template <int N>
SHIM bool all(vec<bool, N> a) {
  bool result = true;
  for (int i = 0; i < N; i++) result = result && a[i];
  return result;
}
template <int N>
SHIM bool any(vec<bool, N> a) {
  bool result = false;
  for (int i = 0; i < N; i++) result = result || a[i];
  return result;
}
#endif
template <class T, int N>
SHIM T dot(vec<T, N> a, vec<T, N> b) {
  T result = T(a[0] * b[0]);
  for (int i = 1; i < N; i++) result = T(result + a[i] * b[i]);
  return result;
}
template <class T, int N>
SHIM T length_squared(vec<T, N> a) {
  return dot(a, a);
}
template <class T, int N>
SHIM T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <class T, int N>
SHIM T distance(vec<T, N> a, vec<T, N> b) {
  return length(a - b);
}
template <class T, int N>
SHIM vec<T, N> normalize(vec<T, N> a) {
  return a * rsqrt(dot(a, a));
}

}  // namespace metal
