// The check of one access to memory.
#pragma once
#include "state.h"

struct Access {
  char* address;
  unsigned bytes;
  bool reads, writes, atomic;
  uint64_t pc;  // the return address of the check
};

// Ends the launch if an access outside of the thread's own memory is not allowed.
void check_shared(const Access& access);

inline void check_access(const Access& access) {
  // Most are to what a thread has for itself.
  if (!current || (uint64_t)(access.address - current->stack) < STACK_BYTES) return;
  check_shared(access);
}

// hooks.cpp: whether the address is in the compiled kernel, which holds its constants.
bool in_program(const void* address);
