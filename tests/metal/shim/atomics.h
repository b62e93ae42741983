// <metal_atomic>, relaxed as all of Metal's. Only one thread runs at a time: plain memory does.
#pragma once
#include "simd.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T value;
};
template <class T>
using _atomic = atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
template <class T>
constexpr unsigned scalar_size<atomic<T>> = sizeof(T);

namespace shim {
enum AtomicOperation { EXCHANGE, ADD, SUB, MAX, MIN, AND, OR, XOR };

// What is not instrumented is checked here.
template <class P>
SHIM void check([[maybe_unused]] P* object, [[maybe_unused]] metal_abi::AtomicKind kind) {
#ifdef CHECKED
  metal_check_atomic((const void*)object, sizeof(*object), kind);
#endif
}

template <AtomicOperation OPERATION, class T>
SHIM T updated(T before, T operand) {
  if constexpr (OPERATION == EXCHANGE) return operand;
  if constexpr (OPERATION == ADD) return T(before + operand);
  if constexpr (OPERATION == SUB) return T(before - operand);
  if constexpr (OPERATION == MAX) return before > operand ? before : operand;
  if constexpr (OPERATION == MIN) return before < operand ? before : operand;
  if constexpr (OPERATION == AND) return before & operand;
  if constexpr (OPERATION == OR) return before | operand;
  if constexpr (OPERATION == XOR) return before ^ operand;
}
}  // namespace shim

#define ATOMIC_UPDATE_AS(NAME, OPERATION, SPACE)                                      \
  template <class T>                                                                  \
  SHIM T NAME(volatile SPACE atomic<T>* object, same<T> operand, memory_order) {      \
    shim::check(object, metal_abi::ATOMIC_UPDATE);     \
    T before = shim::get(object);                                                     \
    shim::set(object, shim::updated<shim::OPERATION>(before, T(operand)));            \
    return before;                                                                    \
  }
#define ATOMICS(SPACE)                                                                        \
  namespace shim {                                                                            \
  template <class T>                                                                          \
  UNCHECKED T get(const volatile SPACE atomic<T>* object) {                                   \
    return object->value;                                                                     \
  }                                                                                           \
  template <class T>                                                                          \
  UNCHECKED void set(volatile SPACE atomic<T>* object, T value) {                             \
    object->value = value;                                                                    \
  }                                                                                           \
  }                                                                                           \
  template <class T>                                                                          \
  SHIM T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order) {         \
    shim::check(object, metal_abi::ATOMIC_LOAD);               \
    return shim::get(object);                                                                 \
  }                                                                                           \
  template <class T>                                                                          \
  SHIM void atomic_store_explicit(                                                            \
      volatile SPACE atomic<T>* object, same<T> value, memory_order) {                        \
    shim::check(object, metal_abi::ATOMIC_STORE);              \
    shim::set(object, T(value));                                                              \
  }                                                                                           \
  ATOMIC_UPDATE_AS(atomic_exchange_explicit, EXCHANGE, SPACE)                                 \
  ATOMIC_UPDATE_AS(atomic_fetch_add_explicit, ADD, SPACE)                                     \
  ATOMIC_UPDATE_AS(atomic_fetch_sub_explicit, SUB, SPACE)                                     \
  ATOMIC_UPDATE_AS(atomic_fetch_max_explicit, MAX, SPACE)                                     \
  ATOMIC_UPDATE_AS(atomic_fetch_min_explicit, MIN, SPACE)                                     \
  ATOMIC_UPDATE_AS(atomic_fetch_and_explicit, AND, SPACE)                                     \
  ATOMIC_UPDATE_AS(atomic_fetch_or_explicit, OR, SPACE)                                       \
  ATOMIC_UPDATE_AS(atomic_fetch_xor_explicit, XOR, SPACE)                                     \
  template <class T>                                                                          \
  SHIM bool atomic_compare_exchange_weak_explicit(                                            \
      volatile SPACE atomic<T>* object, T* expected, same<T> desired, memory_order,           \
      memory_order) {                                                                         \
    shim::check(object, metal_abi::ATOMIC_UPDATE);             \
    T before = shim::get(object);                                                             \
    bool equal = __builtin_memcmp(&before, expected, sizeof(T)) == 0;                         \
    if (equal)                                                                                \
      shim::set(object, T(desired));                                                          \
    else                                                                                      \
      *expected = before;                                                                     \
    return equal;                                                                             \
  }
EACH_SPACE(ATOMICS)
#undef ATOMICS
#undef ATOMIC_UPDATE_AS

}  // namespace metal
