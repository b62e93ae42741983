// <metal_type_traits> and <metal_limits>.
#pragma once
#include "base.h"

namespace metal {

template <class T, T V>
struct integral_constant {
  static constexpr T value = V;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return V; }
  constexpr T operator()() const { return V; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class A, class B>
constexpr bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class From, class To>
constexpr bool is_convertible_v = __is_convertible_to(From, To);
template <class From, class To>
struct is_convertible : bool_constant<__is_convertible_to(From, To)> {};

template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
using remove_const_t = __remove_const(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
using remove_pointer_t = __remove_pointer(T);
template <class T>
using decay_t = __decay(T);
template <class...>
using void_t = void;

template <class T>
constexpr bool is_floating_point_v = is_same_v<remove_cv_t<T>, float> ||
                                     is_same_v<remove_cv_t<T>, half> ||
                                     is_same_v<remove_cv_t<T>, bfloat>;
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
constexpr bool is_signed_v = is_floating_point_v<T> || __is_signed(T);
template <class T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};

template <class T>
struct numeric_limits {};

#define INTEGER_LIMITS(T, MIN, MAX)                    \
  template <>                                          \
  struct numeric_limits<T> {                           \
    static constexpr T max() { return MAX; }           \
    static constexpr T min() { return MIN; }           \
    static constexpr T lowest() { return MIN; }        \
  };
INTEGER_LIMITS(bool, false, true)
INTEGER_LIMITS(char, -128, 127)
INTEGER_LIMITS(signed char, -128, 127)
INTEGER_LIMITS(uchar, 0, 255)
INTEGER_LIMITS(short, -32768, 32767)
INTEGER_LIMITS(ushort, 0, 65535)
INTEGER_LIMITS(int, INT_MIN, INT_MAX)
INTEGER_LIMITS(uint, 0, UINT_MAX)
INTEGER_LIMITS(long, -9223372036854775807L - 1, 9223372036854775807L)
INTEGER_LIMITS(ulong, 0, 18446744073709551615ul)
#undef INTEGER_LIMITS

#define FLOAT_LIMITS(T, MIN, MAX, EPSILON)                              \
  template <>                                                           \
  struct numeric_limits<T> {                                            \
    static constexpr T max() { return T(MAX); }                         \
    static constexpr T min() { return T(MIN); }                         \
    static constexpr T lowest() { return T(-MAX); }                     \
    static constexpr T infinity() { return T(__builtin_inff()); }       \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }    \
    static constexpr T epsilon() { return T(EPSILON); }                 \
  };
FLOAT_LIMITS(float, 1.17549435e-38f, 3.40282347e+38f, 1.1920929e-7f)
FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 0.0009765625f)
FLOAT_LIMITS(bfloat, 1.17549435e-38f, 3.38953139e+38f, 0.0078125f)
#undef FLOAT_LIMITS

// A parameter that takes its type from the others: a scalar operand becomes the element type.
template <class T>
struct same_ {
  typedef T type;
};
template <class T>
using same = typename same_<T>::type;

}  // namespace metal
