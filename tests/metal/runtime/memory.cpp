// Checks each access of a kernel, and counts what it reads and writes.
//
// Device buffers are copied into slots of one reserved range, threadgroup variables lie in another:
// an address tells what it belongs to, and by how much it misses.
#include "memory.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>


constexpr uint64_t PAGE = 4096;
constexpr unsigned MAX_BUFFERS = 64, MAX_VARIABLES = 64;
// Between threadgroup variables: an index that is off by less is seen.
constexpr uint64_t VARIABLE_GAP = 64 << 10;
constexpr uint64_t ARENA_BYTES = (uint64_t)MAX_VARIABLES * (VARIABLE_GAP + (64 << 10));

// ---- who touched an element last ----

struct Stamp {
  uint32_t barrier, simd_barrier;  // the clock's time of the last barriers before the access
  uint32_t pc;                     // relative to the entry
  uint16_t thread;              // the last one; since `barrier` there may also have been
  bool several : 1;             // others of its simdgroup
  bool several_simdgroups : 1;  // others of other simdgroups
  bool atomic : 1;
};

struct History {
  Stamp read, write;  // barrier 0: never
};

enum Mark : uint8_t { READ = 1, WRITTEN = 2 };

struct Region {
  const char* name;
  char* base;
  uint64_t bytes;
  unsigned element;    // bytes; an access touches whole elements
  bool threadgroup;
  Buffer* buffer;      // null for threadgroup memory
  uint8_t* marks;      // one per byte: Mark
  History* histories;  // one per element; null for inputs, which nobody writes
  unsigned id;         // of a threadgroup variable
};

static Region regions[MAX_BUFFERS];
static char* device_base;
static unsigned slot_shift;
static uint64_t device_bytes;

static Region variables[MAX_VARIABLES];
static unsigned variable_count;
static char* arena;
static History* arena_histories;
static uint8_t* arena_marks;

