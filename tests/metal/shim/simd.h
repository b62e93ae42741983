// <metal_simdgroup>, <metal_quadgroup>, barriers: what the threads of a simdgroup do together.
#pragma once
#include "math.h"

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

SHIM void threadgroup_barrier(mem_flags flags, CALL_SITE) {
  metal_barrier(metal_abi::SCOPE_THREADGROUP, uint(flags), {"threadgroup_barrier", line, column});
}
SHIM void simdgroup_barrier(mem_flags flags, CALL_SITE) {
  metal_barrier(metal_abi::SCOPE_SIMDGROUP, uint(flags), {"simdgroup_barrier", line, column});
}

namespace shim {

using metal_abi::Meeting, metal_abi::SIMDGROUP, metal_abi::Site, metal_abi::Slot;

template <class T>
struct can_share : bool_constant<is_arithmetic_v<T> && !is_same_v<T, bool> && sizeof(T) <= 4> {};
template <class T, int N>
struct can_share<vec<T, N>> : can_share<T> {};

template <class T>
SHIM Slot to_slot(const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot));
  Slot slot;
  __builtin_memcpy(slot.bytes, &value, sizeof(T));
  return slot;
}
template <class T>
SHIM T from_slot(const Slot& slot) {
  T value;
  __builtin_memcpy(&value, slot.bytes, sizeof(T));
  return value;
}

// What a lane reads after a meeting.
template <class T>
UNCHECKED T from_lane(Meeting meeting, uint lane) {
  return from_slot<T>(meeting.slots[lane]);
}
template <class T>
SHIM T own_result(Meeting meeting) {
  return from_lane<T>(meeting, meeting.lane);
}

template <class T>
SHIM Meeting meet(const T& value, metal_abi::Combine combine, Site site) {
  static_assert(can_share<T>::value, "a type that SIMD-group functions do not take");
  Slot slot = to_slot(value);
  return metal_meet(&slot, combine, site);
}

// What another lane shows; it has to be one of the simdgroup.
template <class T>
SHIM T from_exactly(Meeting meeting, int lane, Site site) {
#ifdef CHECKED
  if (lane < 0 || lane >= int(SIMDGROUP)) metal_bad_lane(lane, site);
#endif
  return from_lane<T>(meeting, uint(lane));
}
// For shifts, past whose ends a lane keeps its own value.
template <class T>
SHIM T from_lane_or_own(Meeting meeting, int lane, Site) {
  bool inside = lane >= 0 && lane < int(SIMDGROUP);
  return from_lane<T>(meeting, inside ? uint(lane) : meeting.lane);
}

// The whole simdgroup's result, in the order of a butterfly: neighbours first (xor 1, 2, 4, ...).
template <class T, class Operation>
UNCHECKED void reduce(const Slot* shown, Slot* results) {
  T values[SIMDGROUP];
  for (uint i = 0; i < SIMDGROUP; i++) values[i] = from_slot<T>(shown[i]);
  for (uint step = 1; step < SIMDGROUP; step *= 2)
    for (uint i = 0; i < SIMDGROUP; i += 2 * step)
      values[i] = Operation::apply(values[i], values[i + step]);
  for (uint i = 0; i < SIMDGROUP; i++) results[i] = to_slot(values[0]);
}
template <class T, class Operation>
UNCHECKED void reduce_quads(const Slot* shown, Slot* results) {
  for (uint i = 0; i < SIMDGROUP; i += 4) {
    T low = Operation::apply(from_slot<T>(shown[i]), from_slot<T>(shown[i + 1]));
    T high = Operation::apply(from_slot<T>(shown[i + 2]), from_slot<T>(shown[i + 3]));
    for (uint j = 0; j < 4; j++) results[i + j] = to_slot(T(Operation::apply(low, high)));
  }
}
template <class T, class Operation>
UNCHECKED void scan_inclusive(const Slot* shown, Slot* results) {
  T value = Operation::template start<T>();
  for (uint i = 0; i < SIMDGROUP; i++) {
    value = Operation::apply(value, from_slot<T>(shown[i]));
    results[i] = to_slot(value);
  }
}
template <class T, class Operation>
UNCHECKED void scan_exclusive(const Slot* shown, Slot* results) {
  T value = Operation::template start<T>();
  for (uint i = 0; i < SIMDGROUP; i++) {
    results[i] = to_slot(value);
    value = Operation::apply(value, from_slot<T>(shown[i]));
  }
}
UNCHECKED void collect(const Slot* shown, Slot* results) {
  ulong votes = 0;
  for (uint i = 0; i < SIMDGROUP; i++) votes |= ulong(from_slot<uint>(shown[i]) != 0) << i;
  for (uint i = 0; i < SIMDGROUP; i++) results[i] = to_slot(votes);
}

