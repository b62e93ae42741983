// What the parts of the runtime share. One launch runs at a time, on one thread of the process.
#pragma once
#include <setjmp.h>
#include <stdint.h>

#include "launch.h"

using metal_abi::Position;
using metal_abi::SIMDGROUP;
using metal_abi::Site;
using metal_abi::Slot;

constexpr unsigned MAX_THREADS = 256;
constexpr unsigned MAX_SIMDGROUPS = MAX_THREADS / SIMDGROUP;
constexpr uint64_t STACK_BYTES = 128 << 10;

enum class State : uint8_t { READY, AT_SIMD, AT_SIMDGROUP_BARRIER, AT_THREADGROUP_BARRIER, DONE };

// A thread of the threadgroup that is running.
struct Fiber {
  void* stack_pointer;
  char* stack;
  State state;
  uint8_t turn;  // which of the simdgroup's two sets of slots it shows in next
  Position position;
  Site site;  // where it waits
  metal_abi::Combine combine;
  unsigned barrier_flags;
};

struct Simdgroup {
  // Two sets: a lane may be at the next call while others still read from this one, no further.
  Slot shown[2][SIMDGROUP], results[2][SIMDGROUP];
  Fiber* order[SIMDGROUP];  // in which its lanes run
  unsigned next;            // of order
};

// Barriers count up in one clock. Each remembers the clock for the memory that it orders.
struct Clock {
  uint32_t now;
  uint32_t group_start;
  uint32_t threadgroup_memory, device_memory;                     // the last threadgroup barriers
  uint32_t simd_threadgroup[MAX_SIMDGROUPS], simd_device[MAX_SIMDGROUPS];  // simdgroup barriers
};

extern Launch* launch;
extern Fiber fibers[MAX_THREADS];
extern Fiber* current;  // null while the scheduler runs
extern Clock barriers;
extern sigjmp_buf on_error;
extern char* stacks;  // MAX_THREADS of STACK_BYTES

// error.cpp: end the launch.
[[noreturn]] void fail(ErrorKind kind, uint64_t pc, uint64_t other_pc, const char* format, ...)
    __attribute__((format(printf, 4, 5)));
[[noreturn]] void fail_at(ErrorKind kind, unsigned line, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
const char* describe(const Fiber* fiber);  // "thread 3 of threadgroup (0, 1, 0)"

// scheduler.cpp
void start_stacks();
void run_launch();

// memory.cpp
void map_buffers(void** addresses);
void unmap_buffers();
void start_threadgroup_memory();  // of a launch
void clear_threadgroup_memory();  // before each threadgroup
void explain_address(const char* address, char* text, uint64_t bytes);
