// How a launch ends early.
#include <stdarg.h>
#include <stdio.h>

#include "state.h"

sigjmp_buf on_error;

static void end(ErrorKind kind, const char* format, va_list arguments) {
  launch->error.kind = kind;
  vsnprintf(launch->error.message, sizeof launch->error.message, format, arguments);
  current = nullptr;
}

void fail(ErrorKind kind, uint64_t pc, uint64_t other_pc, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  end(kind, format, arguments);
  va_end(arguments);
  launch->error.pc = pc;
  launch->error.other_pc = other_pc;
  siglongjmp(on_error, 1);
}

void fail_at(ErrorKind kind, unsigned line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  end(kind, format, arguments);
  va_end(arguments);
  launch->error.line = line;
  siglongjmp(on_error, 1);
}

const char* describe(const Fiber* fiber) {
  static char text[96];
  const Position& at = fiber->position;
  snprintf(
      text, sizeof text, "thread %u of threadgroup (%u, %u, %u)", at.index, at.group[0],
      at.group[1], at.group[2]);
  return text;
}
