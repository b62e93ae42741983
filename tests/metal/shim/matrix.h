// <metal_simdgroup_matrix>: 8x8 matrices of which each lane holds two neighbours of a row.
#pragma once
#include "simd.h"

namespace metal {

namespace shim {
// Where a lane's two elements are, on Apple's GPUs: at (row, column) and (row, column + 1).
SHIM constexpr int row_of(uint lane) { return int((lane / 4 & 4) + lane / 2 % 4); }
SHIM constexpr int column_of(uint lane) { return int((lane / 4 & 2) * 2 + lane % 2 * 2); }
}  // namespace shim

template <class T, int COLUMNS, int ROWS>
struct simdgroup_matrix {
  static_assert(COLUMNS == 8 && ROWS == 8, "simdgroup matrices are 8x8");
  static_assert(is_floating_point_v<T>);
  vec<T, 2> own;
  simdgroup_matrix() = default;
  SHIM explicit simdgroup_matrix(T diagonal) {
    uint lane = metal_lane();
    int distance = shim::row_of(lane) - shim::column_of(lane);
    own.x = distance == 0 ? diagonal : T(0);
    own.y = distance == 1 ? diagonal : T(0);
  }
  SHIM vec<T, 2>& thread_elements() { return own; }
  SHIM const vec<T, 2>& thread_elements() const { return own; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int COLUMNS, int ROWS>
SHIM simdgroup_matrix<T, COLUMNS, ROWS> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, COLUMNS, ROWS> matrix;
  matrix.own = vec<T, 2>(value);
  return matrix;
}

namespace shim {

struct Pairs {  // of one lane: of a, of b and of c
  float a[2], b[2], c[2];
};
template <>
struct can_share<Pairs> : true_type {};

// The index of (row, column) of a matrix in memory.
SHIM long place(long row, long column, ulong stride, ulong2 origin, bool transposed) {
  if (transposed) return (long(origin.x) + column) * long(stride) + long(origin.y) + row;
  return (long(origin.y) + row) * long(stride) + long(origin.x) + column;
}

// A load or store shows nothing, but all lanes have to be there. Only checked, as it costs time.
SHIM void meet_for_matrix([[maybe_unused]] Site site) {
#ifdef CHECKED
  meet(0u, nullptr, site);
#endif
}

// c + a b: each element a chain of fused multiply-adds in float, in the order of a's columns.
UNCHECKED void multiply_accumulate(const Slot* shown, Slot* results) {
  float a[8][8], b[8][8], c[8][8];
  for (uint lane = 0; lane < SIMDGROUP; lane++) {
    Pairs pairs = from_slot<Pairs>(shown[lane]);
    int row = row_of(lane), column = column_of(lane);
    for (int j = 0; j < 2; j++) {
      a[row][column + j] = pairs.a[j];
      b[row][column + j] = pairs.b[j];
      c[row][column + j] = pairs.c[j];
    }
  }
  for (int row = 0; row < 8; row++)
    for (int k = 0; k < 8; k++)
      for (int column = 0; column < 8; column++)
        c[row][column] = __builtin_fmaf(a[row][k], b[k][column], c[row][column]);
  for (uint lane = 0; lane < SIMDGROUP; lane++) {
    Pairs pairs;
    for (int j = 0; j < 2; j++) pairs.c[j] = c[row_of(lane)][column_of(lane) + j];
    results[lane] = to_slot(pairs);
  }
}

template <class D, class A, class B, class C>
SHIM void multiply(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b, C c0, C c1, Site site) {
  Pairs pairs = {{float(a.own.x), float(a.own.y)},
                 {float(b.own.x), float(b.own.y)},
                 {float(c0), float(c1)}};
  pairs = own_result<Pairs>(meet(pairs, multiply_accumulate, site));
  d.own.x = D(pairs.c[0]);
  d.own.y = D(pairs.c[1]);
}

}  // namespace shim

#define MATRIX_MEMORY(SPACE)                                                                      \
  template <class T>                                                                              \
  SHIM void simdgroup_load(                                                                       \
      simdgroup_matrix<T, 8, 8>& matrix, const SPACE T* from, ulong stride = 8,                   \
      ulong2 origin = ulong2(0), bool transposed = false, CALL_SITE) {                            \
    shim::meet_for_matrix({"simdgroup_load", line, column});                                      \
    uint lane = metal_lane();                                                                     \
    long r = shim::row_of(lane), c = shim::column_of(lane);                                       \
    matrix.own.x = from[shim::place(r, c, stride, origin, transposed)];                           \
    matrix.own.y = from[shim::place(r, c + 1, stride, origin, transposed)];                       \
  }                                                                                               \
  template <class T>                                                                              \
  SHIM void simdgroup_store(                                                                      \
      const simdgroup_matrix<T, 8, 8>& matrix, SPACE T* to, ulong stride = 8,                     \
      ulong2 origin = ulong2(0), bool transposed = false, CALL_SITE) {                            \
    shim::meet_for_matrix({"simdgroup_store", line, column});                                     \
    uint lane = metal_lane();                                                                     \
    long r = shim::row_of(lane), c = shim::column_of(lane);                                       \
    to[shim::place(r, c, stride, origin, transposed)] = matrix.own.x;                             \
    to[shim::place(r, c + 1, stride, origin, transposed)] = matrix.own.y;                         \
  }
EACH_SPACE(MATRIX_MEMORY)
#undef MATRIX_MEMORY

template <class D, class A, class B, class C>
SHIM void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, CALL_SITE) {
  shim::multiply(d, a, b, c.own.x, c.own.y, {"simdgroup_multiply_accumulate", line, column});
}

template <class D, class A, class B>
SHIM void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b, CALL_SITE) {
  shim::multiply(d, a, b, 0.0f, 0.0f, {"simdgroup_multiply", line, column});
}

}  // namespace metal
