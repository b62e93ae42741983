// The entry point, and what turns signals into errors: a hang, a crash.
#include <signal.h>
#include <string.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "memory.h"

static const char *program_start, *program_end;

bool in_program(const void* address) { return address >= program_start && address < program_end; }

static int alarm_signal() { return SIGRTMIN + 5; }

static void on_signal(int number, siginfo_t* info, void*) {
  char who[128] = "the scheduler", what[256];
  if (current) snprintf(who, sizeof who, "%s", describe(current));
  if (number == alarm_signal())
    fail(TIMEOUT, 0, 0, "still running after %g s, in %s", launch->timeout, who);
  if (number == SIGFPE) fail(BAD_ARITHMETIC, 0, 0, "integer division by zero by %s", who);
  explain_address((const char*)info->si_addr, what, sizeof what);
  fail(BAD_ADDRESS, 0, 0, "%s, by %s", what, who);
}

struct Signals {
  static constexpr unsigned COUNT = 4;
  int numbers[COUNT];
  struct sigaction before[COUNT];
  stack_t stack_before;
  timer_t timer;
};

static void catch_signals(Signals& signals) {
  static char stack[64 << 10];
  stack_t own = {};
  own.ss_sp = stack;
  own.ss_size = sizeof stack;
  sigaltstack(&own, &signals.stack_before);
  const int numbers[Signals::COUNT] = {SIGSEGV, SIGBUS, SIGFPE, alarm_signal()};
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (unsigned i = 0; i < Signals::COUNT; i++) {
    signals.numbers[i] = numbers[i];
    sigaction(numbers[i], &action, &signals.before[i]);
  }
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;  // to this thread, whose stacks the handler leaves
  event.sigev_signo = alarm_signal();
  event._sigev_un._tid = (int)syscall(SYS_gettid);
  timer_create(CLOCK_MONOTONIC, &event, &signals.timer);
  struct itimerspec when = {};
  when.it_value.tv_sec = (time_t)launch->timeout;
  when.it_value.tv_nsec = (long)((launch->timeout - (double)when.it_value.tv_sec) * 1e9);
  timer_settime(signals.timer, 0, &when, nullptr);
}

static void restore_signals(Signals& signals) {
  timer_delete(signals.timer);
  for (unsigned i = 0; i < Signals::COUNT; i++)
    sigaction(signals.numbers[i], &signals.before[i], nullptr);
  sigaltstack(&signals.stack_before, nullptr);
}

// Runs a launch. Returns its error's kind.
extern "C" int metal_run(Launch* request, const char* start, const char* end) {
  static Signals signals;
  launch = request;
  launch->error.kind = NO_ERROR;
  program_start = start;
  program_end = end;
  start_stacks();
  catch_signals(signals);
  if (!sigsetjmp(on_error, 1)) run_launch();
  current = nullptr;
  restore_signals(signals);
  unmap_buffers();
  return request->error.kind;
}