static void* reserve(uint64_t bytes, int protection) {
  void* range = mmap(
      nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return range;
}

static uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

void map_buffers(void** addresses) {
  unsigned count = launch->buffer_count;
  if (!launch->checked) {
    for (unsigned i = 0; i < count; i++) addresses[i] = launch->buffers[i].data;
    return;
  }
  uint64_t largest = 1;
  for (unsigned i = 0; i < count; i++)
    if (launch->buffers[i].bytes > largest) largest = launch->buffers[i].bytes;
  // Each buffer starts at a quarter of its slot, so that an address off by the size of the
  // buffer to either side is not in another one.
  for (slot_shift = 20; (1ull << slot_shift) < 4 * (largest + 2 * PAGE);) slot_shift++;
  uint64_t slot = 1ull << slot_shift;
  device_bytes = slot * count;
  device_base = (char*)reserve(device_bytes, PROT_NONE);
  for (unsigned i = 0; i < count; i++) {
    Buffer& buffer = launch->buffers[i];
    char* start = device_base + i * slot + slot / 4;
    mprotect(start, round_up(ALIGNMENT + buffer.bytes, PAGE), PROT_READ | PROT_WRITE);
    Region& region = regions[i];
    region = {buffer.name, start + buffer.offset, buffer.bytes, buffer.element, false, &buffer};
    memcpy(region.base, buffer.data, buffer.bytes);
    region.marks = (uint8_t*)reserve(buffer.bytes + 1, PROT_READ | PROT_WRITE);
    if (buffer.output)
      region.histories =
          (History*)reserve((buffer.bytes + 1) * sizeof(History), PROT_READ | PROT_WRITE);
    addresses[i] = region.base;
  }
}

static void count_marks(Buffer& buffer, const uint8_t* marks) {
  buffer.read_distinct = buffer.written_distinct = 0;
  buffer.first_unwritten = buffer.bytes;
  for (uint64_t i = 0; i < buffer.bytes; i++) {
    buffer.read_distinct += marks[i] & READ;
    buffer.written_distinct += (marks[i] & WRITTEN) / WRITTEN;
  }
  if (!buffer.output || buffer.written_distinct == buffer.bytes) return;
  for (buffer.first_unwritten = 0; marks[buffer.first_unwritten] & WRITTEN;)
    buffer.first_unwritten++;
}

void unmap_buffers() {
  if (!launch->checked || !device_base) return;
  for (unsigned i = 0; i < launch->buffer_count; i++) {
    Region& region = regions[i];
    Buffer& buffer = launch->buffers[i];
    if (buffer.output) {
      memcpy(buffer.data, region.base, buffer.bytes);
      munmap(region.histories, (buffer.bytes + 1) * sizeof(History));
    }
    count_marks(buffer, region.marks);
    munmap(region.marks, buffer.bytes + 1);
  }
  munmap(device_base, device_bytes);
  device_base = nullptr;
}

// ---- threadgroup memory ----

void start_threadgroup_memory() {
  if (!arena) {
    arena = (char*)reserve(ARENA_BYTES, PROT_READ | PROT_WRITE);
    arena_marks = (uint8_t*)reserve(ARENA_BYTES, PROT_READ | PROT_WRITE);
    arena_histories = (History*)reserve(ARENA_BYTES * sizeof(History), PROT_READ | PROT_WRITE);
  }
  for (unsigned i = 0; i < variable_count; i++) {
    uint64_t offset = variables[i].base - arena;
    memset(arena_histories + offset, 0, variables[i].bytes * sizeof(History));
  }
  variable_count = 0;
  launch->threadgroup_bytes = 0;
}

void clear_threadgroup_memory() {
  for (unsigned i = 0; i < variable_count; i++) {
    memset(variables[i].base, 0xff, variables[i].bytes);  // NaN
    memset(variables[i].marks, 0, variables[i].bytes);
  }
}

void* metal_threadgroup_variable(
    unsigned id, unsigned bytes, unsigned alignment, unsigned element, const char* name) {
  for (unsigned i = 0; i < variable_count; i++)
    if (variables[i].id == id) return variables[i].base;
  launch->threadgroup_bytes = round_up(launch->threadgroup_bytes, alignment) + bytes;
  if (launch->threadgroup_bytes > launch->threadgroup_limit || variable_count == MAX_VARIABLES)
    fail(
        THREADGROUP_MEMORY, (uint64_t)__builtin_return_address(0), 0,
        "%llu bytes of threadgroup memory with '%s', more than %u",
        (unsigned long long)launch->threadgroup_bytes, name, launch->threadgroup_limit);
  char* base = arena + VARIABLE_GAP;
  if (variable_count) {
    const Region& last = variables[variable_count - 1];
    base = arena + round_up(last.base - arena + last.bytes, 4096) + VARIABLE_GAP;
  }
  Region& region = variables[variable_count++];
  region = {name, base, bytes, element, true, nullptr};
  region.marks = arena_marks + (base - arena);
  region.histories = arena_histories + (base - arena);
  region.id = id;
  memset(base, 0xff, bytes);
  memset(region.marks, 0, bytes);
  return base;
}

// ---- races ----

struct Now {
  uint32_t barrier, simd_barrier;
  uint16_t thread;
};

static Now now_for(const Region& region) {
  unsigned thread = current->position.index, simdgroup = thread / SIMDGROUP;
  if (region.threadgroup)
    return {barriers.threadgroup_memory, barriers.simd_threadgroup[simdgroup], (uint16_t)thread};
  return {barriers.device_memory, barriers.simd_device[simdgroup], (uint16_t)thread};
}

// Whether all accesses that the stamp stands for happened before what this thread does now.
static bool ordered(const Stamp& stamp, const Now& now) {
  if (stamp.barrier < barriers.group_start) return false;  // of another threadgroup
  if (stamp.barrier < now.barrier) return true;
  if (stamp.several_simdgroups || stamp.thread / SIMDGROUP != now.thread / SIMDGROUP) return false;
  if (stamp.simd_barrier < now.simd_barrier) return true;
  return !stamp.several && stamp.thread == now.thread;
}

// Threadgroup memory is new in each threadgroup: what an earlier one did does not count.
static bool holds(const Region& region, const Stamp& stamp) {
  return region.threadgroup ? stamp.barrier >= barriers.group_start : stamp.barrier != 0;
}

static uint64_t absolute(uint32_t pc) { return (uint64_t)launch->entry + (int32_t)pc; }

static uint32_t relative(uint64_t pc) { return (uint32_t)(pc - (uint64_t)launch->entry); }

[[noreturn]] static void fail_race(
    const Region& region, uint64_t element, const Access& access, const Stamp& other,
    const char* what) {
  char who[64];
  bool earlier = other.barrier < barriers.group_start;
  snprintf(
      who, sizeof who, "thread %u%s", other.thread, earlier ? " of another threadgroup" : "");
  fail(
      RACE, access.pc, absolute(other.pc), "race on %s[%llu]: %s by %s and by %s, unordered",
      region.name, (unsigned long long)element, what, describe(current), who);
}

static void note_read(Stamp& stamp, const Now& now, const Access& access) {
  bool more = false, more_simdgroups = false;
  if (stamp.barrier == now.barrier && stamp.thread != now.thread) {
    bool same_simdgroup =
        !stamp.several_simdgroups && stamp.thread / SIMDGROUP == now.thread / SIMDGROUP;
    bool follows = same_simdgroup && stamp.simd_barrier < now.simd_barrier;
    more = !follows;
    more_simdgroups = !same_simdgroup;
  } else if (stamp.barrier == now.barrier) {
    more = stamp.several;
    more_simdgroups = stamp.several_simdgroups;
  }
  stamp = {now.barrier, now.simd_barrier,  relative(access.pc), now.thread,
           more,        more_simdgroups, access.atomic};
}

static void check_race(Region& region, const Access& access, uint64_t element, const Now& now) {
  History& history = region.histories[element];
  if (holds(region, history.write) && !(access.atomic && history.write.atomic) &&
      !ordered(history.write, now))
    fail_race(region, element, access, history.write,
              access.writes ? "two writes" : "a read after a write");
  if (access.writes && holds(region, history.read) &&
      !(access.atomic && history.read.atomic) && !ordered(history.read, now))
    fail_race(region, element, access, history.read, "a write after a read");
  if (access.writes) {
    history.write = {now.barrier, now.simd_barrier, relative(access.pc), now.thread,
                     false,       false,            access.atomic};
  }
  if (access.reads) note_read(history.read, now, access);
}

// An access to part of an element: from now on, follow each byte.
static void follow_bytes(Region& region) {
  for (uint64_t i = region.bytes; i-- > 0;)
    region.histories[i] = region.histories[i / region.element];
  region.element = 1;
}

static void check_histories(Region& region, const Access& access, uint64_t offset) {
  if (access.bytes % region.element || offset % region.element) follow_bytes(region);
  Now now = now_for(region);
  uint64_t first = offset / region.element, count = access.bytes / region.element;
  for (uint64_t i = first; i < first + count; i++) check_race(region, access, i, now);
}

// ---- one access ----

static void mark(uint8_t* marks, unsigned bytes, uint8_t mark) {
  uint64_t word;
  while (bytes >= 8) {
    memcpy(&word, marks, 8);
    word |= 0x0101010101010101ull * mark;
    memcpy(marks, &word, 8);
    marks += 8;
    bytes -= 8;
  }
  for (; bytes; bytes--) *marks++ |= mark;
}

[[noreturn]] static void fail_outside(const Region& region, const Access& access) {
  long long offset = access.address - region.base;
  fail(
      access.writes ? OUT_OF_BOUNDS_WRITE : OUT_OF_BOUNDS_READ, access.pc, 0,
      "%s of %u bytes at byte %lld of %s '%s', which has %llu, by %s",
      access.writes ? "write" : "read", access.bytes, offset,
      region.threadgroup ? "threadgroup variable" : "buffer", region.name,
      (unsigned long long)region.bytes, describe(current));
}

static void check_in(Region& region, const Access& access) {
  uint64_t offset = (uint64_t)(access.address - region.base);
  if (offset > region.bytes || offset + access.bytes > region.bytes) fail_outside(region, access);
  uint8_t* marks = region.marks + offset;
  if (access.reads) {
    if (region.histories)
      for (unsigned i = 0; i < access.bytes; i++)
        if (!(marks[i] & WRITTEN))
          fail(
              UNINITIALISED_READ, access.pc, 0, "read of %s[%llu], which nobody has written, by %s",
              region.name, (unsigned long long)(offset / region.element), describe(current));
    if (region.buffer) region.buffer->read_total += access.bytes;
    mark(marks, access.bytes, READ);
  }
  if (access.writes) {
    if (!region.histories)
      fail(
          WRITE_TO_INPUT, access.pc, 0, "write to input '%s' by %s", region.name,
          describe(current));
    if (region.buffer) region.buffer->written_total += access.bytes;
    mark(marks, access.bytes, WRITTEN);
  }
  if (region.histories) check_histories(region, access, offset);
}

// The threadgroup variable at an address, or the last one before it.
static Region* variable_at(const char* address) {
  Region* found = variables;
  for (unsigned i = 1; i < variable_count; i++)
    if (variables[i].base - (VARIABLE_GAP / 2) <= address) found = &variables[i];
  return found;
}

void check_shared(const Access& access) {
  uint64_t in_device = (uint64_t)(access.address - device_base);
  if (in_device < device_bytes) {
    check_in(regions[in_device >> slot_shift], access);
  } else if ((uint64_t)(access.address - arena) < ARENA_BYTES && variable_count) {
    check_in(*variable_at(access.address), access);
  } else if ((uint64_t)(access.address - stacks) < MAX_THREADS * STACK_BYTES) {
    fail(
        BAD_ADDRESS, access.pc, 0, "access to another thread's variable by %s", describe(current));
  } else if (access.writes || !in_program(access.address)) {
    fail(
        BAD_ADDRESS, access.pc, 0, "%s of memory that is in no buffer by %s",
        access.writes ? "write" : "read", describe(current));
  }
}

void metal_check_atomic(const volatile void* address, unsigned bytes, metal_abi::AtomicKind kind) {
  bool reads = kind != metal_abi::ATOMIC_STORE, writes = kind != metal_abi::ATOMIC_LOAD;
  check_access({(char*)address, bytes, reads, writes, true, (uint64_t)__builtin_return_address(0)});
}

// For a signal: which buffer the address was meant for.
void explain_address(const char* address, char* text, uint64_t bytes) {
  if ((uint64_t)(address - stacks) < MAX_THREADS * STACK_BYTES) {
    snprintf(text, bytes, "stack overflow");
  } else if (launch->checked && (uint64_t)(address - device_base) < device_bytes) {
    const Region& region = regions[(uint64_t)(address - device_base) >> slot_shift];
    snprintf(
        text, bytes, "address at byte %lld of buffer '%s', which has %llu",
        (long long)(address - region.base), region.name, (unsigned long long)region.bytes);
  } else {
    snprintf(text, bytes, "address that is in no buffer");
  }
}
