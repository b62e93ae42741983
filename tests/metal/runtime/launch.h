// One launch, as executor's Python fills it in (runtime.py has the same structures).
#pragma once
#include <stdint.h>

#include "../shim/abi.h"

enum ErrorKind : int32_t {
  NO_ERROR,
  OUT_OF_BOUNDS_READ,
  OUT_OF_BOUNDS_WRITE,
  UNINITIALISED_READ,
  WRITE_TO_INPUT,
  RACE,
  SIMD_DIVERGENCE,
  BARRIER_DIVERGENCE,
  THREADGROUP_MEMORY,
  MISALIGNED,
  BAD_INDEX,
  BAD_LANE,
  BAD_ARITHMETIC,
  BAD_ADDRESS,
  TIMEOUT,
};

struct Error {
  int32_t kind;
  uint32_t line, other_line;  // of the kernel's text, where the runtime knows it
  uint64_t pc, other_pc;      // where it does not: of the access, and of the one it conflicts with
  char message[1024];
};

struct Buffer {
  void* data;
  uint64_t bytes;
  uint32_t element;  // bytes
  uint32_t output;   // written by the kernel, starts undefined
  uint32_t offset;   // bytes from a multiple of ALIGNMENT, as a GPU would have it
  const char* name;
  // Results, in checked mode.
  uint64_t read_total, read_distinct, written_total, written_distinct;
  uint64_t first_unwritten;  // byte
};

constexpr uint32_t ALIGNMENT = 16;  // of the largest vectors

enum Schedule : uint32_t { NATURAL, REVERSED, RANDOM, LOCKSTEP };

struct Launch {
  void (*entry)(void** buffers, const metal_abi::Position* position);
  Buffer* buffers;
  uint32_t buffer_count;
  uint32_t groups[3];
  uint32_t threads;
  uint32_t schedule;
  uint64_t seed;
  uint32_t checked;
  uint32_t threadgroup_limit;  // bytes
  double timeout;              // seconds
  // Results.
  uint64_t threadgroup_bytes;
  Error error;
};
