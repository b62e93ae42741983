// The calls that clang's -fsanitize=thread,array-bounds,... puts into a kernel. They come here
// instead of to the sanitizers' own runtimes: an access is checked by what we know of the kernel.
#include <string.h>

#include "memory.h"

#define PC ((uint64_t)__builtin_return_address(0))

static void check_read(const void* address, unsigned bytes, uint64_t pc) {
  check_access({(char*)address, bytes, true, false, false, pc});
}

static void check_write(const void* address, unsigned bytes, uint64_t pc) {
  check_access({(char*)address, bytes, false, true, false, pc});
}

#define ACCESS_HOOKS(N)                                                              \
  void __tsan_read##N(void* address) { check_read(address, N, PC); }                 \
  void __tsan_write##N(void* address) { check_write(address, N, PC); }               \
  void __tsan_unaligned_read##N(void* address) { check_read(address, N, PC); }       \
  void __tsan_unaligned_write##N(void* address) { check_write(address, N, PC); }     \
  void __tsan_volatile_read##N(void* address) { check_read(address, N, PC); }        \
  void __tsan_volatile_write##N(void* address) { check_write(address, N, PC); }      \
  void __tsan_read_write##N(void* address) {                                         \
    check_read(address, N, PC);                                                      \
    check_write(address, N, PC);                                                     \
  }                                                                                  \
  void __tsan_unaligned_read_write##N(void* address) {                               \
    check_read(address, N, PC);                                                      \
    check_write(address, N, PC);                                                     \
  }

extern "C" {
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)

void __tsan_read_range(void* address, uint64_t bytes) { check_read(address, bytes, PC); }
void __tsan_write_range(void* address, uint64_t bytes) { check_write(address, bytes, PC); }

void* __tsan_memcpy(void* to, const void* from, uint64_t bytes) {
  check_read(from, bytes, PC);
  check_write(to, bytes, PC);
  return memcpy(to, from, bytes);
}

void* __tsan_memmove(void* to, const void* from, uint64_t bytes) {
  check_read(from, bytes, PC);
  check_write(to, bytes, PC);
  return memmove(to, from, bytes);
}

void* __tsan_memset(void* to, int value, uint64_t bytes) {
  check_write(to, bytes, PC);
  return memset(to, value, bytes);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// ---- undefined behaviour; what these get begins with the place in the text ----

struct Place {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, facts;
  char name[];  // in quotes
};
struct IndexPlace : Place {
  const Type *array, *index;
};

void __ubsan_handle_out_of_bounds_abort(IndexPlace* place, uint64_t index) {
  if (current)
    fail_at(
        BAD_INDEX, place->line, "index %lld of an array of type %s by %s", (long long)index,
        place->array->name, describe(current));
}

void __ubsan_handle_type_mismatch_v1_abort(Place* place, uint64_t address) {
  if (current)
    fail_at(
        MISALIGNED, place->line, "access at address %s alignment, by %s",
        address ? "not a multiple of its type's" : "null, which has no", describe(current));
}

void __ubsan_handle_divrem_overflow_abort(Place* place, uint64_t, uint64_t) {
  if (current)
    fail_at(BAD_ARITHMETIC, place->line, "integer division by zero by %s", describe(current));
}

void metal_misaligned(const void* address, unsigned alignment) {
  // Not for the thread's own variables: the compiler may copy those in parts.
  if (current && (uint64_t)((const char*)address - stacks) >= MAX_THREADS * STACK_BYTES)
    fail(
        MISALIGNED, PC, 0, "access to a vector at an address not a multiple of %u, by %s",
        alignment, describe(current));
}

void metal_bad_lane(int lane, Site site) {
  fail_at(
      BAD_LANE, site.line, "%s reads lane %d, of 32, by %s", site.what, lane, describe(current));
}

// ---- a conversion that most CPUs have no instruction for ----

__bf16 __truncsfbf2(float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return __builtin_bit_cast(__bf16, (uint16_t)(nan ? bits >> 16 | 0x40 : rounded >> 16));
}

}