#define OPERATION(NAME, VALUE, START)            \
  struct NAME {                                  \
    template <class T>                           \
    SHIM static T apply(T a, T b) {    \
      return T(VALUE);                           \
    }                                            \
    template <class T>                           \
    SHIM static T start() {            \
      return T(START);                           \
    }                                            \
  };
OPERATION(Sum, a + b, 0)
OPERATION(Product, a * b, 1)
OPERATION(Max, metal::max(a, b), 0)
OPERATION(Min, metal::min(a, b), 0)
OPERATION(And, a & b, 0)
OPERATION(Or, a | b, 0)
OPERATION(Xor, a ^ b, 0)
#undef OPERATION

}  // namespace shim

#define TOGETHER(NAME, COMBINE, OPERATION)                                           \
  template <class T>                                                                 \
  SHIM T NAME(T value, CALL_SITE) {                                                  \
    return shim::own_result<T>(                                                      \
        shim::meet(value, shim::COMBINE<T, shim::OPERATION>, {#NAME, line, column})); \
  }
TOGETHER(simd_sum, reduce, Sum)
TOGETHER(simd_product, reduce, Product)
TOGETHER(simd_max, reduce, Max)
TOGETHER(simd_min, reduce, Min)
TOGETHER(simd_and, reduce, And)
TOGETHER(simd_or, reduce, Or)
TOGETHER(simd_xor, reduce, Xor)
TOGETHER(simd_prefix_inclusive_sum, scan_inclusive, Sum)
TOGETHER(simd_prefix_exclusive_sum, scan_exclusive, Sum)
TOGETHER(simd_prefix_inclusive_product, scan_inclusive, Product)
TOGETHER(simd_prefix_exclusive_product, scan_exclusive, Product)
TOGETHER(quad_sum, reduce_quads, Sum)
TOGETHER(quad_product, reduce_quads, Product)
TOGETHER(quad_max, reduce_quads, Max)
TOGETHER(quad_min, reduce_quads, Min)
#undef TOGETHER

// LANE: the one that is read; `own` is this lane, `n` the argument.
#define FROM_LANE(NAME, READ, LANE)                               \
  template <class T>                                              \
  SHIM T NAME(T value, ushort n, CALL_SITE) {                     \
    shim::Site site = {#NAME, line, column};                      \
    shim::Meeting meeting = shim::meet(value, nullptr, site);     \
    [[maybe_unused]] int own = int(meeting.lane);                 \
    return shim::READ<T>(meeting, LANE, site);                    \
  }
FROM_LANE(simd_shuffle, from_exactly, n)
FROM_LANE(simd_broadcast, from_exactly, n)
FROM_LANE(simd_shuffle_xor, from_exactly, own ^ n)
FROM_LANE(simd_shuffle_down, from_lane_or_own, own + n)
FROM_LANE(simd_shuffle_up, from_lane_or_own, own - n)
FROM_LANE(simd_shuffle_rotate_down, from_exactly, (own + n) % 32)
FROM_LANE(simd_shuffle_rotate_up, from_exactly, (own - n) & 31)
FROM_LANE(quad_shuffle, from_exactly, (own & ~3) + n)
FROM_LANE(quad_broadcast, from_exactly, (own & ~3) + n)
FROM_LANE(quad_shuffle_xor, from_exactly, own ^ n)
#undef FROM_LANE

template <class T>
SHIM T simd_broadcast_first(T value, CALL_SITE) {
  return shim::from_lane<T>(shim::meet(value, nullptr, {"simd_broadcast_first", line, column}), 0);
}
// All lanes are always active: a call that only some reach is an error.
SHIM bool simd_is_first() { return metal_lane() == 0; }

struct simd_vote {
  typedef ulong vote_t;
  vote_t votes;
  SHIM explicit constexpr simd_vote(vote_t v = 0) : votes(v) {}
  SHIM explicit constexpr operator vote_t() const { return votes; }
  SHIM constexpr bool all() const { return votes == 0xffffffffu; }
  SHIM constexpr bool any() const { return votes != 0; }
};
namespace shim {
SHIM simd_vote votes(bool vote, Site site) {
  return simd_vote(own_result<ulong>(meet(uint(vote), collect, site)));
}
}  // namespace shim
SHIM simd_vote simd_ballot(bool vote, CALL_SITE) {
  return shim::votes(vote, {"simd_ballot", line, column});
}
SHIM bool simd_any(bool vote, CALL_SITE) {
  return shim::votes(vote, {"simd_any", line, column}).any();
}
SHIM bool simd_all(bool vote, CALL_SITE) {
  return shim::votes(vote, {"simd_all", line, column}).all();
}

}  // namespace metal
