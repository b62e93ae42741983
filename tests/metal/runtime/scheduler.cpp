// Runs a launch's threadgroups one after another, each thread as a fiber.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "fiber.h"
#include "state.h"

Launch* launch;
Fiber fibers[MAX_THREADS];
Fiber* current;
Clock barriers;
char* stacks;

static Simdgroup simdgroups[MAX_SIMDGROUPS];
static void* scheduler_stack;
static void* buffer_addresses[64];
static uint64_t random_state;

static unsigned random_below(unsigned bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (unsigned)((random_state >> 11) % bound);
}

// The i-th of `count` things in this launch's order, for orders that need no memory.
static unsigned in_order(unsigned i, unsigned count) {
  return launch->schedule == REVERSED ? count - 1 - i : i;
}

template <class T>
static void shuffle(T* items, unsigned count) {
  if (launch->schedule != RANDOM) return;
  for (unsigned i = count; i > 1; i--) {
    unsigned j = random_below(i);
    T item = items[i - 1];
    items[i - 1] = items[j];
    items[j] = item;
  }
}

void start_stacks() {
  if (stacks) return;
  stacks = (char*)mmap(
      nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (unsigned i = 0; i < MAX_THREADS; i++) {
    fibers[i].stack = stacks + i * STACK_BYTES;
    mprotect(fibers[i].stack, 4096, PROT_NONE);  // catches an overflow
  }
}

// ---- fibers: each goes on to the next lane of its simdgroup that has not run in this round ----

static Simdgroup& simdgroup_of(const Fiber* fiber) {
  return simdgroups[fiber->position.index / SIMDGROUP];
}

static void leave(Fiber* self) {
  Simdgroup& group = simdgroup_of(self);
  if (group.next < SIMDGROUP) {
    current = group.order[group.next++];
    metal_switch(&self->stack_pointer, current->stack_pointer);
  } else {
    current = nullptr;
    metal_switch(&self->stack_pointer, scheduler_stack);
  }
}

static void run_thread() {
  Fiber* self = current;
  launch->entry(buffer_addresses, &self->position);
  self->state = State::DONE;
  leave(self);
  __builtin_unreachable();
}

metal_abi::Meeting metal_meet(const Slot* shown, metal_abi::Combine combine, Site site) {
  Fiber* self = current;
  Simdgroup& group = simdgroup_of(self);
  unsigned turn = self->turn, lane = self->position.index % SIMDGROUP;
  self->turn ^= 1;
  group.shown[turn][lane] = *shown;
  self->state = State::AT_SIMD;
  self->site = site;
  self->combine = combine;
  leave(self);
  return {combine ? group.results[turn] : group.shown[turn], lane};
}

void metal_barrier(metal_abi::BarrierScope scope, unsigned flags, Site site) {
  Fiber* self = current;
  bool whole = scope == metal_abi::SCOPE_THREADGROUP;
  self->state = whole ? State::AT_THREADGROUP_BARRIER : State::AT_SIMDGROUP_BARRIER;
  self->site = site;
  self->barrier_flags = flags;
  leave(self);
}

unsigned metal_lane() { return current->position.index % SIMDGROUP; }

// ---- what they wait for ----

static bool same_call(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.site.line == b.site.line && a.site.column == b.site.column &&
         a.site.what == b.site.what;
}

// Lists who is where: "lanes 0-15: simd_sum at line 12; lanes 16-31: returned".
static void list_places(const Fiber* first, unsigned count, const char* word, char* text,
                        uint64_t bytes) {
  uint64_t used = 0;
  for (unsigned i = 0; i < count && used + 120 < bytes;) {
    unsigned end = i + 1;
    while (end < count && same_call(first[i], first[end])) end++;
    used += snprintf(text + used, bytes - used, "%s%s %u-%u ", i ? "; " : "", word, i, end - 1);
    if (first[i].state == State::DONE)
      used += snprintf(text + used, bytes - used, "returned");
    else
      used += snprintf(text + used, bytes - used, "at %s, line %u", first[i].site.what,
                       first[i].site.line);
    i = end;
  }
}

static unsigned first_waiting(const Fiber* first, unsigned count, State state) {
  for (unsigned i = 0; i < count; i++)
    if (first[i].state == state) return i;
  return 0;
}

[[noreturn]] static void fail_divergent(ErrorKind kind, const Fiber* first, unsigned count,
                                        State state, const char* of, const char* word) {
  char places[700];
  list_places(first, count, word, places, sizeof places);
  const Fiber& waiting = first[first_waiting(first, count, state)];
  fail_at(kind, waiting.site.line, "%s is not reached by all %s of %s: %s", waiting.site.what, of,
          describe(&waiting), places);
}

static void begin_round(Simdgroup& group, Fiber* lanes) {
  for (unsigned i = 0; i < SIMDGROUP; i++) group.order[i] = &lanes[in_order(i, SIMDGROUP)];
  shuffle(group.order, SIMDGROUP);
}

static void run_round(Simdgroup& group) {
  group.next = 1;
  current = group.order[0];
  metal_switch(&scheduler_stack, current->stack_pointer);
}

// All lanes wait at one call: let them go on.
static void release(Simdgroup& group, unsigned index, Fiber* lanes) {
  if (lanes[0].state == State::AT_SIMD) {
    unsigned turn = lanes[0].turn ^ 1;
    if (lanes[0].combine) lanes[0].combine(group.shown[turn], group.results[turn]);
  } else {
    barriers.now++;
    if (lanes[0].barrier_flags & 1) barriers.simd_device[index] = barriers.now;
    if (lanes[0].barrier_flags & 2) barriers.simd_threadgroup[index] = barriers.now;
  }
  for (unsigned i = 0; i < SIMDGROUP; i++) lanes[i].state = State::READY;
}

// Runs a simdgroup until its lanes wait for other simdgroups or have returned; in lockstep, only
// to its next SIMD function. Returns whether it can go on without the other simdgroups.
static bool advance(unsigned index) {
  Simdgroup& group = simdgroups[index];
  Fiber* lanes = fibers + index * SIMDGROUP;
  do {
    if (lanes[0].state != State::READY) return false;
    run_round(group);
    bool together = true, simd = false;
    for (unsigned i = 0; i < SIMDGROUP; i++) {
      together = together && same_call(lanes[0], lanes[i]);
      simd = simd || lanes[i].state == State::AT_SIMD ||
             lanes[i].state == State::AT_SIMDGROUP_BARRIER;
    }
    if (!simd) return false;
    if (!together) {
      State state = State::AT_SIMD;
      if (lanes[first_waiting(lanes, SIMDGROUP, state)].state != state)
        state = State::AT_SIMDGROUP_BARRIER;
      fail_divergent(SIMD_DIVERGENCE, lanes, SIMDGROUP, state, "lanes", "lanes");
    }
    release(group, index, lanes);
    if (launch->schedule == RANDOM) begin_round(group, lanes);
  } while (launch->schedule != LOCKSTEP);
  return true;
}

static void release_barrier() {
  barriers.now++;
  if (fibers[0].barrier_flags & 1) barriers.device_memory = barriers.now;
  if (fibers[0].barrier_flags & 2) barriers.threadgroup_memory = barriers.now;
  for (unsigned i = 0; i < launch->threads; i++) fibers[i].state = State::READY;
}

static void start_threadgroup(unsigned x, unsigned y, unsigned z) {
  unsigned count = launch->threads / SIMDGROUP;
  uint32_t start = ++barriers.now;
  barriers.group_start = barriers.threadgroup_memory = barriers.device_memory = start;
  for (unsigned i = 0; i < count; i++)
    barriers.simd_threadgroup[i] = barriers.simd_device[i] = start;
  for (unsigned i = 0; i < launch->threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.state = State::READY;
    fiber.turn = 0;
    const unsigned* groups = launch->groups;
    fiber.position = {i, launch->threads, {x, y, z}, {groups[0], groups[1], groups[2]}};
    // Tops that differ by more than a page's worth of bits: else the lanes' hot lines would
    // compete for the same sets of the CPU's cache.
    char* top = fiber.stack + STACK_BYTES - (i % SIMDGROUP) * 320;
    fiber.stack_pointer = new_stack(top, run_thread);
  }
  for (unsigned i = 0; i < count; i++) begin_round(simdgroups[i], fibers + i * SIMDGROUP);
  clear_threadgroup_memory();
}

static void run_threadgroup(unsigned x, unsigned y, unsigned z) {
  start_threadgroup(x, y, z);
  unsigned threads = launch->threads, count = threads / SIMDGROUP;
  unsigned order[MAX_SIMDGROUPS];
  for (;;) {
    for (unsigned i = 0; i < count; i++) order[i] = in_order(i, count);
    shuffle(order, count);
    for (bool more = true; more;) {
      more = false;
      for (unsigned i = 0; i < count; i++) more |= advance(order[i]);
    }
    unsigned done = 0, same = 0;
    for (unsigned i = 0; i < threads; i++) {
      done += fibers[i].state == State::DONE;
      same += same_call(fibers[0], fibers[i]);
    }
    if (done == threads) return;
    if (same < threads)
      fail_divergent(BARRIER_DIVERGENCE, fibers, threads, State::AT_THREADGROUP_BARRIER, "threads",
                     "threads");
    release_barrier();
  }
}

void run_launch() {
  const unsigned* groups = launch->groups;
  uint64_t total = (uint64_t)groups[0] * groups[1] * groups[2];
  random_state = launch->seed * 2654435761u + 88172645463325252u;
  barriers.now = 1;
  map_buffers(buffer_addresses);
  start_threadgroup_memory();
  // At random: a step through all threadgroups that shares no factor with their number.
  uint64_t step = 1, start = 0;
  if (launch->schedule == RANDOM && total > 2) {
    start = random_below((unsigned)total);
    for (uint64_t a = 0, b = 0; a != 1;) {
      step = 1 + random_below((unsigned)total - 1);
      for (a = total, b = step; b;) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
      }
    }
  }
  for (uint64_t i = 0; i < total; i++) {
    uint64_t k = (start + (launch->schedule == REVERSED ? total - 1 - i : i) * step) % total;
    run_threadgroup(k % groups[0], k / groups[0] % groups[1], k / groups[0] / groups[1]);
  }
}
