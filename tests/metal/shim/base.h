// Metal's words and scalar types as C++. No header of libc or the C++ library is included anywhere
// in the shim, so that exp, max, abs, ... are Metal's overloads or an error.
#pragma once
#include "abi.h"

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define __HAVE_BFLOAT__ 1
#define METAL_FUNC inline __attribute__((always_inline))

// Functions of the shim. nodebug: an access in them counts as one at the kernel's line that calls.
#define SHIM inline __attribute__((always_inline, nodebug))
// Those whose accesses to memory are not the kernel's. Inlined, they would be.
#ifdef CHECKED
#define UNCHECKED \
  inline __attribute__((noinline, nodebug, no_sanitize("thread", "bounds", "alignment")))
#else
#define UNCHECKED SHIM
#endif

#ifdef SPACES  // only compiled, to check them
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else  // only executed: all memory is one
#define device
#define constant const
#define threadgroup
#endif
#ifdef SPACES
#define EACH_SPACE(DEFINE) DEFINE(device) DEFINE(threadgroup)
#else
#define EACH_SPACE(DEFINE) DEFINE()
#endif
#define thread  // where a pointer points that says nothing; check_text.py wants it said
#define kernel

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned long uintptr_t;
typedef _Float16 half;
typedef __bf16 bfloat;

constexpr half operator""h(long double value) { return half(value); }
constexpr half operator""h(unsigned long long value) { return half(value); }

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.40282347e+38f
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define HALF_MAX half(65504.0f)
#define HALF_MIN half(6.103515625e-05f)
#define HALF_EPSILON half(0.0009765625f)
#define CHAR_BIT 8
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_SQRT2_F 1.41421356237309504880f
#define M_1_PI_F 0.318309886183790671538f
#define M_PI_2_F 1.57079632679489661923f

// The caller's place, as default arguments.
#define CALL_SITE unsigned line = __builtin_LINE(), unsigned column = __builtin_COLUMN()

template <class To, class From>
SHIM To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To result;  // not __builtin_bit_cast: vectors have copy constructors when they are checked
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

namespace metal {
using ::as_type, ::bfloat, ::half, ::size_t, ::uchar, ::uint, ::ulong, ::ushort;
}
