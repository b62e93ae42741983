#include "fiber.h"

#include <stdint.h>

#if defined(__x86_64__)

asm(R"(
.text
.globl metal_switch
.type metal_switch, @function
metal_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

void* new_stack(char* top, void (*start)()) {
  // Six registers, the address to return to, and a word that keeps the stack aligned as a call
  // leaves it.
  uint64_t* frame = (uint64_t*)((uintptr_t)top & ~15ull) - 8;
  for (int i = 0; i < 8; i++) frame[i] = 0;
  frame[6] = (uint64_t)start;
  return frame;
}

#elif defined(__aarch64__)

asm(R"(
.text
.globl metal_switch
.type metal_switch, %function
metal_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

void* new_stack(char* top, void (*start)()) {
  uint64_t* frame = (uint64_t*)((uintptr_t)top & ~15ull) - 20;
  for (int i = 0; i < 20; i++) frame[i] = 0;
  frame[11] = (uint64_t)start;  // x30, where ret goes
  return frame;
}

#else
#error "fibers are written for x86-64 and aarch64"
#endif
