// vec<T, 2..4> as clang's own vectors, which can be in any address space; a class cannot.
//
// They do not have Metal's constructors: translate.py writes make_vector<float4>(...) for
// float4(...). Nothing here is executed, so values do not matter.
#pragma once
#include "traits.h"

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class T>
constexpr int components = 1;
template <class T, int N>
constexpr int components<vec<T, N>> = N;
template <class T>
struct component_ {
  typedef T type;
};
template <class T, int N>
struct component_<vec<T, N>> {
  typedef T type;
};

template <class To, class From>
SHIM constexpr void check_component(From value) {
  if constexpr (components<From> == 1) (void)To(value);
}

template <class V, class... A>
SHIM constexpr V make_vector(A... values) {
  constexpr int given = (0 + ... + components<A>);
  static_assert(
      given == components<V> || (given == 1 && sizeof...(A) == 1),
      "a vector of other components than given");
  (check_component<typename component_<V>::type>(values), ...);
  return V();
}

// Comparisons give vectors of integers here, bools there.
template <class T, int N>
SHIM bool all(vec<T, N>) {
  return true;
}
template <class T, int N>
SHIM bool any(vec<T, N>) {
  return true;
}
template <class T, class B, int N>
SHIM vec<T, N> select(vec<T, N> a, vec<T, N>, vec<B, N>) {
  return a;
}

}  // namespace metal
