// What a compiled kernel and the runtime agree on. Included by both sides.
#pragma once

namespace metal_abi {

constexpr unsigned SIMDGROUP = 32;  // lanes

// Where a thread is. The launch is one-dimensional within a threadgroup: (threads, 1, 1).
struct Position {
  unsigned index;     // in its threadgroup ("thread" is a macro in a kernel)
  unsigned threads;   // per threadgroup
  unsigned group[3];  // of the threadgroup in the grid
  unsigned groups[3];
};

// What a lane shows the other lanes of its simdgroup.
struct alignas(32) Slot {
  unsigned char bytes[32];
};

// Turns what the 32 lanes showed into what each of them gets.
using Combine = void (*)(const Slot* shown, Slot* results);

// What a lane gets back.
struct Meeting {
  const Slot* slots;  // one per lane: what they showed, or the results
  unsigned lane;      // this one
};

// The place of a call in the kernel's text, for errors and to tell whether lanes are at one call.
struct Site {
  const char* what;
  unsigned line, column;
};

enum BarrierScope : unsigned { SCOPE_SIMDGROUP, SCOPE_THREADGROUP };
enum AtomicKind : unsigned { ATOMIC_LOAD, ATOMIC_STORE, ATOMIC_UPDATE };

}  // namespace metal_abi

extern "C" {
// Waits for all lanes of the simdgroup, and combines what they show if there is a way given.
metal_abi::Meeting metal_meet(
    const metal_abi::Slot* shown, metal_abi::Combine combine, metal_abi::Site site);
void metal_barrier(metal_abi::BarrierScope scope, unsigned flags, metal_abi::Site site);
unsigned metal_lane();
// The memory of a threadgroup variable, the same for all threads of the threadgroup.
void* metal_threadgroup_variable(
    unsigned id, unsigned bytes, unsigned alignment, unsigned element, const char* name);
// Checks of what the compiler does not instrument.
void metal_check_atomic(const volatile void* address, unsigned bytes, metal_abi::AtomicKind kind);
void metal_misaligned(const void* address, unsigned alignment);
void metal_bad_lane(int lane, metal_abi::Site site);
}
